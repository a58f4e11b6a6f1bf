"""From a captured graph to schedules: one plan for each bucket of tokens, a schedule for each split. Nothing runs here.

planner        what the backend asks for a plan, and ``hetegen plan``, too
buckets        which bucket of tokens a forward belongs to
size_limits    how large a graph's sizes get: no plan keeps room for more
within_budget  a residency that leaves room for its own schedule
trips          what goes to the host and back, as a chain for the balance and as rows of its Linears
balance        the split of all Linears together
share_search   the search for the trips' shares, and ``share_ways``, what it tries
trials         schedules that are made to be simulated, each once
planned        what a plan is made for, and what planning leaves
room           how much of the accelerator a plan's steps may use
floor          seconds that no schedule comes below; ``floor_path`` and ``floor_ring`` are two of its bounds
baselines      what a step would take done otherwise
plan_report    the report on what was planned
"""
