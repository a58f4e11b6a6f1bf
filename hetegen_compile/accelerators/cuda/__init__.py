"""A CUDA device as accelerator.

Run on an H200 by benchmarks/gpu (results/gpu_h200.md says what was checked, and at which commit). Tests run it against
stand-ins only.

    accelerator     the contract's methods: memory, steps, launches, life
    streams         compute, up and down; errors that name a node
    replays         launches that follow each other as CUDA graphs
    prefetches      weights on their way up, both rings
    activations     trips down and up
    transfers       what a schedule holds: started copies, tokens
    gates, ahead    work issued ahead of what the worker, a thread of the host, computes
    staging         the pin thread, which fills the pinned ring
    pinning         host memory registered in place; device views of pinned buffers
    lending         pinned buffers of small uploads, used again and again
    copies          2-D copies of columns
    allocator       what takes device memory beside tensors
    trace           spans from pairs of events
"""

from hetegen_compile.accelerators.cuda.accelerator import CudaAccelerator
from hetegen_compile.accelerators.cuda.allocator import beside_allocator_bytes, cublas_workspace_bytes

__all__ = ["CudaAccelerator", "beside_allocator_bytes", "cublas_workspace_bytes"]
