"""Stage ``captured``: is a chain of segments and Linears cheaper to issue as CUDA graphs? Nothing else uses it.

Between two trips to the host a step launches a join, a segment and some Linears. The chain here is made of such links,
compiled by Inductor, with weights that stay on the device; it is issued call by call and as CUDA graphs of 1, 2, 4
and all links. What decides is ``issue_s_per_link``, the host thread's seconds, beside ``seconds_per_link`` with the
device's work in it. Where a graph of one or two links saves less than a few microseconds, capturing is not worth its
conditions (fixed addresses of slots, mirrors and results).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.children import Notebook
from benchmarks.gpu.gated import gates
from benchmarks.gpu.settings import Settings, device_of

LINKS = 64
GRAPH_LINKS = (1, 2, 4, LINKS)
WIDTH = 4096
_REPEATS = 20

Link = Callable[[Tensor], Tensor]


def captured(settings: Settings, notebook: Notebook) -> None:
    """Note seconds a link, issued one by one and captured, and whether the results are bit-identical."""
    device = device_of(settings)
    notebook.note("gates", gates(device))
    torch.manual_seed(0)
    with torch.no_grad():
        links = make_links(device)
        x = torch.randn((1, WIDTH), dtype=torch.bfloat16, device=device)
        expected = _chain(links, x)
        notebook.note("one by one", timed(lambda: _chain(links, x), len(links)))
        for count in GRAPH_LINKS:
            graphs, result = capture(links, x, count)
            figures = timed(partial(_replay, graphs), len(links))
            notebook.note(f"graphs of {count}", {**figures, "same_result": torch.equal(result, expected)})


def make_links(device: torch.device) -> list[Link]:
    """Links with a Linear each and one compiled segment that they share."""
    weights = [torch.randn((WIDTH, WIDTH), dtype=torch.bfloat16, device=device) * WIDTH**-0.5 for _ in range(4)]
    segment = torch.compile(_segment, fullgraph=True)
    return [_link(segment, weights[i % len(weights)]) for i in range(LINKS)]


def _segment(x: Tensor, y: Tensor) -> Tensor:
    half = WIDTH // 2
    joined = torch.cat([y[:, :half], y[:, half:]], dim=1)
    return F.rms_norm(x + F.silu(joined), (WIDTH,))


def _link(segment: Callable[..., Any], weight: Tensor) -> Link:
    return lambda x: segment(x, F.linear(x, weight))


def _chain(links: Sequence[Link], x: Tensor) -> Tensor:
    for link in links:
        x = link(x)
    return x


def capture(links: Sequence[Link], x: Tensor, count: int) -> tuple[list[torch.cuda.CUDAGraph], Tensor]:
    """The chain as graphs of so many links each, and the tensor that the last of them writes."""
    _chain(links, x)
    torch.cuda.synchronize(x.device)
    graphs = []
    for start in range(0, len(links), count):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x = _chain(links[start : start + count], x)
        graphs.append(graph)
    _replay(graphs)
    torch.cuda.synchronize(x.device)
    return graphs, x


def _replay(graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
    for graph in graphs:
        graph.replay()


def timed(work: Callable[[], object], links: int) -> dict[str, float]:
    """Median seconds a link: of the issuing thread, and until the device is done."""
    issued, done = [], []
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        issued.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        done.append(time.perf_counter() - started)
    return {"issue_s_per_link": statistics.median(issued) / links, "seconds_per_link": statistics.median(done) / links}
