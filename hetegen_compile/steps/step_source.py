"""The text of a generated step function, and the constants that its lines name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from hetegen_compile.accelerators.base import LaunchChain

GIVEN = "_given"
"""What a chain is given; no node has such a name, for those of values come from operations and arguments."""

HEADER = "def step(inputs, mirrors, residents, carried=(), ahead=None):"


class StepSource:
    """Python lines in issue order; names of nodes are local variables, everything else is in the function's globals."""

    def __init__(self, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._globals: dict[str, Any] = dict(methods)
        self._lines = ["twins = []"]
        self._chains: dict[str, LaunchChain] = {}
        self._functions: list[str] = []

    def add(self, line: str) -> None:
        """One more line, if there is anything in it."""
        if line:
            self._lines.append(line)

    def add_chain(
        self,
        name: str,
        lines: Sequence[str],
        given: Sequence[str],
        results: Sequence[str],
        *,
        dying: Sequence[str],
        written: tuple[int, ...],
        made: tuple[int, ...],
    ) -> None:
        """Lines that launch, as a function of their own: of ``given`` values, some of which nothing reads after it."""
        function = f"chain_{len(self._chains) + 1}"
        chain = self._chains[function] = LaunchChain(name, _not_made, written, made)
        body = [f"{', '.join(given)}, = {GIVEN}", f"{GIVEN}.clear()"] if given else []
        self._functions.append(_function(f"def {function}({GIVEN}):", [*body, *lines, f"return {_items(results)}"]))
        self.add(f"{GIVEN} = [{', '.join(given)}]")
        self.add(f"del {', '.join(dying)}" if dying else "")
        called = f"launch_chain({self.constant('chain', chain)}, {GIVEN})"
        self.add(f"{_items(results)} = {called}" if results else called)

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

    @property
    def chains(self) -> tuple[LaunchChain, ...]:
        """Those that have been added."""
        return tuple(self._chains.values())

    def function(self) -> tuple[Callable[..., Any], str]:
        """The function, and its text."""
        source = "\n".join([*self._functions, _function(HEADER, self._lines)])
        exec(compile(source, "<hetegen step>", "exec"), self._globals)
        for name, chain in self._chains.items():
            chain.function = self._globals[name]
        return self._globals["step"], source


def _function(header: str, lines: Sequence[str]) -> str:
    body = "\n    ".join(lines)
    return f"{header}\n    {body}\n"


def _items(names: Sequence[str]) -> str:
    """A tuple of names, on either side of an assignment."""
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def _not_made(given: list[Any]) -> tuple[Any, ...]:
    raise AssertionError("the step's text has not been compiled")


__all__ = ["HEADER", "StepSource"]
