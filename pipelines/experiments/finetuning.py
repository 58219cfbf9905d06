"""Memory of full finetuning against that of adapters, plain, with checkpoints and reversible.

Memory is predicted for a backbone with AdamW and the EMA of the weights: for full finetuning and
for AdaTAD's temporal adapters, each in every way, for several window lengths and frame sizes; and
with each, the longest window that fits the memory of a GPU.
"""

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import Any

from pipelines.experiments.experiment import Finding, Job, Row, Section, Tables, refuse_unknown
from pipelines.experiments.planner import Planner, Subject, backbone_alone
from pipelines.training.workload import Workload
from re2tal.backbones.adapters import AdapterConfig
from re2tal.backbones.table import backbones
from re2tal.errors import UserError
from re2tal.memory.fit import GIBIBYTE
from re2tal.memory.ways import WAYS
from re2tal.precision import Precision

Result = Mapping[str, Any]
_TUNINGS = ("full", "adapters")
_WAYS = ("plain", "checkpointed", "ours")
_ALL = tuple(product(_TUNINGS, _WAYS))
_UNIT = 16  # frames from one compared window length to the next
_GOAL = 40.0  # GiB for the largest model, fully trained on the longer window


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuning:
    """Memory of full finetuning and of adapters, each plain, with checkpoints, reversible.

    Attributes:
        backbones: names in the table of backbones, all with transformer blocks.
        sizes: heights and widths of a frame.
        frames: two lengths of the window.
        short: additional lengths, because straight lines through long windows do not hold for short
            ones, whose branches run in one piece.
        cards: memory of GPUs in GiB; the longest window is found for each.
        precision: number format of the branches.
    """

    backbones: tuple[str, ...] = (
        "videomae_s",
        "videomae_b",
        "videomae_l",
        "videomae_h",
        "videomae_v2_g",
        "vjepa2_l",
        "vjepa2_g",
        "swin_t",
        "swin_b",
    )
    sizes: tuple[int, ...] = (160, 224)
    frames: tuple[int, int] = (768, 1536)
    short: tuple[int, ...] = (64, 256)
    cards: tuple[float, ...] = (24, 80)
    precision: Precision = "bfloat16"

    def __post_init__(self) -> None:
        refuse_unknown("backbone", self.backbones, backbones())
        if not self.frames[0] < self.frames[1]:
            raise UserError("Give two lengths of the window, the shorter first.")

    def jobs(self) -> Sequence[Job]:
        """List one job for each backbone, size, tuning and way."""
        return [
            Job(
                name=_named(backbone, size, tuning, way),
                work=needs,
                arguments={
                    "backbone": backbone,
                    "size": size,
                    "tuning": tuning,
                    "way": way,
                    "frames": list(self.frames),
                    "short": list(self.short),
                    "cards": list(self.cards),
                    "precision": self.precision,
                },
            )
            for size in sorted(self.sizes, reverse=True)
            for backbone in self._of(size)
            for tuning in _TUNINGS
            for way in _WAYS
        ]

    def _of(self, size: int) -> list[str]:
        """List the backbones that accept this frame size: the patches of ViTs must divide it."""
        made: dict[str, Any] = {name: backbones()[name].make() for name in self.backbones}
        patches = {name: getattr(config, "patch", 1) for name, config in made.items()}
        return [
            n for n, patch in patches.items() if not isinstance(patch, int) or size % patch == 0
        ]

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report each way's memory, and the windows from which full finetuning needs less."""
        tables: Tables = {}
        for size in self.sizes:
            tables[f"Frames of {size} pixels"] = [
                self._row(backbone, tuning, way, results[_named(backbone, size, tuning, way)])
                for backbone in self._of(size)
                for tuning in _TUNINGS
                for way in _WAYS
            ]
        tables["Windows from which full reversible finetuning takes less than"] = [
            {"backbone": backbone, "pixels": size}
            | {
                f"{tuning}, {WAYS[way].title}": self._crossing(results, backbone, size, tuning, way)
                for tuning, way in (
                    ("full", "checkpointed"),
                    ("adapters", "plain"),
                    ("adapters", "checkpointed"),
                    ("adapters", "ours"),
                )
            }
            | {"least": self._least(results, backbone, size)}
            for backbone in self.backbones
            for size in self.sizes
            if backbone in self._of(size)
        ]
        return Section(
            title="Memory of full finetuning and of adapters",
            text=(
                f"Predicted for one window, in {self.precision}, with fake tensors. Counted are "
                "parameters, gradients, AdamW's two moments, the EMA of all weights, frames and "
                "activations of the backbone; not a localizer, the CUDA context and the scratch "
                "space of a GPU's operators (on an H200, Swin-T took 1 to 5 % more than predicted "
                "for its own operators). Adapters are AdaTAD's; all other weights are frozen and "
                "have no gradients. Reversible is this project's, in pieces of 2 GiB. Backbones "
                "whose patches do not divide the frames are left out. "
                "The window from which one way needs less is the crossing of straight lines "
                "through all predicted lengths, between the shortest of these and the longest "
                "that fits a card in any way."
            ),
            tables=tables,
            findings=list(self._findings(results)),
        )

    def _row(self, backbone: str, tuning: str, way: str, found: Result) -> Row:
        row: Row = {
            "backbone": backbone,
            "trained": tuning,
            "way": WAYS[way].title,
            "trained parameters, M": found["trained"] / 1e6,
            "weights, optimizer, average, GiB": found["state"] / GIBIBYTE,
        }
        row |= {
            f"{frames} frames, GiB": peak / GIBIBYTE
            for frames, peak in zip(self.frames, found["peaks"], strict=True)
        }
        return row | {
            f"frames in {card:g} GiB": frames
            for card, frames in zip(self.cards, found["fits"], strict=True)
        }

    def _windows(self, results: Mapping[str, Result], backbone: str, size: int) -> range:
        """List window lengths: from one predicted in all ways to the longest that fits in any."""
        found = [results[_named(backbone, size, *way)] for way in _ALL]
        shortest = max(min(self.short + self.frames), *(one["predicted"][0][0] for one in found))
        longest = max(max(one["fits"], default=0) for one in found)
        return range(shortest, max(longest, self.frames[1]) + 1, _UNIT)

    def _crossing(
        self, results: Mapping[str, Result], backbone: str, size: int, tuning: str, way: str
    ) -> str:
        """Name the window from which full reversible finetuning needs less than another way."""
        ours = results[_named(backbone, size, "full", "ours")]
        other = results[_named(backbone, size, tuning, way)]
        windows = self._windows(results, backbone, size)
        first = next((n for n in windows if _between(ours, n) < _between(other, n)), None)
        if first is None:
            return f"none up to {windows[-1]:,}"
        return f"{first:,} frames" if first > windows[0] else f"{first:,} or fewer"

    def _least(self, results: Mapping[str, Result], backbone: str, size: int) -> str:
        """Name the way that needs least, and the windows from which others do."""
        found = {way: results[_named(backbone, size, *way)] for way in _ALL}
        windows = self._windows(results, backbone, size)
        best = ((min(_ALL, key=lambda way: _between(found[way], n)), n) for n in windows)
        turns = [(way, next(group)[1]) for way, group in groupby(best, key=lambda pair: pair[0])]
        return "; ".join(
            f"{tuning} {WAYS[way].title} from {n:,} frames" for (tuning, way), n in turns
        )

    def _findings(self, results: Mapping[str, Result]) -> Iterator[Finding]:
        size, long = max(self.sizes), self.frames[1]

        def peak(backbone: str, tuning: str, way: str) -> float:
            return float(results[_named(backbone, size, tuning, way)]["peaks"][1]) / GIBIBYTE

        window = f"{long} frames of {size} pixels"
        largest = "videomae_v2_g"
        if largest in self._of(size):
            full = peak(largest, "full", "ours")
            adapters = peak(largest, "adapters", "checkpointed")
            yield Finding(
                claim=f"{largest}: {window}, everything trained, in {_GOAL:g} GiB",
                holds=full < _GOAL,
                evidence=f"{full:.3g} GiB; adapters with checkpointing {adapters:.3g}",
            )
        for backbone in self._of(size):
            full = peak(backbone, "full", "ours")
            adapters = peak(backbone, "adapters", "checkpointed")
            yield Finding(
                claim=(
                    f"{backbone}: {window}, full reversible finetuning takes less than adapters "
                    "with checkpointing"
                ),
                holds=full < adapters,
                evidence=f"{full:.3g} GiB against {adapters:.3g}",
            )
        least = {
            f"{backbone}, {pixels} px": self._least(results, backbone, pixels)
            for backbone in self.backbones
            for pixels in self.sizes
            if backbone in self._of(pixels)
        }
        always = f"adapters {WAYS['ours'].title} from "
        exceptions = [
            f"{what}: {told}"
            for what, told in least.items()
            if ";" in told or not told.startswith(always)
        ]
        yield Finding(
            claim="Reversible adapters take less than everything else",
            holds=not exceptions,
            evidence="; ".join(exceptions)
            or "for every backbone and size, at all lengths predicted",
        )


