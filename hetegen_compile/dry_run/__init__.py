"""Plans without running: for models on meta, for hardware one does not have."""

from hetegen_compile.dry_run.generation import plan_generation
from hetegen_compile.dry_run.generation_plan import Generation, GenerationPlan
from hetegen_compile.dry_run.planning import plan

__all__ = ["Generation", "GenerationPlan", "plan", "plan_generation"]
