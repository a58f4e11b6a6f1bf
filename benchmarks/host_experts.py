"""A mixture's experts on the host: our kernels against torch's grouped product and the read rate of memory.

    python -m benchmarks.host_experts --threads 1 --json host_experts.json

Stacks have the shapes of known models. In each call other experts have tokens (drawn with a fixed seed: each token
has different ones, as a router gives them), so nothing lies in a cache. Rates are of the bytes of the experts that have
tokens, each counted once; the read rate of memory is measured again beside each figure, as in ``host_linear``.

``torch``: ``torch._grouped_mm`` on bfloat16, transformers' own operation else, as transformers calls them.
``gathered``: the experts' matrices are copied for each token and multiplied as a batch (transformers' ``batched_mm``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from tabulate import tabulate
from torch import Tensor

from benchmarks.arguments import output_file
from benchmarks.host_linear import Reader, beside_reads, fastest_reader
from hetegen_compile.calibration import Effort, this_machine
from hetegen_compile.calibration.timing import durations_s, plain_torch
from hetegen_compile.cost_model import KernelChoice
from hetegen_compile.host_kernels import TILED, TILED_THROUGH_L2, VECTORISED, bind_experts

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [tokens, in], matrices [experts, in, out], ends [experts]) -> [tokens, out]."""


@dataclass(frozen=True)
class Stack:
    """One parameter of a mixture. ``out_in``: each expert's matrix is stored [out, in]."""

    experts: int
    per_token: int
    inputs: int
    outputs: int
    out_in: bool = True


STACKS = {
    "mixtral-8x7b gate_up": Stack(8, 2, 4096, 28672),
    "mixtral-8x7b down": Stack(8, 2, 14336, 4096),
    "qwen3-30b-a3b gate_up": Stack(128, 8, 2048, 1536),
    "qwen3-30b-a3b down": Stack(128, 8, 768, 2048),
    "gpt-oss-20b gate_up": Stack(32, 4, 2880, 5760, out_in=False),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Figure:
    """One way at one point: medians over calls of bytes per second, and over rounds of its share of the read rate."""

    stack: str
    dtype: str
    tokens: int
    way: str
    bytes_per_s: float
    read_share: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    effort = Effort(budget_s=arguments.budget)
    with plain_torch():
        reader = fastest_reader(effort)
        figures = [
            figure
            for dtype in arguments.dtypes
            for name in arguments.stacks
            for figure in measure(name, STACKS[name], dtype, arguments, reader, effort)
        ]
    hardware = f"{this_machine(cuda=False)}; {arguments.rounds} rounds, wall time; {datetime.date.today()}"
    print(f"{table(figures)}\n\nread rate of memory: {reader.bytes_per_s / 1e9:.1f} GB/s ({reader.name})\n{hardware}")
    if arguments.json:
        data = {"hardware": hardware, "figures": [asdict(figure) for figure in figures]}
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


def measure(
    name: str, stack: Stack, dtype: str, arguments: argparse.Namespace, reader: Reader, effort: Effort
) -> Iterator[Figure]:
    """All ways of a stack at all numbers of tokens."""
    matrices = _matrices(stack, DTYPES[dtype])
    for tokens in arguments.tokens:
        choices = [_routed(stack, tokens, seed) for seed in range(64)]
        x = torch.full((tokens * stack.per_token, stack.inputs), 0.5, dtype=DTYPES[dtype])
        for way, product in _ways(dtype, matrices):
            rounds = [_round(product, x, matrices, choices, reader, effort) for _ in range(arguments.rounds)]
            rate, share = (statistics.median(one) for one in zip(*rounds, strict=True))
            yield Figure(name, dtype, tokens, way, rate, share)


def _matrices(stack: Stack, dtype: torch.dtype) -> Tensor:
    """[experts, in, out]; not zero, which some processors multiply faster."""
    stored = (stack.outputs, stack.inputs) if stack.out_in else (stack.inputs, stack.outputs)
    matrices = torch.full((stack.experts, *stored), 0.01, dtype=dtype)
    return matrices.transpose(1, 2) if stack.out_in else matrices


def _routed(stack: Stack, tokens: int, seed: int) -> Tensor:
    """Where each expert's tokens end, int32."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(stack.experts, generator=generator)[: stack.per_token] for _ in range(tokens)]
    return torch.bincount(torch.cat(chosen), minlength=stack.experts).cumsum(0).to(torch.int32)


def _ways(dtype: str, matrices: Tensor) -> Iterator[tuple[str, Product]]:
    theirs: Product = _torchs if dtype == "bfloat16" else torch.ops.transformers.grouped_mm_fallback
    for kernel in (VECTORISED, TILED, TILED_THROUGH_L2):
        ours = bind_experts(theirs, {dtype: KernelChoice(((1.0, kernel.name),))}, matrices)
        if ours is not None:
            yield kernel.name, ours
    yield "torch", theirs
    yield "gathered", _gathered


def _torchs(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, matrices, offs=ends)


def _gathered(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    expert = torch.repeat_interleave(torch.arange(len(ends)), _counts(ends))
    return torch.bmm(x.unsqueeze(1), matrices[expert]).squeeze(1)


def _counts(ends: Tensor) -> Tensor:
    return torch.diff(ends, prepend=ends.new_zeros(1))


def _round(
    product: Product, x: Tensor, matrices: Tensor, choices: Sequence[Tensor], reader: Reader, effort: Effort
) -> tuple[float, float]:
    """(the way's rate, its share of the read rate) of one round."""
    each = matrices[0].numel() * matrices.element_size()
    nbytes = statistics.mean(int((_counts(ends) > 0).sum()) * each for ends in choices)
    run = partial(_call, product, x, matrices, choices)
    calls, read_rate = beside_reads(lambda: durations_s(run, effort), reader, effort)
    rate = nbytes / statistics.median(calls)
    return rate, rate / read_rate


def _call(product: Product, x: Tensor, matrices: Tensor, choices: Sequence[Tensor], index: int) -> Tensor:
    return product(x, matrices, choices[index % len(choices)])


def table(figures: Sequence[Figure]) -> str:
    """Rows by stack and way, a column for each number of tokens: GB/s and the share of the read rate."""
    tokens = sorted({figure.tokens for figure in figures})
    cells = {(f.dtype, f.stack, f.way, f.tokens): f"{f.bytes_per_s / 1e9:.1f} ({f.read_share:.0%})" for f in figures}
    keys = dict.fromkeys((f.dtype, f.stack, f.way) for f in figures)
    rows = [(*key, *(cells.get((*key, count), "") for count in tokens)) for key in keys]
    headers = ["dtype", "stack", "way", *(f"{count} token{'s' * (count > 1)}, GB/s (of read)" for count in tokens)]
    return str(tabulate(rows, headers=headers, disable_numparse=True))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_experts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16"], help="of the experts")
    parser.add_argument("--stacks", nargs="+", choices=list(STACKS), default=list(STACKS), help="default all")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4], help="of a step, default 1 2 4")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each figure")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds for each measurement")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
