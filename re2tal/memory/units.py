"""The unit in which memory is logged."""

MEGABYTE = 10**6
"""Bytes; metrics named ``..._mb`` are in this unit."""
