"""Everything that measures, one experiment per file: `python -m pipelines.experiments NAME`."""
