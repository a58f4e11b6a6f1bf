"""One architecture of transformers with small random weights: built, run in eager, run compiled, compared."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

import hetegen_compile
from benchmarks.tiny_configs import IMAGE, IMAGE_TOKEN, LAYERS, POSITIONS, tiny_config
from hetegen_compile.backend import make_backend
from hetegen_compile.steps.segments import inductor_compiler, plain_compiler

NEW_TOKENS = 6
FACTORIES = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "speech": "AutoModelForSpeechSeq2Seq",
    "masked": "AutoModelForMaskedLM",
    "vision": "AutoModelForImageTextToText",
}
ENCODED = ("seq2seq", "speech")
"""Kinds whose decoder has an encoder before it."""
BUDGET_FACTORS = (0.5, 1.0, 2.0, 64.0)
"""Budgets as multiples of the weights' bytes: the smallest that holds a step's activations is taken."""
REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Outcome:
    """One architecture with one cache.

    Attributes:
        status: ``equal``, ``differs``, ``error`` (ours), ``not built``, ``eager fails`` or ``time limit``.
        detail: the reason where it is not ``equal``.
        graphs: how often the backend was called; on_host: how many of those graphs run on the host in eager mode.
        linear_bytes: weights of the model's Linears.
        split_share: what share of them the plan that splits most of them splits (None: not measured).
        host_bytes, streamed_bytes: of the plan with most of each.
        refusals: what was left alone, each reason once.
        inductor: whether segments were compiled with Inductor; else they ran as plain FX code.
    """

    name: str
    kind: str
    cache: str
    status: str
    detail: str = ""
    graphs: int = 0
    on_host: int = 0
    budget: float = 0.0
    linear_bytes: int = 0
    split_share: float | None = None
    host_bytes: int = 0
    streamed_bytes: int = 0
    refusals: list[str] = field(default_factory=list)
    seconds: float = 0.0
    inductor: bool = False

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """What a row is about: one row for each."""
        return (self.name, self.kind, self.cache, self.inductor)


def measure(name: str, kind: str, cache: str, *, inductor: bool) -> Outcome:
    """Build, run in eager, run compiled, compare."""
    torch.set_num_threads(1)
    blank = Outcome(name, kind, cache, "not built", inductor=inductor)
    try:
        model = build_model(name, kind)
    except Exception as error:
        return replace(blank, detail=_reason(error))
    try:
        expected = _run(model, kind, cache)
    except Exception as error:
        return replace(blank, status="eager fails", detail=_reason(error))
    blank = replace(blank, linear_bytes=_matrix_bytes(model))
    for factor in BUDGET_FACTORS:
        outcome = _compiled(model, expected, replace(blank, budget=factor), inductor=inductor)
        if "gpu_memory" not in outcome.detail:
            break
    return outcome


def build_model(name: str, kind: str, layers: int = LAYERS) -> Any:
    """With random weights, the same at each call; raises what its classes raise where the small sizes do not fit."""
    torch.manual_seed(0)
    factory = getattr(transformers, FACTORIES[kind])
    config = tiny_config(name, is_decoder=kind == "causal", layers=layers)
    with torch.device("meta"):  # one that is too large would take long to fill, or all memory
        parameters = sum(p.numel() for p in factory.from_config(config).parameters())
    if parameters > 50_000_000:
        raise ValueError("more than 50 million parameters: its configuration has sizes that are not known here")
    model = factory.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def example_inputs(model: Any, kind: str, *, batch: int = 2, length: int = 7, seed: int = 1) -> dict[str, Any]:
    """A batch of tokens [batch, length] without padding, behind an image for what sees; or sound for what hears."""
    generator, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).dtype
    if kind == "speech":
        name = model.main_input_name
        return {name: torch.randn(batch, *_sound_shape(model, name), generator=generator).to(dtype)}
    tokens = torch.randint(5, 250, (batch, length), generator=generator)
    images = {}
    if kind == "vision":
        images = {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=generator).to(dtype)}
        places = torch.full((batch, _image_tokens(model, **images) // batch), IMAGE_TOKEN)
        tokens = torch.cat([places, tokens], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **images}


def _sound_shape(model: Any, name: str) -> tuple[int, ...]:
    if name == "input_values":
        return (4000,)
    frames = 2 * POSITIONS  # the encoder halves them
    width = getattr(model.config, "input_feat_per_channel", None)
    return (getattr(model.config, "num_mel_bins", 80), frames) if width is None else (frames, width)


def _image_tokens(model: Any, pixel_values: torch.Tensor) -> int:
    """How many tokens stand for these images, as the model's own features say."""
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixel_values)
    features = getattr(found, "pooler_output", found)
    return sum(part.shape[:-1].numel() for part in (features if isinstance(features, list | tuple) else [features]))


