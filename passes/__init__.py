"""The compiler's passes, one file each; their order is in ``hetegen_compile/pipeline.py``."""
