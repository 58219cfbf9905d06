"""A profile as a record, as tables and as a picture."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from re2tal.memory.fit import GIBIBYTE
from pipelines.experiments.subject import Subject
from re2tal.memory.ways import TITLES
from re2tal.memory import Breakdown, Origin

_ROWS = 6
_KEPT = 40

Curve = list[tuple[int, int]]


@dataclass(kw_only=True)
class Profile:
    """What was found out about a subject, by way of running it.

    Attributes:
        subject: what was profiled.
        blocks: names of its residual blocks.
        predicted: the predicted peaks.
        measured: peaks on the GPU; None where the GPU has too little memory. Empty without a GPU.
        budget: bytes that were asked about, or None.
        fits: frames of the longest window within the budget.
        frames: bytes against frames of a window.
        depth: bytes against blocks of the deepest stage.
    """

    subject: Subject
    blocks: Sequence[str]
    predicted: dict[str, Breakdown] = field(default_factory=dict)
    measured: dict[str, int | None] = field(default_factory=dict)
    budget: int | None = None
    fits: dict[str, int] = field(default_factory=dict)
    frames: dict[str, Curve] = field(default_factory=dict)
    depth: dict[str, Curve] = field(default_factory=dict)

    def record(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """All of it, as JSON takes it; sizes in bytes.

        Args:
            settings: what the profile was asked for.
        """
        return {
            "settings": dict(settings),
            "torch": torch.__version__,
            "device": device_name(),
            "step": asdict(self.subject.work),
            "ways": {way: self._way(way) for way in self.predicted},
            "budget": self.budget,
        }

    def metrics(self) -> dict[str, float]:
        """The sizes in GiB and the frames, by the names that MLflow shows."""
        found = {f"peak_gib/{way}": b.memory.peak / GIBIBYTE for way, b in self.predicted.items()}
        for way, size in self.measured.items():
            if size is not None:
                found[f"measured_gib/{way}"] = size / GIBIBYTE
        return found | {f"frames_that_fit/{way}": n for way, n in self.fits.items()}

    def _way(self, way: str) -> dict[str, Any]:
        found = self.predicted[way]
        parts = [asdict(origin) | {"bytes": size} for origin, size in found.parts[:_KEPT]]
        return {
            "predicted": asdict(found.memory),
            "measured_peak": self.measured.get(way),
            "at": asdict(found.peak),
            "made_of": parts,
            "frames_that_fit": self.fits.get(way),
            "against_frames": self.frames.get(way),
            "against_depth": self.depth.get(way),
        }


def device_name() -> str:
    """The GPU, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: predicted only"


def print_profile(profile: Profile, console: Console) -> None:
    """Prints two tables: the peaks, and what they are made of.

    Args:
        profile: with predictions.
        console: where to.
    """
    console.print(_peaks(profile))
    console.print(_parts(profile))


def _peaks(profile: Profile) -> Table:
    work = profile.subject.work
    table = Table(
        title=f"{profile.subject.name}, {work.batch}x{work.frames}x{work.size}x{work.size}, "
        f"{work.precision}: peak of one forward and backward, parameters and gradients included"
    )
    table.add_column("way to run it")
    table.add_column("predicted", justify="right")
    if profile.measured:
        table.add_column(f"measured, {device_name()}", justify="right")
    if profile.budget is not None:
        fits = f"frames in {profile.budget / GIBIBYTE:.4g} GiB"
        table.add_column(fits, justify="right")
    table.add_column("the peak is in the", overflow="fold")
    for way, found in profile.predicted.items():
        cells = [TITLES[way], gib(found.memory.peak)]
        if profile.measured:
            size = profile.measured[way]
            cells.append("out of memory" if size is None else gib(size))
        if profile.budget is not None:
            cells.append(str(profile.fits[way] or "none"))
        at = found.peak
        where = f"{at.phase} of {at.module or 'the model itself'}"
        table.add_row(*cells, f"{where} ({at.operator})" if at.operator else where)
    return table


def _parts(profile: Profile) -> Table:
    table = Table(title="What is in memory at the peak")
    table.add_column("way to run it")
    table.add_column("size", justify="right")
    table.add_column("share", justify="right")
    table.add_column("what", overflow="fold")
    for way, found in profile.predicted.items():
        title = TITLES[way]
        for what, size in rows(found, profile.blocks):
            table.add_row(title, gib(size), f"{size / found.memory.peak:.0%}", what)
            title = ""
        table.add_section()
    return table


def rows(found: Breakdown, blocks: Sequence[str]) -> Iterator[tuple[str, int]]:
    """What a peak is made of, the largest first: a few rows and the rest.

    Args:
        found: the peak.
        blocks: names of residual blocks; those in one container are put together.
    """
    sums: Counter[str] = Counter()
    for origin, size in found.parts:
        sums[_what(origin, blocks)] += size
    listed = sums.most_common(_ROWS)
    yield from listed
    if len(sums) > len(listed):
        yield "everything else", found.memory.peak - sum(size for _, size in listed)


def _what(origin: Origin, blocks: Sequence[str]) -> str:
    if origin.kind != "activations":
        return origin.kind
    module = origin.module
    for block in blocks:
        if module == block or module.startswith(f"{block}."):
            module = f"{block.rpartition('.')[0]}.*{module.removeprefix(block)}"
            break
    return f"{origin.phase} of {module or 'the model itself'}: {origin.operator}"


def picture(profile: Profile) -> Figure:
    """Draws memory against frames and against depth, a curve a way.

    Args:
        profile: with curves.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = ("frames of a window", "blocks of the deepest stage")
    for axes, curves, label in zip(
        (left, right), (profile.frames, profile.depth), labels, strict=True
    ):
        for way, points in curves.items():
            axes.plot(
                [n for n, _ in points],
                [size / GIBIBYTE for _, size in points],
                marker="o",
                markersize=4,
                label=TITLES[way],
            )
        if profile.budget is not None:
            axes.axhline(profile.budget / GIBIBYTE, color="0.6", linestyle="--", linewidth=1)
        axes.set(xlabel=label, ylabel="predicted peak in GiB", ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    work = profile.subject.work
    figure.suptitle(
        f"{profile.subject.name}, batch {work.batch}, {work.size} pixels, {work.precision}"
    )
    return figure


def gib(size: int) -> str:
    """A size for a table.

    Args:
        size: in bytes.
    """
    return f"{size / GIBIBYTE:.2f} GiB" if size >= GIBIBYTE / 10 else f"{size / 2**20:.1f} MiB"
