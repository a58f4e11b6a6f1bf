"""Text from a real language model under a memory budget that it does not fit, with what hetegen decided.

    python -m examples.generate [--prompt TEXT] [--gpu-memory 200MiB] [--hardware PROFILE]

Answers a chat prompt with SmolLM2-135M-Instruct through ``torch.compile``'s backend ``hetegen``, shows the
schedule, compares the tokens with eager's and the measured speed of three ways to run the same capture with what
the cost model predicts for each. Where there is a GPU it runs there, with what a calibration measured; elsewhere
the emulated accelerator is paced to a profile.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from tabulate import tabulate
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import hetegen_compile
from examples.models import encode_chat, load_smollm2
from hetegen_compile.errors import HetegenError

COMPARED_TOKENS = 8
WAYS: tuple[tuple[str, float | Literal["auto"]], ...] = (
    ("all streamed", 0.0), ("all Linears on the host", 1.0), ("split", "auto"),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns 0 if the tokens are eager's, 2 if an option is wrong."""
    args = _arguments(argv)
    try:
        return _demonstrate(args)
    except HetegenError as error:
        print(f"\nhetegen: {error}", file=sys.stderr)
        return 2


def _demonstrate(args: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tqdm(total=3, desc="loading the model", bar_format="{desc:40} {bar:20} {n}/{total} steps") as progress:
        model, tokenizer = load_smollm2()
        prompt = encode_chat(tokenizer, [args.prompt])
        progress.update()
        progress.set_description("eager, for comparison")
        eager = _generate(model, prompt, args.max_new_tokens)
        progress.update()
        progress.set_description("capture, plan and compile (hetegen)")
        _compile(model, args)
        _generate(model, prompt, 2)  # prefill and decode are captured here, so that the text below streams
        progress.update()
    text = _answer(model, tokenizer, prompt, args.max_new_tokens)
    same = torch.equal(text, eager)
    _report(same, args)
    _compare(lambda: _generate(model, prompt, COMPARED_TOKENS), args.pace)
    return 0 if same else 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="What is the capital of France? And what is it known for?")
    parser.add_argument("--gpu-memory", default="200MiB", help="budget on the accelerator (the model has 513 MiB)")
    parser.add_argument("--hardware", help="profile that the plan is made for (a GPU: auto, else rtx3060-laptop)")
    parser.add_argument("--pace", type=float, help="emulated only: times the profile's seconds (20)")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    args.hardware = args.hardware or ("auto" if cuda else "rtx3060-laptop")
    args.pace = args.pace if cuda or args.pace is not None else 20.0
    return args


def _compile(model: PreTrainedModel, args: argparse.Namespace) -> None:
    options = {"gpu_memory": args.gpu_memory, "hardware": args.hardware, "pace": args.pace, "print_schedule": False}
    model.compile(backend="hetegen", options=options)


def _generate(model: PreTrainedModel, prompt: dict[str, Any], new_tokens: int, **more: Any) -> torch.Tensor:
    """Token ids of the greedy answer, [1, prompt + new]."""
    result: torch.Tensor = model.generate(  # type: ignore[operator]
        **prompt, max_new_tokens=new_tokens, do_sample=False, cache_implementation="static", **more
    )
    return result


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: dict[str, Any], new_tokens: int
) -> torch.Tensor:
    print("\nanswer: ", end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return _generate(model, prompt, new_tokens, streamer=streamer)


def _report(same: bool, args: argparse.Namespace) -> None:
    schedule = _decode_schedule("auto")
    print(f"\n{schedule.table()}\n")
    print(f"backend:      hetegen, options gpu_memory={args.gpu_memory}, hardware={args.hardware}")
    peak, budget = schedule.accelerator_peak_bytes / 2**20, schedule.budget_bytes / 2**20
    print(f"memory:       peak {peak:.1f} MiB of {budget:.1f} MiB on the accelerator")
    print(f"tokens:       {'identical to' if same else 'DIFFERENT FROM'} eager's")
    if args.pace is not None:
        print(
            "accelerator:  emulated on this machine's CPU. It checks that the schedule is right and says nothing\n"
            f"              about speed: below, its lanes are paced to {args.pace:g} times the seconds of the\n"
            f"              profile {args.hardware}, so only ratios mean something (the table's measured\n"
            "              column is at that pace)."
        )
    else:
        print(f"accelerator:  {torch.cuda.get_device_name()}")


def _decode_schedule(split: float | Literal["auto"]) -> hetegen_compile.Schedule:
    """The newest plan for one token a forward that was made with ``split``."""
    found = [s for s in hetegen_compile.schedules() if s.tokens == (1, 1) and s.split == split]
    return found[-1]


def _compare(generate: Callable[[], torch.Tensor], pace: float | None) -> None:
    """Decode a few tokens each way, from one capture and one set of compiled segments."""
    rows = []
    title = f"three ways, {COMPARED_TOKENS} tokens each"
    for name, split in tqdm(WAYS, desc=title, bar_format="{desc:40} {bar:20} {n}/3"):
        with hetegen_compile.override_split(split):
            generate()
        schedule = _decode_schedule(split)
        measured, predicted = schedule.measured_step_s, schedule.predicted_step_s * (pace or 1)
        rows.append((name, _per_second(predicted), _per_second(measured), _ratio(measured, predicted)))
    print()
    how = "decode" if pace is None else "decode, emulated and paced"
    print(tabulate(rows, headers=(how, "predicted", "measured", "measured / predicted"), disable_numparse=True))


def _per_second(step_s: float | None) -> str:
    return "not measured" if not step_s else f"{1 / step_s:.2f} tokens/s"


def _ratio(measured_s: float | None, predicted_s: float) -> str:
    return "" if not measured_s else f"{predicted_s / measured_s:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
