"""Modules that all scripts share: storage, Ray, MLflow, progress, pictures."""
