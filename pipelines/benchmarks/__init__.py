"""How fast frames reach the training; ``python -m pipelines.benchmarks`` measures it."""
