"""Experiments and benchmarks, one per file: `python -m pipelines.experiments NAME`."""
