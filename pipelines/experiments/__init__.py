"""All that measures, an experiment a file; `python -m pipelines.experiments` runs one by name."""
