"""The compiler's passes, one file each; their order is in ``hetegen_compile/pipeline.py``."""

from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.capture import capture
from hetegen_compile.passes.carry_prefetches import carry_prefetches
from hetegen_compile.passes.choose_residency import choose_residency
from hetegen_compile.passes.choose_splits import choose_splits
from hetegen_compile.passes.choose_staging import choose_staging
from hetegen_compile.passes.find_blocks import find_blocks
from hetegen_compile.passes.fold_gelu import fold_gelu
from hetegen_compile.passes.group_segments import group_segments
from hetegen_compile.passes.insert_transfers import insert_transfers
from hetegen_compile.passes.issue_ahead import issue_ahead
from hetegen_compile.passes.lower import lower
from hetegen_compile.passes.measure_memory import measure_memory
from hetegen_compile.passes.normalise_linears import normalise_linears
from hetegen_compile.passes.note_effects import note_effects
from hetegen_compile.passes.place_nodes import place_nodes
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.passes.resolve_sizes import resolve_sizes
from hetegen_compile.passes.retarget_devices import retarget_devices
from hetegen_compile.passes.schedule import schedule
from hetegen_compile.passes.split_experts import split_experts
from hetegen_compile.passes.split_linears import split_linears
from hetegen_compile.passes.stream_experts import stream_experts
from hetegen_compile.passes.verify import verify

__all__ = [
    "annotate_costs",
    "capture",
    "carry_prefetches",
    "choose_residency",
    "choose_splits",
    "choose_staging",
    "find_blocks",
    "fold_gelu",
    "group_segments",
    "insert_transfers",
    "issue_ahead",
    "lower",
    "measure_memory",
    "normalise_linears",
    "note_effects",
    "place_nodes",
    "predict_step",
    "resolve_sizes",
    "retarget_devices",
    "schedule",
    "split_experts",
    "split_linears",
    "stream_experts",
    "verify",
]
