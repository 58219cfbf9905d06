"""Checks that the localizers' settings have in common."""

from __future__ import annotations


def check_at_least(settings: object, **least: int) -> None:
    """Refuses settings that are too small.

    Args:
        settings: a dataclass.
        least: names of its fields, and of each the smallest value that works.

    Raises:
        ValueError: If a field is smaller.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value < bound:
            raise ValueError(f"{name} must be at least {bound}, but is {value}.")
