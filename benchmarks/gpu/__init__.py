"""Everything that a machine with a GPU can answer in under eight minutes: no network, random weights.

    python -m benchmarks.gpu --out gpu        # a folder: result.json, logs, profile, traces

Stages run in processes of their own, each with a limit, so that a hang, a crash or an illegal access costs one stage;
``result.json`` is written anew whenever one ends, with the hardware line and what the stage had noted down until then.
First comes correctness (contact, generation, variants, mirrors, racecheck, steady), then measurements; ``--stages``
chooses others, by name or "correctness" or "speed", in the order that it gives. Exit status 1 if a stage of
correctness failed. ``--minutes`` bounds the whole; stages for which no time is left are named.

Without a GPU the same stages rehearse on the emulated accelerator with small sizes: what only a device can answer says
"needs a CUDA device", and times say nothing about speed.
"""
