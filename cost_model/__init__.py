"""The cost model: pure arithmetic from work and hardware to seconds. No torch, no state.

``hardware`` says what a machine can do (``profile_json`` loads it), ``roofline`` turns work into seconds,
``split`` divides a Linear between host and link, ``chain`` balances those of a step, ``lead`` and ``ring`` know that
the link runs ahead by a staging ring at most, ``timeline`` simulates a step.
"""

from hetegen_compile.cost_model.chain import Chain, Relaxation, Trip, balance_along, relax, spread_order
from hetegen_compile.cost_model.hardware import (
    SCHEMA_VERSION,
    AcceleratorProfile,
    HardwareProfile,
    HostProfile,
    KernelChoice,
    LinkDirection,
    LinkProfile,
    RateCurve,
    RateTable,
)
from hetegen_compile.cost_model.lead import least_step_s, shares_with_ring
from hetegen_compile.cost_model.profile_json import (
    load_profile,
    preset_names,
    profile_from_json,
    profile_to_json,
    unsourced_fields,
)
from hetegen_compile.cost_model.ring import Leg, legs_of, step_with_ring
from hetegen_compile.cost_model.roofline import (
    accelerator_linear_s,
    accelerator_op_s,
    arithmetic_rate,
    download_s,
    host_linear_s,
    host_op_s,
    item_bytes,
    linear_rate,
    link_lost_s,
    operation_s,
    read_up_s,
    upload_s,
)
from hetegen_compile.cost_model.split import (
    SplitProblem,
    SplitSolution,
    balance_expressions,
    row_granularity,
    solve_split,
)
from hetegen_compile.cost_model.timeline import Task, Timeline, simulate

__all__ = [
    "SCHEMA_VERSION",
    "AcceleratorProfile",
    "Chain",
    "HardwareProfile",
    "HostProfile",
    "KernelChoice",
    "Leg",
    "LinkDirection",
    "LinkProfile",
    "RateCurve",
    "RateTable",
    "Relaxation",
    "SplitProblem",
    "SplitSolution",
    "Task",
    "Timeline",
    "Trip",
    "accelerator_linear_s",
    "accelerator_op_s",
    "arithmetic_rate",
    "balance_along",
    "balance_expressions",
    "download_s",
    "host_linear_s",
    "host_op_s",
    "item_bytes",
    "least_step_s",
    "legs_of",
    "linear_rate",
    "link_lost_s",
    "load_profile",
    "operation_s",
    "preset_names",
    "profile_from_json",
    "profile_to_json",
    "read_up_s",
    "relax",
    "row_granularity",
    "shares_with_ring",
    "simulate",
    "spread_order",
    "step_with_ring",
    "solve_split",
    "unsourced_fields",
    "upload_s",
]
