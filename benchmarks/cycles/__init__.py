"""Random life cycles of compiled models, compared with eager twins.

    python -m benchmarks.cycles --seed 0 --cycles 20 --json cycles.json
    python -m benchmarks.cycles --seed 17 --cycles 1 --architecture bart --keep 0 2 5

A cycle takes a small random model of some architecture and does three to seven random things with it: generates in one
of the ways that people generate, on caches of any kind, its own or given ones that are cropped, reset or edited; writes
weights, changes their dtype, ties and unties them; copies the model, compiles it again under another budget, compiles
another one beside it, deletes it, resets Dynamo, interrupts a step. Everything is done to an eager twin as well, and
results must be the same; steps must stay within their budgets, stream what their schedules say and warn of nothing
that is not true; in the end nothing may be left.

Each cycle runs in a process of its own and follows from its seed alone. One that fails says what reproduces it;
``--keep`` leaves actions out and ``--minimise`` tries which are needed. Exit status 1 if one fails. Nothing here says
anything about speed.
"""
