"""Loading of a localizer's weights, from a detector of this project or its authors' release."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from re2tal.weights import WeightsMismatchError, WeightsReport, read_tensors

_PREFIX = "module."  # DataParallel's prefix of every name
_OURS = "localizer."  # prefix of the localizer's weights in a saved detector


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Names of a localizer's weights in its authors' release.

    A localizer with a release returns this object from a method `published`.

    Attributes:
        title: name of the release in messages.
        names: for each of our names, the release's names: one; several, whose scalars are stacked;
            or none, when our value is kept.
        left_out: prefixes of the release's tensors that follow from the configuration and are
            not loaded.
    """

    title: str
    names: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """Apply regular expressions and their replacements to a name, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def load_localizer_weights(localizer: nn.Module, path: str | Path) -> WeightsReport:
    """Load weights into a localizer that was built with the settings of their training.

    Args:
        localizer: module that receives the weights.
        path: a file that `read_tensors` reads: a detector of this project (`weights.safetensors`),
            a localizer alone, or a checkpoint of the authors' release.

    Raises:
        ValueError: the file cannot be read, or weights are missing, unknown or of another shape:
            then a `WeightsMismatchError` lists all of them, and nothing is loaded.
    """
    return place(localizer, read_tensors(Path(path)), what=f"The weights in {path}")


def place(localizer: nn.Module, state: Mapping[str, Tensor], *, what: str) -> WeightsReport:
    """Load weights from memory; see `load_localizer_weights`.

    Args:
        localizer: module that receives the weights.
        state: weights by their names in the file.
        what: subject of error messages, in the plural, such as "The weights in FILE".
    """
    own = localizer.state_dict()
    # The layout shows in the names: "localizer." is a detector, no name in common a release.
    given = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    layout = Published(title="names of this localizer", names={name: (name,) for name in own})
    left_out = {}
    if any(name.startswith(_OURS) for name in given):
        left_out = {n: "not of the localizer" for n in given if not n.startswith(_OURS)}
        given = {n.removeprefix(_OURS): v for n, v in given.items() if n not in left_out}
    elif not given.keys() & own.keys():
        layout = getattr(localizer, "published", lambda: layout)()
        left_out = {
            n: "follows from the configuration" for n in given if n.startswith(layout.left_out)
        }
    given = {name: value for name, value in given.items() if name not in left_out}
    if problems := list(_problems(layout, own, given)):
        raise WeightsMismatchError(what, localizer, problems)
    placed = {name: theirs for name, theirs in layout.names.items() if theirs}
    localizer.load_state_dict(
        own
        | {
            name: torch.cat([given[n].flatten() for n in theirs]).view_as(own[name])
            for name, theirs in placed.items()
        }
    )
    return WeightsReport(
        layout=layout.title,
        placed={n: name for name, theirs in placed.items() for n in theirs},
        left_out=left_out,
        kept=[name for name, theirs in layout.names.items() if not theirs],
    )


def _problems(
    layout: Published, own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> Iterator[str]:
    wanted: dict[str, torch.Size] = {}
    for name, theirs in layout.names.items():
        whole = len(theirs) == 1  # else one slice along the first axis for each name
        wanted |= dict.fromkeys(theirs, own[name].shape if whole else own[name].shape[1:])
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} is unknown"
        elif _sizes(wanted[name]) != _sizes(given[name].shape):
            shapes = tuple(given[name].shape), tuple(wanted[name])
            yield f"{name} has shape {shapes[0]} instead of {shapes[1]} (axes of length 1 aside)"


def _sizes(shape: torch.Size) -> list[int]:
    """Drop axes of length one: some releases store a matrix as a convolution of kernel 1."""
    return [size for size in shape if size != 1]
