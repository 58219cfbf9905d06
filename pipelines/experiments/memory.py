"""The paper's first claim: memory consumption is reduced.

It compares the peak of one training step in four ways: plain, with per-block checkpointing, naively
reversible (connections rewired and nothing else), and reversible as in this project; over frames,
resolution and depth, and for several backbones. It also finds the longest clip that fits a GPU.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import nn

from pipelines.experiments.experiment import (
    Finding,
    Job,
    Result,
    Row,
    Section,
    Tables,
    refuse_unknown,
)
from pipelines.experiments.models import SMALL, build
from pipelines.experiments.pictures import COLOURS, lines, tidy
from pipelines.experiments.planner import Planner, backbone_alone
from pipelines.training.workload import Workload
from re2tal.backbones.table import backbones
from re2tal.errors import UserError
from re2tal.memory import MemoryMeter, StepMemory, predict_peak
from re2tal.memory.fit import GIBIBYTE
from re2tal.memory.ways import KEEPING, WAYS, prepared
from re2tal.precision import Precision

ByWay = Mapping[str, Result]
"""Results of `peaks` or `resident`, by way to train."""

NO_GPU = "no GPU"
OUT_OF_MEMORY = "out of memory"

_MB = 1e6
_HARDLY = 0.1  # limit on one more block's memory, as a share of its memory in plain training
_PEAK = "predicted peak of a step, GiB"
_BELOW = "naive"  # way whose number is written below its dot, because checkpointing's is close


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Peak memory of one training step, in four ways.

    Attributes:
        backbone: backbone for the comparison over frames, resolution, depth and GPUs.
        others: backbones for which only the step with the most frames is predicted.
        frames: lengths of the single clip in the batch.
        size: height and width of a frame.
        smaller: other sizes of a frame.
        depths: numbers of blocks of the deepest stage.
        precision: number format of the branches.
        cards: memory of GPUs in GiB; the longest clip is found for each.
        resident: network of `pipelines/experiments/models.py` whose small step is also measured in
            fresh processes on the CPU; "" leaves that out.
    """

    backbone: str = "swin_t"
    others: tuple[str, ...] = ("swin_s", "swin_b", "slowfast_50", "slowfast_101")
    frames: tuple[int, ...] = (192, 384, 768)
    size: int = 224
    smaller: tuple[int, ...] = (112,)
    depths: tuple[int, ...] = (6, 18)
    precision: Precision = "bfloat16"
    cards: tuple[float, ...] = (12, 24, 80)
    resident: str = "swin3d_t"

    def __post_init__(self) -> None:
        refuse_unknown("backbone", (self.backbone, *self.others), backbones())
        if not self.frames or not self.cards or len(set(self.depths)) < 2:
            raise UserError(
                "Give frames, cards and at least two depths: memory is compared over each of them."
            )

    def jobs(self) -> Sequence[Job]:
        """List one job for each backbone, size and way."""
        longest = {"frames": [max(self.frames)], "depths": [], "cards": []}
        whole = {name: sorted(getattr(self, name)) for name in longest}
        steps: list[tuple[str, int, dict[str, Any]]] = [(self.backbone, self.size, whole)]
        steps += [(self.backbone, size, longest) for size in self.smaller]
        steps += [(other, self.size, longest) for other in self.others]
        found = []
        for way in KEEPING:
            for backbone, size, more in steps:
                arguments = {"backbone": backbone, "way": way, "size": size, **more}
                arguments["precision"] = self.precision
                found.append(Job(name=_named(backbone, size, way), work=peaks, arguments=arguments))
            if self.resident:
                arguments = {"model": self.resident, "way": way, "step": asdict(SMALL)}
                found.append(Job(name=_named_resident(way), work=resident, arguments=arguments))
        return found

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report on memory."""

        def ways(backbone: str, size: int) -> ByWay:
            return {way: results[_named(backbone, size, way)] for way in KEEPING}

        found = {name: ways(name, self.size) for name in (self.backbone, *self.others)}
        close = found[self.backbone]
        sizes = {size: ways(self.backbone, size) for size in sorted({*self.smaller, self.size})}
        processes = {way: results[_named_resident(way)] for way in KEEPING if self.resident}
        step = f"{self.size} px, {self.precision}, one clip"
        metrics = {
            f"memory/{name}/{way}_gib": _last(result) / GIBIBYTE
            for name, of_backbone in found.items()
            for way, result in of_backbone.items()
        }
        metrics |= {
            f"memory/{self.backbone}/{way}_frames_in_{card:g}_gib": float(frames)
            for way, result in close.items()
            for card, frames in zip(sorted(self.cards), result["fits"], strict=True)
        }
        return Section(
            title="Memory consumption is reduced",
            text=self._text(step),
            findings=self._findings(found, processes),
            tables=self._tables(found, sizes, processes),
            figures={
                "memory": self._over_frames(close, f"{self.backbone}, {step}"),
                "memory_depth": self._over_depth(found, f"{max(self.frames)} frames, {step}"),
            },
            metrics=metrics,
        )

    def _text(self, step: str) -> str:
        text = (
            "Peak bytes of tensors during a forward and backward pass, from `uint8` frames to the "
            "gradients of the backbone's parameters, including parameters and gradients but no "
            f"optimizer. {step}, unless a table says otherwise. Predicted with fake tensors "
            "(`re2tal.memory.predict_peak`), which compute nothing, for the operators of a CPU. "
            "Operators of a GPU need more: on an H200, 6 % more with plain training, 34 % with "
            "checkpoints, 27 % with rewiring alone and 23 % with ours (README.md). Naive "
            "reversible means rewiring only: branches run whole, and stems and down-sampling "
            "layers store their activations."
        )
        if not self.resident:
            return text
        return (
            f"{text} The small step trains {self.resident} on {SMALL.frames} frames of "
            f"{SMALL.size} px in float32, each way in a separate process; parameters and frames "
            "are not counted. By default glibc keeps freed blocks of up to 32 MB, which then "
            "count as used; the column 'measured' is without this."
        )

    def _tables(
        self, found: Mapping[str, ByWay], sizes: Mapping[int, ByWay], processes: ByWay
    ) -> Tables:
        close, most = found[self.backbone], max(self.frames)
        step = f"{self.backbone}, {most} frames"
        parts = ("peak", "activations", "parameters", "gradients", "inputs")
        by_size = {way: [_last(of_size[way]) for of_size in sizes.values()] for way in close}
        tables = {
            f"Peak of a step with {most} frames": _by_backbone(found),
            f"{self.backbone}: predicted peak, by frames": _over(
                [f"{count} frames, GiB" for count in sorted(self.frames)],
                {way: _in_gib(result["frames"]) for way, result in close.items()},
            ),
            f"{step}: predicted peak, by height and width": _over(
                [f"{size} px, GiB" for size in sizes],
                {way: _in_gib(peaks) for way, peaks in by_size.items()},
            ),
            f"{step}: predicted peak, by blocks of the deepest stage": _over(
                [f"{depth} blocks, GiB" for depth in sorted(self.depths)],
                {way: _in_gib(result["depths"]) for way, result in close.items()},
            ),
            f"{step}: predicted bytes, each kind when it is most": _over(
                [f"{part}, GiB" for part in parts],
                {way: _in_gib(r["parts"][part] for part in parts) for way, r in close.items()},
            ),
            f"{self.backbone}: frames of the longest clip that fits": _over(
                [f"{card:g} GiB" for card in sorted(self.cards)],
                {way: result["fits"] for way, result in close.items()},
            ),
        }
        if processes:
            columns = ("predicted", "measured", "allocator's default")
            tables["A small step on the CPU: what it adds to a fresh process"] = _over(
                [f"{column}, MB" for column in columns],
                {way: [r[column] / _MB for column in columns] for way, r in processes.items()},
            )
        return tables

    def _findings(self, found: Mapping[str, ByWay], processes: ByWay) -> list[Finding]:
        close = found[self.backbone]
        ours, plain = close["ours"], close["plain"]
        # memory of the other ways divided by ours, for each backbone
        factors = {
            way: [_last(ways[way]) / _last(ways["ours"]) for ways in found.values()]
            for way in ("plain", "checkpointed", "naive")
        }
        needed = f"{_last(ours) / GIBIBYTE:.3g} GiB instead of {_last(plain) / GIBIBYTE:.3g}"
        if ours["measured"] != NO_GPU:
            needed += f" (measured: {_text(_size(ours))} instead of {_text(_size(plain))})"
        listed = (f"{name} {f:.1f}" for name, f in zip(found, factors["plain"], strict=True))
        less = Finding(
            claim="Memory consumption is reduced",
            holds=min(factors["plain"]) > 1,
            evidence=(
                f"{self.backbone}, {max(self.frames)} frames: {needed}; plain divided by ours: "
                f"{', '.join(listed)}"
            ),
        )
        others = ("checkpointed", "naive")
        least = Finding(
            claim="It is less than with checkpoints, and less than with rewiring alone",
            holds=all(min(factors[way]) > 1 for way in others),
            evidence=", ".join(
                f"{WAYS[way].title} needs {min(factors[way]):.1f} to {max(factors[way]):.1f} times "
                "as much"
                for way in others
            ),
        )
        blocks = max(self.depths) - min(self.depths)
        added = [(r["depths"][-1] - r["depths"][0]) / blocks / 2**20 for r in (ours, plain)]
        one, other = (f"{size:,.0f}" if size >= 100 else f"{size:.3g}" for size in added)
        deep = Finding(
            claim="Memory hardly grows with depth",
            holds=added[0] < _HARDLY * added[1],
            evidence=(
                f"one more block of {self.backbone}: {one} MiB instead of {other}, including its "
                "parameters and gradients"
            ),
        )
        rivals = [result["fits"] for way, result in close.items() if way != "ours"]
        pairs = zip(sorted(self.cards), ours["fits"], plain["fits"], strict=True)
        longer = Finding(
            claim="Longer clips fit",
            holds=all(f > max(theirs) for f, *theirs in zip(ours["fits"], *rivals, strict=True)),
            evidence="; ".join(
                f"{card:g} GiB: {frames} frames instead of {fewer}" for card, frames, fewer in pairs
            ),
        )
        if not processes:
            return [less, least, deep, longer]
        grown = {way: result["measured"] / _MB for way, result in processes.items()}
        fresh = Finding(
            claim="Fresh processes grow as predicted: ours least, plain most",
            holds=grown["ours"] < grown["checkpointed"] < grown["plain"],
            evidence=", ".join(f"{WAYS[way].title} {size:.0f} MB" for way, size in grown.items()),
        )
        return [less, least, deep, longer, fresh]

    def _over_frames(self, close: ByWay, title: str) -> Figure:
        """Draw memory against frames, and the longest clip that fits the memory of each GPU."""
        figure, left, right = _two_panels(title)
        curves = {WAYS[way].title: _in_gib(result["frames"]) for way, result in close.items()}
        near = [card for card in self.cards if card < 2 * max(map(max, curves.values()))]
        for card in near:
            left.axhline(card, color="0.6", linewidth=0.9, linestyle=(0, (5, 3)))
            left.annotate(
                f"a GPU of {card:g} GiB",
                (0, card),
                xytext=(5, 2),
                textcoords="offset points",
                fontsize=8,
                color="0.4",
            )
        left.set(xlabel="frames of the clip", ylabel=_PEAK)
        left.set_title("Memory of a training step", loc="left", fontweight="bold")
        lines(left, sorted(self.frames), curves, unit="GiB", at_least=max(near, default=0))
        _fitting(right, close, sorted(self.cards))
        return figure

    def _over_depth(self, found: Mapping[str, ByWay], title: str) -> Figure:
        """Draw memory against depth, and the memory of all backbones."""
        figure, left, right = _two_panels(title)
        left.set(xlabel=f"blocks of the deepest stage of {self.backbone}", ylabel=_PEAK)
        curves = {
            WAYS[way].title: _in_gib(result["depths"])
            for way, result in found[self.backbone].items()
        }
        left.set_title("Memory against depth", loc="left", fontweight="bold")
        lines(left, sorted(self.depths), curves, unit="GiB")
        _bars(right, found)
        return figure


def quick() -> Memory:
    """Configure a toy backbone without measurements, only to show that everything runs.

    Its GPU's size lies between the memory of plain training and that of the other ways.
    """
    return Memory(
        backbone="swin_toy",
        others=(),
        frames=(32, 64),
        size=64,
        smaller=(32,),
        depths=(2, 4),
        cards=(0.0115,),
        resident="",
    )


def _named(backbone: str, size: int, way: str) -> str:
    return f"{backbone}, {size} px, {WAYS[way].title}"


def _named_resident(way: str) -> str:
    return f"a fresh process, {WAYS[way].title}"


# Jobs.


def peaks(
    *,
    backbone: str,
    way: str,
    size: int,
    precision: Precision,
    frames: Sequence[int],
    depths: Sequence[int],
    cards: Sequence[float],
) -> dict[str, Any]:
    """Predict peaks of a backbone's step in one way, and measure one if there is a GPU.

    Depths are compared, and the GPU's peak is measured, with the longest clip.

    Returns:
        "frames" and "depths", bytes for each of these; "parts", the parts of the longest clip's
        bytes; "fits", frames for each of `cards` (GiB); "measured", bytes, or the reason why there
        are none.
    """
    work = Workload(frames=max(frames), size=size, precision=precision)
    planner = Planner(backbone_alone(backbone, work))
    measured = (planner.measure(way) or OUT_OF_MEMORY) if torch.cuda.is_available() else NO_GPU
    return {
        "frames": [planner.peak(way, frames=count) for count in frames],
        "parts": asdict(planner.predict(way)),
        "depths": [planner.peak(way, depth=depth) for depth in depths],
        "fits": [planner.frames_that_fit(way, int(card * GIBIBYTE)) for card in cards],
        "measured": measured,
    }


# glibc keeps freed blocks below a threshold that it raises over time. With a fixed one, larger
# blocks return to the system at once, and resident memory follows the tensors.
FOLLOWING = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def resident(*, model: str, step: Mapping[str, Any], way: str) -> dict[str, int]:
    """Measure and predict the bytes that a step adds to a fresh process with a built model.

    Args:
        model: key of `MODELS`.
        step: fields of a `Workload`.
        way: key of `WAYS`.

    Returns:
        Bytes predicted, measured, and measured with the allocator's default settings, without
        parameters and frames.
    """
    command = [sys.executable, "-c", _PROCESS, model, json.dumps(step), way]
    variables = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def added(environment: Mapping[str, str]) -> int:
        output = subprocess.check_output(command, env={**variables, **environment})  # noqa: S603 - Python
        return int(output)

    memory = predicted_step(model, Workload(**step), way)
    return {
        "predicted": memory.peak - memory.parameters - memory.buffers - memory.inputs,
        "measured": added(FOLLOWING),
        "allocator's default": added({}),
    }


def predicted_step(model: str, work: Workload, way: str) -> StepMemory:
    """Predict the memory of a step of a model of `MODELS`."""
    with prepared(build(model), WAYS[way].prepare) as network:
        return predict_peak(network, *work.inputs("meta"), step=work.forward)


_PROCESS = """
import json, sys
from pipelines.experiments.memory import added_here
model, step, way = sys.argv[1:]
print(added_here(model, json.loads(step), way))
"""


def added_here(model: str, step: Mapping[str, Any], way: str) -> int:
    """Measure the largest growth of this process during one step, in bytes; see `resident`."""
    work = Workload(**step)
    network, inputs = build(model), work.noise()
    # load the libraries' code of matrix products and convolutions before measuring
    nn.Linear(8, 8)(torch.randn(2, 8)).sum().backward()
    video, weights = torch.randn(1, 3, 4, 8, 8), torch.randn(4, 3, 2, 4, 4)
    nn.functional.conv3d(video, weights, stride=(2, 4, 4))
    with prepared(network, WAYS[way].prepare), MemoryMeter() as meter:
        before = psutil.Process().memory_info().rss
        work.step(network, *inputs)
    return meter.rss_peak - before


# Tables and pictures.


def _by_backbone(found: Mapping[str, ByWay]) -> list[Row]:
    rows = [
        {
            "backbone": name,
            "training": WAYS[way].title,
            "predicted, GiB": _last(result) / GIBIBYTE,
            "of plain": _last(result) / _last(ways["plain"]),
            "measured, GiB": _size(result),
        }
        for name, ways in found.items()
        for way, result in ways.items()
    ]
    if all(row["measured, GiB"] == NO_GPU for row in rows):
        for row in rows:
            del row["measured, GiB"]
    return rows


def _over(columns: Sequence[str], found: Mapping[str, Sequence[float]]) -> list[Row]:
    """Tabulate one row per way, with one value per column."""
    return [
        {"training": WAYS[way].title} | dict(zip(columns, values, strict=True))
        for way, values in found.items()
    ]


def _size(result: Result) -> float | str:
    """Return the measured GiB, or the reason why there are none."""
    size = result["measured"]
    return size if isinstance(size, str) else size / GIBIBYTE


def _text(size: float | str) -> str:
    return size if isinstance(size, str) else f"{size:.3g} GiB"


def _last(result: Result) -> int:
    """Return the bytes of the step with the most frames."""
    return int(result["frames"][-1])


def _in_gib(sizes: Iterable[int]) -> list[float]:
    return [size / GIBIBYTE for size in sizes]


def _two_panels(title: str) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=10, color="0.35")
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    return figure, left, right


def _fitting(axes: Axes, close: ByWay, cards: Sequence[float]) -> None:
    """Draw a row for each GPU, with a dot for each way at the longest clip that fits."""
    for row in range(len(cards)):
        fits = {way: r["fits"][row] for way, r in close.items() if r["fits"][row]}
        axes.plot([min(fits.values()), max(fits.values())], [row, row], color="0.8", zorder=1)
        for way, frames in fits.items():
            ours = way == "ours"
            colour = COLOURS[WAYS[way].title]
            axes.plot(frames, row, "o", color=colour, markersize=9 if ours else 6)
            axes.annotate(
                f"{frames:,}",
                (frames, row),
                xytext=(0, -16 if way == _BELOW else 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=colour,
                fontweight="bold" if ours else "normal",
            )
    rows = range(len(cards))
    axes.set_title("Longest clip that fits a GPU", loc="left", fontweight="bold")
    axes.set(xscale="log", xlabel="frames")
    axes.set(yticks=rows, yticklabels=[f"{card:g} GiB" for card in cards])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda n, _: f"{n / 1000:g}k" if n >= 1000 else f"{n:g}")
    tidy(axes)
    axes.grid(visible=False, axis="y")


def _bars(axes: Axes, found: Mapping[str, ByWay]) -> None:
    """Draw a bar for each way and backbone."""
    for row, way in enumerate(KEEPING):
        colour = COLOURS[WAYS[way].title]
        values = _in_gib([_last(ways[way]) for ways in found.values()])
        places = [place + 0.21 * (row - 1.5) for place in range(len(values))]
        bars = axes.barh(places, values, 0.19, color=colour)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8, color=colour)
    axes.set_title("Memory of other backbones", loc="left", fontweight="bold")
    axes.set(yticks=range(len(found)), yticklabels=list(found), xlabel=_PEAK)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    tidy(axes)
    axes.grid(visible=False, axis="y")