def _between(found: Result, frames: int) -> float:
    """Interpolate the bytes of a window linearly between the predicted lengths."""
    known: list[tuple[int, int]] = found["predicted"]
    # outside of the predicted lengths, the line through the two nearest ones continues
    longer = bisect(known, frames, key=lambda pair: pair[0])
    (short, less), (long, more) = known[min(max(longer, 1), len(known) - 1) - 1 :][:2]
    return less + (more - less) * (frames - short) / (long - short)


def _named(backbone: str, size: int, tuning: str, way: str) -> str:
    return f"{backbone}, {size} px, {tuning}, {WAYS[way].title}"


def subject_of(backbone: str, tuning: str, work: Workload) -> Subject:
    """Describe a backbone with AdamW and EMA."""
    addition = AdapterConfig() if tuning == "adapters" else None
    return replace(backbone_alone(backbone, work, addition), optimizer=True)


def needs(
    *,
    backbone: str,
    size: int,
    tuning: str,
    way: str,
    frames: Sequence[int],
    short: Sequence[int],
    cards: Sequence[float],
    precision: Precision,
) -> dict[str, Any]:
    """Predict peaks for two lengths of the window, and the longest that fits each card.

    Returns:
        "peaks", bytes for each of `frames`; "state", bytes of weights, gradients, optimizer and
        EMA; "fits", frames for each of `cards` (GiB); "predicted", all predicted pairs of frames
        and bytes; "trained", the number of trained parameters.
    """
    work = Workload(frames=frames[0], size=size, precision=precision)
    planner = Planner(subject_of(backbone, tuning, work))
    peaks = [planner.peak(way, frames=count) for count in (*short, *frames)][len(short) :]
    step = planner.predict(way)
    return {
        "peaks": peaks,
        "state": step.parameters + step.buffers + step.gradients + step.kept_beside,
        "trained": step.gradients // 4,
        "fits": [planner.frames_that_fit(way, int(card * GIBIBYTE)) for card in cards],
        "predicted": planner.predicted(way),
    }
