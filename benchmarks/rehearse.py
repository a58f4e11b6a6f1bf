"""Trace and generate code for every segment of five models for CUDA, on a machine without a GPU.

    make rehearse        # its own environment with the CUDA wheel of torch (about 5 GB); not part of the tests

Each model generates a few tokens on the emulated accelerator (dynamic and static cache). Every schedule is
propagated for ``cuda:0``, and every different segment goes through Inductor with fake CUDA inputs up to the
generated Python and Triton source; nothing is compiled by Triton or run. What the driver would be asked for is
replaced by the figures of one GPU (``DEVICE``). A segment passes if source came out that launches on CUDA. This
is a rehearsal of tracing and code generation and not a run on a GPU: attention appears here as plain matrix
products, and no number says anything about speed. Exit status 1 if a segment fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import fx
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from benchmarks.arguments import output_file
from hetegen_compile.backend import make_backend
from hetegen_compile.errors import first_line
from hetegen_compile.ir import info
from hetegen_compile.passes.lower import segment_key
from hetegen_compile.passes.retarget_devices import CHECK_VARIABLE
from hetegen_compile.passes.tensors import tensors_in
from hetegen_compile.steps.segments import inductor_compiler, plain_compiler

_TOKENS: dict[str, Any] = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, **_TOKENS,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=8, **_SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=16, sliding_window=8, **_SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **_TOKENS)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=64, ffn_dim=128, num_attention_heads=4, word_embed_proj_dim=64, num_hidden_layers=2,
            max_position_embeddings=64, **_TOKENS,
        )
    ),
}  # fmt: skip
DEVICE = SimpleNamespace(
    name="rehearsed GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, gcnArchName="", L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, shared_memory_per_block=49152,
)  # fmt: skip
"""What the driver would say: an H100's figures, as torch names them."""


@dataclass(frozen=True)
class Rehearsed:
    """What became of the segments of one model and cache."""

    model: str
    cache: str
    schedules: int
    segments: int
    with_triton: int
    failures: tuple[str, ...]


class _Written(Exception):
    """Ends a compilation when its source is there; Inductor would load it, and Triton compile it, next."""


@contextlib.contextmanager
def as_if_on_a_gpu() -> Iterator[None]:
    """What Inductor asks the driver while it writes source."""
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 10 * DEVICE.major + DEVICE.minor, DEVICE.warp_size)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
    worker = CudaInterface.Worker
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": DEVICE,
        "get_device_capability": (DEVICE.major, DEVICE.minor), "synchronize": None, "_lazy_init": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
    }  # fmt: skip
    patches: list[Any] = [mock.patch(f"torch.cuda.{name}", return_value=value) for name, value in answers.items()]
    patches += [
        mock.patch.object(CudaInterface, "is_available", return_value=True),
        mock.patch.object(CudaInterface, "get_device_properties", return_value=DEVICE),
        mock.patch.object(CudaInterface, "get_compute_capability", return_value=90),
        mock.patch.object(worker, "get_device_properties", return_value=DEVICE),
        mock.patch.object(worker, "current_device", return_value=0),
        mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
        # ``torch.tensor(..., device="cuda")``, an empty cache: on a GPU it is made and moved while tracing, here the
        # move stays a fake, and tracing does not remember a constant's value, which lies on the GPU
        mock.patch("torch._subclasses.fake_tensor.FakeTensorMode.avoid_device_init", True),
        mock.patch("torch.fx.experimental.proxy_tensor.CONSTANT_NUMEL_LIMIT", -1),
        # builds its patterns (fused attention, padding) with real tensors on the GPU
        mock.patch("torch._inductor.fx_passes.joint_graph.lazy_init", return_value=None),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


@dataclass
class Rehearsal:
    """Writes the source of every different segment that schedules are lowered to."""

    written: dict[Hashable, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    schedules: int = 0

    def propagated(self, module: fx.GraphModule) -> None:
        """A schedule whose segments and notes have been moved to CUDA."""
        self.schedules += 1
        for call in module.graph.find_nodes(op="call_module"):
            segment = module.get_submodule(str(call.target))
            assert isinstance(segment, fx.GraphModule)
            key = segment_key(segment)
            if key not in self.written:
                self.written[key] = ""
                self._write(key, segment, f"{call.name} ({info(call).module})")

    def _write(self, key: Hashable, segment: fx.GraphModule, name: str) -> None:
        examples = [info(node).value for node in segment.graph.find_nodes(op="placeholder")]
        mode = next(tensor.fake_mode for tensor in tensors_in(examples))  # type: ignore[attr-defined]

        def codegen(graph: Any) -> None:
            self.written[key] = graph.codegen()[0].value
            raise _Written

        reason = "nothing was compiled"
        with as_if_on_a_gpu(), mock.patch("torch._inductor.graph.GraphLowering.compile_to_module", codegen):
            try:
                inductor_compiler(mode)(segment, examples)
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
        if not self.written[key]:
            self.failures.append(f"{name}: {reason}")


def rehearse(name: str, cache: str) -> Rehearsed:
    """Let one model generate on the emulated accelerator, and write the source of what CUDA would run."""
    rehearsal = Rehearsal()
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    options = {"accelerator": "emulated", "split": 0.5, "gpu_memory": nbytes * 3 // 4, "print_schedule": False}
    retargeted = sys.modules["hetegen_compile.passes.retarget_devices"]
    model.compile(backend=make_backend(plain_compiler), options=options)
    original = retargeted._retarget

    def moved(module: fx.GraphModule, device: torch.device) -> None:
        original(module, device)
        rehearsal.propagated(module)

    prompt = torch.randint(2, 256, (1, 7), generator=torch.Generator().manual_seed(1))
    with mock.patch.object(retargeted, "_retarget", moved), mock.patch.dict(os.environ, {CHECK_VARIABLE: "1"}):
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, min_new_tokens=3, do_sample=False,
            cache_implementation=None if cache == "dynamic" else cache,
        )  # fmt: skip
    sources = [source for source in rehearsal.written.values() if source]
    triton = sum("@triton" in source or "async_compile.triton" in source for source in sources)
    return Rehearsed(name, cache, rehearsal.schedules, len(rehearsal.written), triton, tuple(rehearsal.failures))


def main(argv: list[str] | None = None) -> int:
    """Rehearse every model with both caches and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rehearse", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--json", type=output_file, help="write the results here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = [rehearse(name, cache) for name in options.models for cache in ("dynamic", "static")]
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, GPU present: {torch.cuda.is_available()}")
    rows = [(r.model, r.cache, r.schedules, r.segments, r.with_triton, len(r.failures)) for r in found]
    print(tabulate(rows, ["model", "cache", "schedules", "different segments", "with Triton kernels", "failed"]))
    for failure in [f"{r.model}, {r.cache}: {failure}" for r in found for failure in r.failures]:
        print(failure)
    if options.json:
        options.json.write_text(json.dumps(list(map(asdict, found)), indent=1))
    return int(any(r.failures or not r.segments for r in found))


if __name__ == "__main__":
    sys.exit(main())
