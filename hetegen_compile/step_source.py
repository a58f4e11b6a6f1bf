"""The text of a generated step function, and the constants that its lines name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

HEADER = "def step(inputs, mirrors, residents, carried=(), ahead=None):"


class StepSource:
    """Python lines in issue order; names of nodes are local variables, everything else is in the function's globals."""

    def __init__(self, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._globals: dict[str, Any] = dict(methods)
        self._lines = ["twins = []"]

    def add(self, line: str) -> None:
        """One more line, if there is anything in it."""
        if line:
            self._lines.append(line)

    def constant(self, hint: str, value: Any) -> str:
        """The name of a new global that holds ``value``."""
        name = f"_{hint}_{len(self._globals)}"
        self._globals[name] = value
        return name

    def text(self, argument: Any) -> str:
        """Python text for an argument of a node: names of values, literals, and globals for what has no literal."""
        if isinstance(argument, fx.Node):
            return argument.name
        if isinstance(argument, list) or type(argument) is tuple:
            items = ", ".join(map(self.text, argument))
            return f"[{items}]" if isinstance(argument, list) else f"({items}{',' if len(argument) == 1 else ''})"
        if isinstance(argument, dict):
            return "{" + ", ".join(f"{key!r}: {self.text(value)}" for key, value in argument.items()) + "}"
        if isinstance(argument, slice):
            return f"slice({self.text(argument.start)}, {self.text(argument.stop)}, {self.text(argument.step)})"
        if argument is None or isinstance(argument, (bool, int, str)):
            return repr(argument)
        return self.constant("constant", argument)

    def function(self) -> tuple[Callable[..., Any], str]:
        """The function, and its text."""
        body = "\n    ".join(self._lines)
        source = f"{HEADER}\n    {body}\n"
        exec(compile(source, "<hetegen step>", "exec"), self._globals)
        return self._globals["step"], source


__all__ = ["HEADER", "StepSource"]
