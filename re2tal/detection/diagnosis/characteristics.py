"""Characteristics of instances that may make them easy or hard to find.

DETAD looks at six. Three follow from any annotation and stand here: length, coverage and the
number of instances. Context size, context distance and the agreement of annotators need
annotations that were collected for ActivityNet alone; they are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from re2tal.detection.diagnosis.outcomes import Floats, Ints, Outcomes


@dataclass(frozen=True, kw_only=True, slots=True)
class Bins:
    """Intervals of a characteristic, open below and closed above.

    Bin i holds values in `(edges[i - 1], edges[i]]`; the first and the last have no outer limit.

    Attributes:
        edges: B - 1 inner limits, rising.
        names: B names.
    """

    edges: tuple[float, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError(
                f"Bins need rising inner limits and one name more than those, but got "
                f"{self.edges} and {self.names}."
            )

    def place(self, values: Floats) -> Ints:
        """Index of the bin of each of the `values` `(N,)`."""
        return np.searchsorted(self.edges, values, side="left")


@dataclass(frozen=True, kw_only=True, slots=True)
class Characteristics:
    """How each characteristic is cut into bins.

    Attributes:
        coverage: an instance's length as a share of its video's duration. Instances that are
            annotated beyond their video's end fall into the last bin (DETAD drops them).
        length: in seconds.
        instances: how many instances of any class the instance's video holds, as DETAD's own
            annotation files count them.
    """

    coverage: Bins
    length: Bins
    instances: Bins


_FIVE = ("XS", "S", "M", "L", "XL")
_FOUR = ("XS", "S", "M", "L")

ACTIVITYNET = Characteristics(
    coverage=Bins(edges=(0.2, 0.4, 0.6, 0.8), names=_FIVE),
    length=Bins(edges=(30, 60, 120, 180), names=_FIVE),
    instances=Bins(edges=(1, 4, 8), names=_FOUR),
)
"""DETAD's bins for ActivityNet."""

THUMOS = Characteristics(
    coverage=Bins(edges=(0.02, 0.04, 0.06, 0.08), names=_FIVE),
    length=Bins(edges=(3, 6, 12, 18), names=_FIVE),
    instances=Bins(edges=(1, 40, 80), names=_FOUR),
)
"""DETAD's bins for THUMOS-14, whose videos are long and whose actions are short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """One characteristic of every instance.

    Attributes:
        bins: its bins.
        index: `(G,)` the bin of each instance.
    """

    bins: Bins
    index: Ints

    @property
    def counts(self) -> Ints:
        """`(B,)` instances in each bin."""
        return np.bincount(self.index, minlength=len(self.bins.names))


def characterise(
    outcomes: Outcomes, durations: Mapping[str, float], characteristics: Characteristics
) -> dict[str, Placed]:
    """Puts every instance into its bin of each characteristic.

    Args:
        outcomes: the instances.
        durations: seconds of every video that has instances.
        characteristics: the bins.

    Returns:
        By name, in the order coverage, length, instances.

    Raises:
        ValueError: If the duration of a video with instances is missing or not positive.
    """
    of_video = np.ones(len(outcomes.videos))
    for video in np.unique(outcomes.truth.videos):
        name = outcomes.videos[video]
        of_video[video] = durations.get(name, np.nan)
        if not of_video[video] > 0:
            raise ValueError(
                f"Video {name!r} has instances but no positive duration, so their coverage is "
                "unknown: give the durations of all videos with ground truth, in seconds."
            )
    lengths = outcomes.truth.segments[:, 1] - outcomes.truth.segments[:, 0]
    together = np.bincount(outcomes.truth.videos, minlength=len(outcomes.videos))
    values = {
        "coverage": (characteristics.coverage, lengths / of_video[outcomes.truth.videos]),
        "length": (characteristics.length, lengths),
        "instances": (characteristics.instances, together[outcomes.truth.videos].astype(float)),
    }
    return {
        name: Placed(bins=bins, index=bins.place(value)) for name, (bins, value) in values.items()
    }
