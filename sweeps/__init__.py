"""Searches of hyper-parameters: Ray Tune runs the trials, Optuna proposes, MLflow compares."""
