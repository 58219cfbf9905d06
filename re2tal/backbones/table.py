"""Table of backbones: a name stands for a network, its input, and the weights that fit it.

A family is one module of this package, whose functions enter themselves:

    @backbone(weights=("torchvision:swin3d_t/KINETICS400_V1",), layouts=(VIDEO_SWIN,))
    def swin_t() -> SwinConfig:
        return SwinConfig()

Nothing else has to know of it: every script reads this table. A module of a user's own enters its
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

# Mean and deviation in the training of torchvision's video models.
IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Names that a library gives to the weights of a backbone.

    Attributes:
        title: readable name of the layout.
        mark: name that every such file has and no other; group 1 is the prefix of all names of
            the backbone, such as `backbone.`.
        rename: function from a name without its prefix to our name, or None if it is unknown.
        beside: name, without its prefix, that such a file has besides, where the mark alone is that
            of another layout, too; this one then comes before it.
        classifier: names of the classifier's weights if nothing sets them apart from the
            backbone's.
        outside: names of the weights of other parts, likewise.
        optional: our names of weights that some settings of the backbone do without, such as those
            of a way of pooling.
        computed: names of buffers that the backbone computes by itself.
        fused: names of weights that hold three of ours, one behind another; `rename` is asked for
            `NAME[0]`, `NAME[1]` and `NAME[2]` instead.
        may_lack: ends of the names of buffers that some versions did not write; the backbone keeps
            its own.
        note: further facts needed to use the weights.
        mean: mean of the frames of their training, if it is not ImageNet's.
        std: standard deviation of these frames, if it is not ImageNet's.
        objection: function that says why a backbone would compute something else with these weights
            than they were trained for, though they fit; None if it would not. It gets them by our
            names, and those that are left out by their own.
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
        input: "window" for any multiple of `Backbone.multiple` frames, "clip" for clips of a
            fixed length only, of which no detector can be made that sees long windows.
        mean: mean of red, green and blue in [0, 1] in its pretraining.
        std: standard deviation of the same colours.
        weights: names or paths of weights that fit it.
        layouts: layouts of files that others publish for it.
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
    """Enter the function below into the table, under its own name; arguments as in `Entry`."""

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
    """Return all entries by name: this package's, and those of other imported modules."""
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
