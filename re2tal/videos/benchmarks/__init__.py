"""What decoding and augmentation cost: ``python -m re2tal.videos.benchmarks``."""