def _run(model: Any, kind: str, cache: str) -> dict[str, Any]:
    """What is compared: logits of a forward without a decoder, else those and the tokens of a generation."""
    inputs = example_inputs(model, kind)
    if kind == "masked":
        with torch.no_grad():
            return {"logits": model(**inputs).logits}
    torch.manual_seed(0)
    found = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
        **({"cache_implementation": "static"} if cache == "static" else {}),
        **({"decoder_start_token_id": 1} if kind in ENCODED else {}),
    )  # fmt: skip
    results = {"logits": torch.stack(found.logits), "tokens": found.sequences}
    return {**results, **_forward(model, inputs)} if kind in ENCODED else results


def _forward(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder, too, is part of the model's own forward; a generation calls it by itself, as it is."""
    prompt = torch.tensor([[1, 7, 9], [1, 8, 6]])
    with torch.no_grad():
        return {"forward": model(**inputs, decoder_input_ids=prompt, use_cache=False).logits}


def _matrix_bytes(model: Any) -> int:
    """Bytes of the Linears' weights, one that several share counted once."""
    kinds = (torch.nn.Linear, Conv1D)
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, kinds)}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def _compiled(model: Any, expected: Mapping[str, Any], blank: Outcome, *, inductor: bool) -> Outcome:
    torch._dynamo.reset()
    backend, returned = make_backend(inductor_compiler if inductor else plain_compiler), []

    def recording(module: Any, inputs: Any, *, options: Any = None) -> Any:
        returned.append(backend(module, inputs, options=options))
        return returned[-1]

    known = len(hetegen_compile.schedules())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    options = {"accelerator": "emulated", "split": 0.5, "seed": 1, "print_schedule": False}
    model._compiled_call_impl = None
    model.compile(backend=recording, options={**options, "gpu_memory": int(weights * blank.budget)})
    try:
        result = _run(model, blank.kind, blank.cache)
    except Exception as error:
        return replace(blank, status="error", detail=_reason(error), graphs=len(returned))
    status, detail = _compare(result, expected)
    outcome = replace(blank, status=status, detail=detail, graphs=len(returned))
    return _with_schedules(outcome, hetegen_compile.schedules()[known:])


def _compare(result: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, str]:
    for key, value in expected.items():
        try:
            torch.testing.assert_close(result[key], value, rtol=2e-4, atol=2e-4, equal_nan=True)
        except AssertionError as error:
            return "differs", f"{key}: {' '.join(str(error).split())[:REASON_CHARACTERS]}"
    if not expected["logits"].isfinite().any():
        return "differs", "eager gives nothing finite: no comparison"
    return "equal", ""


def _with_schedules(outcome: Outcome, schedules: Sequence[Any]) -> Outcome:
    split = [schedule.host_bytes + schedule.streamed_bytes + schedule.resident_bytes for schedule in schedules]
    reasons = dict.fromkeys(refusal.reason for schedule in schedules for refusal in schedule.refusals)
    return replace(
        outcome,
        on_host=sum("not offloaded" in schedule.title for schedule in schedules),
        split_share=round(max(split, default=0) / max(1, outcome.linear_bytes), 3),
        host_bytes=max((s.host_bytes for s in schedules), default=0),
        streamed_bytes=max((s.streamed_bytes for s in schedules), default=0),
        refusals=[reason[:REASON_CHARACTERS] for reason in reasons],
    )


def _reason(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:REASON_CHARACTERS]} ({place})"
