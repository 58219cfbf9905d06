"""Training: the loop, its two tasks, checkpoints, and the workers of Ray Train."""
