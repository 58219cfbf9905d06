"""Temporal action localization trained end to end on long videos, with reversible backbones."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from re2tal.inference import detect
    from re2tal.reversible import rewire, unwire

    __version__: str

__all__ = ["__version__", "detect", "rewire", "unwire"]

_FUNCTIONS = {
    "detect": "re2tal.inference",
    "rewire": "re2tal.reversible",
    "unwire": "re2tal.reversible",
}
_MODULES = frozenset(module.name for module in iter_modules(__path__))


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that a process that only decodes video need not import torchvision.
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # without this file's imports and private names
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})


def _version() -> str:
    """Read the version of the installed package or, without one, of the checkout."""
    import tomllib  # imported here, because only this function needs them
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    try:
        return version(__name__)
    except PackageNotFoundError:
        stated = Path(__file__).parents[1] / "pyproject.toml"
        project: dict[str, str] = tomllib.loads(stated.read_text(encoding="utf-8"))["project"]
        return project["version"]
