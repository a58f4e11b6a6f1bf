"""Steps: a lowered schedule bound to an accelerator as straight-line code, and run.

bind            a schedule becomes a function; ``bound_step`` is what can be called
step_source     the function's text
chains          launches that follow each other, which CUDA issues as one graph
host_runs       what the host computes between two crossings, one native program; ``host_functions`` is the rest
last_uses       when a step lets go of its values
segments        compilers of segments: Inductor, and plain FX for tests
captured_graph  a graph as Dynamo captured it, and what it tells about the inputs that it will be called with
results         what Dynamo reads of results beside their values
step_plans      the plans of one captured graph: by bucket, model and split
step_plan       one of them, what it counts on, and whether that still holds
step_values     the device values of a plan's inputs
carried         prefetches that one step has started for the next
run_step        one step, and what is put right when it fails half-way
undo            what makes a failed step safe to run again
"""
