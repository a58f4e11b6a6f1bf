"""The same model, prompt and memory limit under hetegen and under what else there is.

    python -m benchmarks.compare --model opt-6.7b --dtype bfloat16 --gpu-memory 4GiB 8GiB --json compare.json

The model has a published shape and random weights that are made on the spot. Every way runs in a process of its own
(hetegen's own share one: they are schedules of one compilation, with peaks of their own):

    hetegen          the plan of the cost model
    hetegen, ...     on CUDA: the same issued ahead of a worker, or in turn: what ``issue_ahead="auto"`` has not chosen
    all streamed     the same residency, everything else streamed ahead (``override_split(0.0)``)
    host rows        every Linear computed on the host, the rest on the accelerator (``override_split(1.0)``)
    CPU, Inductor    ``torch.compile`` on the host alone
    Accelerate       ``cpu_offload``: module by module, whatever the limit is
    Accelerate map   a device map that fills the limit, the rest offloaded
    diffusers        group offloading of leaf modules with streams, whatever the limit is
    eager GPU        the whole model on the device, if it fits there; the limit does not hold for it

Tokens/s are those of a generation after one that warms up, by the times at which its tokens come out. Without a GPU
hetegen's three splits run on the emulated accelerator, its lanes paced to a hardware profile: ratios between them mean
something, speeds do not; what cannot be emulated is listed with what the cost model predicts for it.
"""
