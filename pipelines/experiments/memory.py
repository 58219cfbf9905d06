"""The paper's first claim: memory consumption is reduced.

The peak of one training step, plain, with per-block checkpointing, with the connections rewired and
no more, and as this project does it: over frames, resolution and depth, and for several backbones;
and the longest clip that fits the memory of a GPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.config.recipe import Precision
from re2tal.memory.ways import TITLES, WAYS
from pipelines.experiments.experiment import Job, Result, Section
from pipelines.experiments.memory_figures import over_depth, over_frames
from pipelines.experiments.memory_numbers import ByWay, Numbers, findings, metrics, tables
from pipelines.experiments.peaks import peaks, resident
from re2tal.backbones.table import backbones


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Peak memory of one training step, in four ways.

    Attributes:
        backbone: what is looked at closely: over frames, resolution and depth, and for what fits.
        others: backbones of which one step is looked at, that with the most frames.
        frames: of the one clip in the batch.
        size: height and width of a frame.
        smaller: other sizes of a frame.
        depths: blocks of the deepest stage.
        precision: what the branches compute in.
        cards: memory of GPUs in GiB, for each of which the longest clip is looked for.
        resident: a model of `pipelines.experiments.models` of which the memory of fresh
            processes is measured, too, on the CPU; with "" that is left out.
        resident_frames: of its clip.
        resident_size: height and width of its frames.
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
    resident_frames: int = 32
    resident_size: int = 112

    def __post_init__(self) -> None:
        unknown = {self.backbone, *self.others} - backbones().keys()
        if unknown:
            raise ValueError(
                f"There is no backbone {', '.join(sorted(unknown))}: choose of "
                f"{', '.join(backbones())}."
            )
        if not self.frames or not self.cards or len(set(self.depths)) < 2:
            raise ValueError(
                "Give frames, cards and at least two depths: memory is looked at over each of them."
            )

    @property
    def name(self) -> str:
        """On the command line and in files."""
        return "memory"

    def jobs(self) -> Sequence[Job]:
        """Every backbone in every way."""
        found = []
        for way in WAYS:
            found.append(self._closely(way))
            found += [self._once(self.backbone, size, way) for size in self.smaller]
            found += [self._once(other, self.size, way) for other in self.others]
            if self.resident:
                found.append(self._resident(way))
        return found

    def _closely(self, way: str) -> Job:
        more = {
            "frames": sorted(self.frames),
            "depths": sorted(self.depths),
            "cards": sorted(self.cards),
        }
        once = self._once(self.backbone, self.size, way)
        return Job(name=once.name, work=once.work, arguments={**once.arguments, **more})

    def _once(self, backbone: str, size: int, way: str) -> Job:
        arguments = {
            "backbone": backbone,
            "way": way,
            "size": size,
            "precision": self.precision,
            "frames": [max(self.frames)],
            "depths": [],
            "cards": [],
        }
        return Job(name=_named(backbone, size, way), work=peaks, arguments=arguments)

    def _resident(self, way: str) -> Job:
        arguments = {
            "model": self.resident,
            "frames": self.resident_frames,
            "size": self.resident_size,
            "way": way,
        }
        return Job(name=_named_resident(way), work=resident, arguments=arguments)

    def section(self, results: Mapping[str, Result]) -> Section:
        """What the report says."""
        found = self._numbers(results)
        step = f"{self.size} px, {self.precision}, one clip"
        return Section(
            title="Memory consumption is reduced",
            text=self._text(step),
            findings=findings(found),
            tables=tables(found),
            figures={
                "memory": over_frames(found, f"{self.backbone}, {step}"),
                "memory_depth": over_depth(found, f"{found.frames[-1]} frames, {step}"),
            },
            metrics=metrics(found),
        )

    def _numbers(self, results: Mapping[str, Result]) -> Numbers:
        def ways(backbone: str, size: int) -> ByWay:
            return {way: results[_named(backbone, size, way)] for way in WAYS}

        return Numbers(
            backbone=self.backbone,
            frames=sorted(self.frames),
            depths=sorted(self.depths),
            cards=sorted(self.cards),
            backbones={name: ways(name, self.size) for name in (self.backbone, *self.others)},
            sizes={size: ways(self.backbone, size) for size in sorted({*self.smaller, self.size})},
            processes={way: results[_named_resident(way)] for way in WAYS} if self.resident else {},
        )

    def _text(self, step: str) -> str:
        text = (
            "The most bytes that tensors take during a forward and backward, from `uint8` frames "
            "to the gradients of the backbone's parameters; parameters and gradients are in it, an "
            f"optimizer is not. {step}, unless a table says otherwise. Predicted with fake tensors "
            "(`re2tal.memory.predict_peak`), which compute nothing, for the operators of a CPU. "
            "Those of a GPU take more: on an H200, 6 % more with plain training, 34 % with "
            "checkpoints, 27 % with rewiring alone and 23 % with ours (README.md). Naive "
            "reversible is rewiring and no more: branches run whole, stems and down-sampling "
            "layers store."
        )
        if not self.resident:
            return text
        return (
            f"{text} For the small step {self.resident} is trained on {self.resident_frames} "
            f"frames of {self.resident_size} px in float32, each way in a process of its own; "
            "parameters and frames are not counted."
        )


def quick() -> Memory:
    """A toy backbone, and nothing measured: it shows that everything runs, and no more."""
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
    return f"{backbone}, {size} px, {TITLES[way]}"


def _named_resident(way: str) -> str:
    return f"a fresh process, {TITLES[way]}"
