"""The demo on a tiny model: what it prints is there, and real."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from examples import generate
from hetegen_compile.backend import make_backend
from hetegen_compile.segments import plain_compiler
from tests.models.architectures import prompts, tiny_model


class Letters:
    """A tokenizer for the streamer: one letter for each token."""

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        del options
        return "".join(chr(97 + int(token) % 26) for token in tokens)


def test_the_demo_shows_what_it_promises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    compile_in_place = type(model).compile
    plain = make_backend(plain_compiler)
    monkeypatch.setattr(generate, "load_smollm2", lambda: (model, Letters()))
    monkeypatch.setattr(generate, "encode_chat", lambda tokenizer, questions: {**prompts(1)})
    monkeypatch.setattr(
        type(model), "compile", lambda self, backend, options: compile_in_place(self, backend=plain, options=options)
    )
    torch._dynamo.reset()
    assert generate.main(["--gpu-memory", "120KiB", "--max-new-tokens", "8", "--pace", "50"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"answer: [a-z]+", shown)
    assert "identical to eager's" in shown
    assert "says nothing" in shown
    assert "model.layers.{0..1}" in shown, "the folded table"
    for way in ("all streamed", "all Linears on the host", "split"):
        (predicted, measured) = re.findall(rf"^{way} +([\d.]+) tokens/s +([\d.]+) tokens/s", shown, re.MULTILINE)[0]
        assert float(predicted) > 0
        assert float(measured) > 0
