"""Weights of a localizer from a file: of a detector of ours, or of its authors' release."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from re2tal.weights import WeightsMismatchError, WeightsReport, read_tensors

_PREFIX = "module."  # DataParallel puts it before each name
_OURS = "localizer."  # of the weights of a saved detector


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Names of a localizer's weights in its authors' release.

    A localizer that has such a release gives them in a method `published`.

    Attributes:
        title: the release, for people.
        names: by our names theirs; of several, scalars are stacked; of none, ours is kept.
        left_out: beginnings of names of what follows from the configuration.
    """

    title: str
    names: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """Rename by regular expressions and their replacements, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def load_localizer_weights(localizer: nn.Module, path: str | Path) -> WeightsReport:
    """Load weights into a localizer that was built with the settings that they were trained with.

    Args:
        localizer: what they are for.
        path: a file as for `read_tensors`: of a detector of ours (`weights.safetensors`), of a
            localizer alone, or what the training of its authors' release wrote.

    Raises:
        ValueError: it cannot be read; or it lists every weight that is missing, unknown or has
            another shape (`WeightsMismatchError`). Nothing is loaded then.
    """
    return place(localizer, read_tensors(Path(path)), what=f"The weights in {path}")


def place(localizer: nn.Module, state: Mapping[str, Tensor], *, what: str) -> WeightsReport:
    """Load weights that were read; as `load_localizer_weights`.

    Args:
        localizer: what they are for.
        state: weights by the names that they have in the file.
        what: says where they come from, in the plural.
    """
    own = localizer.state_dict()
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
        whole = len(theirs) == 1
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
    """Without axes of length one: some write a matrix as a convolution of kernel 1."""
    return [size for size in shape if size != 1]
