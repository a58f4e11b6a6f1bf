"""Plans without running: for models on meta, for hardware one does not have."""

from hetegen_compile.dry_run.planning import plan

__all__ = ["plan"]
