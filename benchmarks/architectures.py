"""Which architectures of the installed transformers run like eager, and how much of each is split.

    python -m benchmarks.architectures --json architectures.json
    python -m benchmarks.architectures --only llama jamba --cache static

For each architecture a model of two layers with random weights generates a few tokens in eager and compiled, on
the emulated accelerator with half of every Linear's rows on the host, and tokens and logits are compared. Each
runs in a process of its own with a time limit, so that one that crashes or hangs costs only its own row. With
``--json`` finished rows are kept and not run again. Segments run as plain FX code unless ``--inductor``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.tiny_configs import POSITIONS, tiny_config

KINDS = ("causal", "seq2seq", "speech", "masked")
CACHES = ("dynamic", "static")
NEW_TOKENS = 6
FACTORIES = {
    "causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM",
    "speech": "AutoModelForSpeechSeq2Seq", "masked": "AutoModelForMaskedLM",
}
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
        linear_bytes: weights of the model's matrices; split_bytes: of those that were split (a decode step).
        host_bytes, streamed_bytes: of the largest plan.
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
    split_bytes: int = 0
    host_bytes: int = 0
    streamed_bytes: int = 0
    refusals: list[str] = field(default_factory=list)
    seconds: float = 0.0
    inductor: bool = False

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """What a row is about: one row for each."""
        return (self.name, self.kind, self.cache, self.inductor)


# ---- one architecture, in a process of its own ------------------------------------------------------------


def measure(name: str, kind: str, cache: str, *, inductor: bool) -> Outcome:
    """Build, run in eager, run compiled, compare."""
    import torch

    torch.set_num_threads(1)
    blank = Outcome(name, kind, cache, "not built", inductor=inductor)
    try:
        model = _model(name, kind)
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


def _model(name: str, kind: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    factory = getattr(transformers, FACTORIES[kind])
    config = tiny_config(name, is_decoder=kind == "causal")
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


def _inputs(model: Any, kind: str) -> dict[str, Any]:
    """A batch of two: tokens, or sound for what hears."""
    import torch

    generator = torch.Generator().manual_seed(1)
    if kind != "speech":
        tokens = torch.randint(5, 250, (2, 7), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    name = model.main_input_name
    if name == "input_values":
        return {name: torch.randn(2, 4000, generator=generator)}
    frames = 2 * POSITIONS  # the encoder halves them
    width = getattr(model.config, "input_feat_per_channel", None)
    shape = (getattr(model.config, "num_mel_bins", 80), frames) if width is None else (frames, width)
    return {name: torch.randn(2, *shape, generator=generator)}


def _run(model: Any, kind: str, cache: str) -> dict[str, Any]:
    """What is compared: logits of a forward without a decoder, else those and the tokens of a generation."""
    import torch

    inputs = _inputs(model, kind)
    if kind == "masked":
        with torch.no_grad():
            return {"logits": model(**inputs).logits}
    torch.manual_seed(0)
    found = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
        **({"cache_implementation": "static"} if cache == "static" else {}),
        **({} if kind == "causal" else {"decoder_start_token_id": 1}),
    )  # fmt: skip
    results = {"logits": torch.stack(found.logits), "tokens": found.sequences}
    return results if kind == "causal" else {**results, **_forward(model, inputs)}


def _forward(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder, too, is part of the model's own forward; a generation calls it by itself, as it is."""
    import torch

    prompt = torch.tensor([[1, 7, 9], [1, 8, 6]])
    with torch.no_grad():
        return {"forward": model(**inputs, decoder_input_ids=prompt, use_cache=False).logits}


def _matrix_bytes(model: Any) -> int:
    import torch

    kinds = (torch.nn.Linear,)
    return sum(m.weight.numel() * m.weight.element_size() for m in model.modules() if isinstance(m, kinds))


def _compiled(model: Any, expected: Mapping[str, Any], blank: Outcome, *, inductor: bool) -> Outcome:
    import torch

    import hetegen_compile
    from hetegen_compile.backend import make_backend
    from hetegen_compile.segments import inductor_compiler, plain_compiler

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
    import torch

    for key, value in expected.items():
        try:
            torch.testing.assert_close(result[key], value, rtol=2e-4, atol=2e-4, equal_nan=True)
        except AssertionError as error:
            return "differs", f"{key}: {' '.join(str(error).split())[:REASON_CHARACTERS]}"
    if not expected["logits"].isfinite().any():
        return "differs", "eager gives nothing finite: no comparison"
    return "equal", ""


