"""``hetegen bench``: a model's shape with random weights, measured on this machine's accelerator."""

from hetegen_compile.bench.measure import SPLITS, Measured, Way, bench, measure_splits
from hetegen_compile.bench.report import bench_json, bench_report

__all__ = ["SPLITS", "Measured", "Way", "bench", "bench_json", "bench_report", "measure_splits"]
