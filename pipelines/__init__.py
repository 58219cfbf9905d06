"""Ray, MLflow and command lines around `re2tal`: what scales, tracks and is run by hand."""
