"""Hyper-parameter searches: Ray Tune runs the trials, Optuna proposes them, MLflow records them."""
