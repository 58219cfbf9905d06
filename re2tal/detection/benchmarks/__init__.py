"""How fast post-processing and evaluation are, against their sequential definitions."""
