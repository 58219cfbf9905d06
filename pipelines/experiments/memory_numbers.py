"""What came out of the experiment `memory`, as tables and as findings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from re2tal.memory.fit import GIBIBYTE
from re2tal.memory.ways import TITLES
from pipelines.experiments.experiment import Finding, Result
from pipelines.experiments.peaks import NO_GPU
from pipelines.experiments.benchmarking import Row, Tables

ByWay = Mapping[str, Result]
"""Results of `peaks` or `resident`, by the planner's name of the way."""

_MB = 1e6
_HARDLY = 0.1  # of what one more block costs plain training


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """All that was found out.

    Attributes:
        backbone: what was looked at closely.
        frames: of its clips, in ascending order; the last one is that of all else.
        depths: blocks of its deepest stage, likewise.
        cards: memory of GPUs in GiB, likewise.
        backbones: of every backbone, by name.
        sizes: of the one, by the size of a frame.
        processes: of fresh processes; empty if they were left out.
    """

    backbone: str
    frames: Sequence[int]
    depths: Sequence[int]
    cards: Sequence[float]
    backbones: Mapping[str, ByWay]
    sizes: Mapping[int, ByWay]
    processes: ByWay

    @property
    def close(self) -> ByWay:
        """Of the backbone that was looked at closely."""
        return self.backbones[self.backbone]


def tables(found: Numbers) -> Tables:
    """All numbers.

    Args:
        found: the numbers.
    """
    close, step = found.close, f"{found.backbone}, {found.frames[-1]} frames"
    by_size = {way: [ways[way] for ways in found.sizes.values()] for way in close}
    made = {
        f"Peak of a step with {found.frames[-1]} frames": _by_backbone(found.backbones),
        f"{found.backbone}: predicted peak, by frames": _over(
            [f"{count} frames, GiB" for count in found.frames],
            close,
            lambda result: in_gib(result["frames"]),
        ),
        f"{step}: predicted peak, by height and width": _over(
            [f"{size} px, GiB" for size in found.sizes],
            by_size,
            lambda results: in_gib([last(result) for result in results]),
        ),
        f"{step}: predicted peak, by blocks of the deepest stage": _over(
            [f"{depth} blocks, GiB" for depth in found.depths],
            close,
            lambda result: in_gib(result["depths"]),
        ),
        f"{found.backbone}: frames of the longest clip that fits": _over(
            [f"{card:g} GiB" for card in found.cards], close, lambda result: result["fits"]
        ),
    }
    if found.processes:
        made["A small step on the CPU: what it adds to a fresh process"] = _over(
            ["predicted, MB", "measured, MB"],
            found.processes,
            lambda result: [result["predicted"] / _MB, result["measured"] / _MB],
        )
    return made


def _by_backbone(backbones: Mapping[str, ByWay]) -> list[Row]:
    rows = [
        {
            "backbone": name,
            "training": TITLES[way],
            "predicted, GiB": last(result) / GIBIBYTE,
            "of plain": last(result) / last(ways["plain"]),
            "measured, GiB": _measured(result),
        }
        for name, ways in backbones.items()
        for way, result in ways.items()
    ]
    if all(row["measured, GiB"] == NO_GPU for row in rows):
        for row in rows:
            del row["measured, GiB"]
    return rows


def _measured(result: Result) -> float | str:
    """GiB, or why there are none."""
    size = result["measured"]
    return size if isinstance(size, str) else size / GIBIBYTE


def _over(
    columns: Sequence[str], found: ByWay, values: Callable[[Result], Sequence[float]]
) -> list[Row]:
    """A row for each way; `values` gives the columns of a result."""
    return [
        {"training": TITLES[way]} | dict(zip(columns, values(result), strict=True))
        for way, result in found.items()
    ]


def last(result: Result) -> int:
    """Bytes of the step with the most frames, of a result of `peaks`."""
    return int(result["frames"][-1])


def in_gib(sizes: Sequence[int]) -> list[float]:
    """Bytes as GiB."""
    return [size / GIBIBYTE for size in sizes]


