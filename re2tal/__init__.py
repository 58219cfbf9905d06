"""Temporal action localization trained end to end on long videos, with reversible backbones."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from re2tal.reversible import rewire, unwire

__all__ = ["rewire", "unwire"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: a process that only decodes video should not have to import torchvision.
    if name in __all__:
        import re2tal.reversible

        return getattr(re2tal.reversible, name)
    raise AttributeError(f"module 're2tal' has no attribute {name!r}")
