"""Families of blocks of other libraries, each in a file of its own.

A library is not imported to know its blocks: `load_families` reads only the files of the library
that a class at hand comes from.
"""

from importlib import import_module

_FILES = {
    "torchvision.models": ("mvit", "swin", "video_resnet", "vision_transformer"),
    "timm.models": ("timm",),
    "transformers.models": ("transformers",),
}


def load_families(cls: type) -> None:
    """Register the families of the library that a class, or one that it derives from, belongs to.

    To be called before asking `branches`, `returned` or `recomputed` about a module of the class.
    Calling it again costs nothing.

    Args:
        cls: class of a module.
    """
    for base in cls.__mro__:
        package = ".".join(base.__module__.split(".")[:2])
        for name in _FILES.get(package, ()):
            import_module(f"{__name__}.{name}")
        if package == "transformers.models":
            import_module(f"{__name__}.transformers").register(base)
