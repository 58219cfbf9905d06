"""Temporal action localization trained end to end on long videos, with reversible backbones."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from re2tal.inference import detect
    from re2tal.reversible import rewire, unwire

__version__ = "0.2.0"

__all__ = ["__version__", "detect", "rewire", "unwire"]

_MODULES = {
    "detect": "re2tal.inference",
    "rewire": "re2tal.reversible",
    "unwire": "re2tal.reversible",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: a process that only decodes video should not have to import torchvision.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 're2tal' has no attribute {name!r}")