def metrics(found: Numbers) -> dict[str, float]:
    """Peaks and frames, by names that MLflow takes.

    Args:
        found: the numbers.
    """
    peaks = {
        f"memory/{name}/{way}_gib": last(result) / GIBIBYTE
        for name, ways in found.backbones.items()
        for way, result in ways.items()
    }
    fits = {
        f"memory/{found.backbone}/{way}_frames_in_{card:g}_gib": float(frames)
        for way, result in found.close.items()
        for card, frames in zip(found.cards, result["fits"], strict=True)
    }
    return peaks | fits


def findings(found: Numbers) -> list[Finding]:
    """On the paper's claims.

    Args:
        found: the numbers.
    """
    made = [_less_than_plain(found), _less_than_the_others(found), _depth(found), _longer(found)]
    return [*made, _processes(found.processes)] if found.processes else made


def _less_than_plain(found: Numbers) -> Finding:
    factors = {name: _factor(ways, "plain") for name, ways in found.backbones.items()}
    ours, plain = found.close["ours"], found.close["plain"]
    sizes = f"{last(ours) / GIBIBYTE:.3g} GiB instead of {last(plain) / GIBIBYTE:.3g}"
    if ours["measured"] != NO_GPU:
        sizes += f" (measured: {_text(_measured(ours))} instead of {_text(_measured(plain))})"
    others = ", ".join(f"{name} {factor:.1f}" for name, factor in factors.items())
    return Finding(
        claim="Memory consumption is reduced",
        holds=min(factors.values()) > 1,
        evidence=(
            f"{found.backbone}, {found.frames[-1]} frames: {sizes}; plain needs so many times as "
            f"much: {others}"
        ),
    )


def _text(size: float | str) -> str:
    return size if isinstance(size, str) else f"{size:.3g} GiB"


def _less_than_the_others(found: Numbers) -> Finding:
    evidence, holds = [], True
    for way in ("checkpointed", "naive"):
        factors = [_factor(ways, way) for ways in found.backbones.values()]
        holds = holds and min(factors) > 1
        evidence.append(
            f"{TITLES[way]} needs {min(factors):.1f} to {max(factors):.1f} times as much"
        )
    return Finding(
        claim="It is less than with checkpoints, and than rewiring alone needs",
        holds=holds,
        evidence=", ".join(evidence),
    )


def _factor(ways: ByWay, way: str) -> float:
    return last(ways[way]) / last(ways["ours"])


def _depth(found: Numbers) -> Finding:
    blocks = found.depths[-1] - found.depths[0]
    added = {
        way: (result["depths"][-1] - result["depths"][0]) / blocks / 2**20
        for way, result in found.close.items()
    }
    return Finding(
        claim="Memory hardly grows with depth",
        holds=added["ours"] < _HARDLY * added["plain"],
        evidence=(
            f"one more block of {found.backbone}: {_rounded(added['ours'])} MiB instead of "
            f"{_rounded(added['plain'])}, its parameters and their gradients included"
        ),
    )


def _rounded(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def _longer(found: Numbers) -> Finding:
    fits = {way: result["fits"] for way, result in found.close.items()}
    others = [way for way in fits if way != "ours"]
    pairs = zip(found.cards, fits["ours"], fits["plain"], strict=True)
    return Finding(
        claim="Longer clips fit",
        holds=all(
            ours > max(fits[way][i] for way in others) for i, ours in enumerate(fits["ours"])
        ),
        evidence="; ".join(
            f"{card:g} GiB: {ours} frames instead of {plain}" for card, ours, plain in pairs
        ),
    )


def _processes(found: ByWay) -> Finding:
    sizes = {way: result["measured"] / _MB for way, result in found.items()}
    listed = ", ".join(f"{TITLES[way]} {size:.0f} MB" for way, size in sizes.items())
    return Finding(
        claim="Fresh processes grow as predicted: ours least, plain most",
        holds=sizes["ours"] < sizes["checkpointed"] < sizes["plain"],
        evidence=listed,
    )
