"""The demo on a tiny model: what it prints is there, and real."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from examples import generate
from hetegen_compile.backend import make_backend
from hetegen_compile.steps.segments import plain_compiler
from tests.models.architectures import prompts, tiny_model


class Letters:
    """A tokenizer for the streamer: one letter for each token."""

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        del options
        return "".join(chr(97 + int(token) % 26) for token in tokens)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a tiny model, its segments as plain FX code."""
    model = tiny_model("llama")
    compile_in_place = type(model).compile
    plain = make_backend(plain_compiler)
    monkeypatch.setattr(generate, "load_smollm2", lambda: (model, Letters()))
    monkeypatch.setattr(generate, "encode_chat", lambda tokenizer, questions: {**prompts(1)})
    monkeypatch.setattr(
        type(model), "compile", lambda self, backend, options: compile_in_place(self, backend=plain, options=options)
    )
    torch._dynamo.reset()


@pytest.mark.usefixtures("tiny")
def test_the_demo_shows_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--gpu-memory", "1KiB", r"hetegen: gpu_memory=1\.00 KiB cannot hold .*The smallest budget that works is"),
        ("--gpu-memory", "much", "hetegen: option 'gpu_memory': 'much' is not a size"),
        ("--hardware", "nope", "hetegen: hardware profile 'nope' is neither"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([option, value, "--max-new-tokens", "2"]) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown)
    assert "Traceback" not in shown


@pytest.mark.parametrize(("cuda", "hardware", "pace"), [(True, "auto", None), (False, "rtx3060-laptop", 20.0)])
def test_a_gpu_is_calibrated_and_not_paced(
    cuda: bool, hardware: str, pace: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = generate._arguments([])
    assert (args.hardware, args.pace) == (hardware, pace)
    stated = generate._arguments(["--hardware", "t4-xeon", "--pace", "5"])
    assert (stated.hardware, stated.pace) == ("t4-xeon", 5.0)
