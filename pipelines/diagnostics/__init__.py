"""Checks of `pipelines/doctor.py`: nodes return facts; functions without a cluster judge them."""
