"""Table of backbones: name -> configuration, input, and weights that fit.

A family is one module of this package, whose functions register themselves:

    @backbone(weights=("torchvision:swin3d_t/KINETICS400_V1",), layouts=(VIDEO_SWIN,))
    def swin_t() -> SwinConfig:
        return SwinConfig()

Nothing else needs to change: every script reads this table. A user's own module registers its
backbones in the same way, and is imported with `--import my_module`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Literal, TypeVar

from torch import Tensor, nn

from re2tal.backbones.protocol import BackboneConfig
from re2tal.errors import UserError
from re2tal.weights import Colour

# ImageNet's mean and standard deviation, also of torchvision's Video Swins.
IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Names that a library gives to the weights of a backbone.

    Attributes:
        title: readable name of the layout.
        mark: name that identifies such a file; group 1 is the prefix of all names of the backbone,
            such as `backbone.`.
        rename: function from a name without its prefix to our name, or None if it is unknown.
        beside: second name, without its prefix, that must be in the file if the mark also fits
            another layout; a layout with a second name takes precedence over one without.
        classifier: names of the classifier's weights, if they have the backbone's prefix.
        outside: names of the weights of other parts, likewise.
        optional: our names of weights that the backbone has only with some settings, such as those
            of one kind of pooling.
        computed: names of buffers that the backbone computes by itself.
        fused: names of weights that hold three of ours, concatenated; `rename` gets `NAME[0]`,
            `NAME[1]` and `NAME[2]` instead.
        may_lack: suffixes of buffers that some versions did not write; the backbone keeps its own.
        note: further facts needed to use the weights.
        mean: mean of the frames in training, if it is not ImageNet's.
        std: standard deviation of these frames, likewise.
        objection: function that explains why a backbone with these weights, although they fit,
            would not compute the function of their training; None if it would. It gets the loaded
            weights by our names, and those that are left out by the file's.
    """

    title: str
    mark: re.Pattern[str]
    rename: Callable[[str], str | None]
    beside: str | None = None
    classifier: re.Pattern[str] | None = None
    outside: re.Pattern[str] | None = None
    optional: re.Pattern[str] | None = None
    computed: re.Pattern[str] | None = None
    fused: re.Pattern[str] | None = None
    may_lack: tuple[str, ...] = ()
    note: str = ""
    mean: Colour | None = None
    std: Colour | None = None
    objection: Callable[[nn.Module, Mapping[str, Tensor]], str | None] = lambda *_: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Named backbone.

    Attributes:
        name: name on command lines.
        make: function that returns its configuration.
        input: "window" for any multiple of `Backbone.multiple` frames, "clip" for clips of a fixed
            length only, which rules out detectors of long windows.
        mean: mean of red, green and blue in [0, 1] in its pretraining.
        std: standard deviation of the same colours.
        weights: names or paths of weights that fit the backbone.
        layouts: layouts of published files that fit the backbone.
    """

    name: str
    make: Callable[[], BackboneConfig]
    input: Literal["clip", "window"] = "window"
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    weights: tuple[str, ...] = ()
    layouts: tuple[Layout, ...] = ()


_ENTRIES: dict[str, Entry] = {}
MakeT = TypeVar("MakeT", bound=Callable[[], BackboneConfig])


def backbone(
    *,
    input: Literal["clip", "window"] = "window",  # noqa: A002 - the name of the field
    mean: Colour = IMAGENET_MEAN,
    std: Colour = IMAGENET_STD,
    weights: tuple[str, ...] = (),
    layouts: tuple[Layout, ...] = (),
) -> Callable[[MakeT], MakeT]:
    """Register the decorated function in the table, under its name; arguments as in `Entry`."""

    def enter(make: MakeT) -> MakeT:
        _ENTRIES[make.__name__] = Entry(
            name=make.__name__,
            make=make,
            input=input,
            mean=mean,
            std=std,
            weights=weights,
            layouts=layouts,
        )
        return make

    return enter


def backbones() -> Mapping[str, Entry]:
    """Return all entries by name: those of this package and of other imported modules."""
    for module in iter_modules([str(Path(__file__).parent)], f"{__package__}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    return _ENTRIES


def entry_of(name: str) -> Entry:
    """Return the entry of a name.

    Raises:
        UserError: there is none.
    """
    known = backbones()
    if name not in known:
        raise UserError(f"There is no backbone {name!r}. Choose one of: {', '.join(known)}.")
    return known[name]
