"""What `memory.py` consists of: the memory of a training step, run in four ways."""