def _with_schedules(outcome: Outcome, schedules: Sequence[Any]) -> Outcome:
    reasons = Counter(f"{refusal.reason}" for schedule in schedules for refusal in schedule.refusals)
    return replace(
        outcome,
        on_host=sum("not offloaded" in schedule.title for schedule in schedules),
        split_bytes=sum(s.host_bytes + s.streamed_bytes + s.resident_bytes for s in schedules if s.tokens[0] <= 4),
        host_bytes=max((s.host_bytes for s in schedules), default=0),
        streamed_bytes=max((s.streamed_bytes for s in schedules), default=0),
        refusals=[reason[:REASON_CHARACTERS] for reason in reasons],
    )


def _reason(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:REASON_CHARACTERS]} ({place})"


# ---- all of them --------------------------------------------------------------------------------------------


def architectures(kind: str) -> list[str]:
    """Model types that transformers maps to a class of this kind."""
    from transformers.models.auto import modeling_auto

    mapping = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    return list(mapping[kind])


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; the exit status is 1 if something that eager can run differs or fails."""
    arguments = _arguments(argv)
    if arguments.one:
        logging.disable(logging.CRITICAL)
        with contextlib.redirect_stdout(sys.stderr):
            faulthandler.dump_traceback_later(0.9 * arguments.limit)
            started_s = time.perf_counter()
            outcome = measure(arguments.one, arguments.kind, arguments.cache, inductor=arguments.inductor)
            outcome = replace(outcome, seconds=round(time.perf_counter() - started_s, 1))
        print(json.dumps(asdict(outcome)))
        return 0
    outcomes = _load(arguments.json)
    done = {outcome.key for outcome in outcomes}
    names = arguments.only or architectures(arguments.kind)
    for name in names:
        if (name, arguments.kind, arguments.cache, arguments.inductor) not in done:
            outcomes.append(_in_a_process(name, arguments))
            print(_line(outcomes[-1]), flush=True)
            _store(arguments.json, outcomes)
    print(table(outcomes))
    return int(any(outcome.status in ("differs", "error", "time limit") for outcome in outcomes))


def _places(dump: str) -> list[str]:
    """Place and function of each frame that faulthandler wrote, innermost first, without this machine's folders."""
    frames = re.findall(r'^  File "(.+)", line (\d+) in (.+)$', dump, flags=re.MULTILINE)
    return ["{}:{} {}".format("/".join(Path(file).parts[-3:]), line, function) for file, line, function in frames]


def _in_a_process(name: str, arguments: argparse.Namespace) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.architectures", "--one", name, "--kind", arguments.kind]
    command += ["--limit", str(arguments.limit), "--cache", arguments.cache]
    command += ["--inductor"] if arguments.inductor else []
    blank = Outcome(name, arguments.kind, arguments.cache, "time limit", inductor=arguments.inductor)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=arguments.limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        detail = f"more than {arguments.limit:g} s; was at {'; '.join(_places(_text(error.stderr)))}"
        return replace(blank, detail=detail[:REASON_CHARACTERS], seconds=arguments.limit)
    if found.returncode != 0:
        lines = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
        return replace(blank, status="error", detail=lines[-1][:REASON_CHARACTERS])
    return Outcome(**json.loads(found.stdout.strip().splitlines()[-1]))


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _load(path: Path | None) -> list[Outcome]:
    if path is None or not path.exists():
        return []
    return [Outcome(**row) for row in json.loads(path.read_text())["outcomes"]]


def _store(path: Path | None, outcomes: Iterable[Outcome]) -> None:
    if path is not None:
        import torch
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        rows = [asdict(outcome) for outcome in outcomes]
        path.write_text(json.dumps({"versions": versions, "outcomes": rows}, indent=1))


def _line(outcome: Outcome) -> str:
    return f"{outcome.name} ({outcome.kind}, {outcome.cache}): {outcome.status} {outcome.detail}"


def table(outcomes: Sequence[Outcome]) -> str:
    """All rows, and how many there are of each status."""
    rows = [
        (o.name, o.kind, o.cache, o.status, o.graphs, o.on_host, o.host_bytes, o.streamed_bytes, o.seconds,
         (o.detail or "; ".join(o.refusals))[:100])
        for o in sorted(outcomes, key=lambda o: (o.status, o.name))
    ]  # fmt: skip
    headers = ("architecture", "kind", "cache", "status", "graphs", "on host", "host B", "streamed B", "s", "notes")
    counts = Counter(outcome.status for outcome in outcomes)
    return f"{tabulate(rows, headers)}\n\n{', '.join(f'{n} {status}' for status, n in counts.most_common())}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures (default: all of the kind)")
    parser.add_argument("--kind", choices=KINDS, default="causal")
    parser.add_argument("--cache", choices=CACHES, default="dynamic")
    parser.add_argument("--inductor", action="store_true", help="compile segments with Inductor")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each (default: 120)")
    parser.add_argument("--json", type=Path, help="keep finished rows here and go on from them")
    parser.add_argument("--one", metavar="NAME", help="this one, in this process; prints its row as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
