"""What reversible training costs in time.

Each way to train takes its turn in every round, on one model in one process, so that the ratios of
a round tell the ways apart whatever else the machine does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.experiments.experiment import Job, Result, Section
from pipelines.experiments.speed_figures import over_depth, ratios
from pipelines.experiments.speed_numbers import findings, metrics, of_models, of_stacks
from pipelines.experiments.timings import against_depth, steps
from pipelines.experiments.models import MODELS

_STEPS, _DEPTH = "steps", "depth"


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Time of a training step, in five ways, and how it grows with depth.

    Attributes:
        models: what is trained on a CPU, in float32: of `pipelines.experiments.models`.
        frames: of the one clip in the batch.
        size: height and width of a frame.
        gpu_models: what is trained instead if there is a GPU, in bfloat16.
        gpu_frames: likewise.
        gpu_size: likewise.
        depths: numbers of residual branches of a stack of Swin blocks, each even.
        grid: tokens of that stack in time, height and width on a CPU.
        rounds: how often each way takes its turn, at least 3 times.
    """

    models: tuple[str, ...] = ("swin3d_t", "slowfast_50")
    frames: int = 32
    size: int = 112
    gpu_models: tuple[str, ...] = ("swin3d_t", "slowfast_101")
    gpu_frames: int = 256
    gpu_size: int = 224
    depths: tuple[int, ...] = (12, 24, 48, 96)
    grid: tuple[int, int, int] = (4, 16, 16)
    rounds: int = 5

    def __post_init__(self) -> None:
        unknown = {*self.models, *self.gpu_models} - MODELS.keys()
        if unknown:
            raise ValueError(
                f"There is no model {', '.join(sorted(unknown))}: choose of {', '.join(MODELS)}."
            )
        odd = [depth for depth in self.depths if depth % 2]
        if odd:
            raise ValueError(f"A Swin block has two branches, so that no depth is {odd[0]}.")
        if self.rounds < 3:
            raise ValueError(f"Quartiles need 3 rounds, but rounds is {self.rounds}.")

    @property
    def name(self) -> str:
        """On the command line and in files."""
        return "speed"

    def jobs(self) -> Sequence[Job]:
        """Whole models, and stacks of several depths."""
        cpu = {"frames": self.frames, "size": self.size, "bfloat16": False}
        gpu = {"frames": self.gpu_frames, "size": self.gpu_size, "bfloat16": True}
        models = {
            "on_cpu": [{"model": model, **cpu} for model in self.models],
            "on_gpu": [{"model": model, **gpu} for model in self.gpu_models],
            "rounds": self.rounds,
        }
        stacks = {"depths": sorted(self.depths), "grid": self.grid, "rounds": self.rounds}
        return [
            Job(name=_STEPS, work=steps, arguments=models, alone=True),
            Job(name=_DEPTH, work=against_depth, arguments=stacks, alone=True),
        ]

    def section(self, results: Mapping[str, Result]) -> Section:
        """What the report says."""
        models, stacks = results[_STEPS], results[_DEPTH]
        rows, deeper = of_models(models["times"]), of_stacks(sorted(self.depths), stacks)
        width, grid = stacks["stage"]["width"], "x".join(map(str, stacks["stage"]["grid"]))
        return Section(
            title="What it costs in time",
            text=(
                f"A step is a forward and a backward without an optimizer, on {models['device']}. "
                f"The ways take turns in one process, in {self.rounds} rounds after one that does "
                "not count; ratios are medians over the rounds, with their quartiles. Against "
                "depth: a stack of Video Swin blocks of width "
                f"{width} on {grid} tokens; its peak is that of the tensors, "
                "parameters and gradients included. To run the replay of one branch beside the "
                "gradients of the next on two CUDA streams, as PaReprop does (arXiv 2306.09342), "
                "is not tried: that can be judged on a GPU only."
            ),
            findings=findings(models["times"], deeper),
            tables={**{f"Time of a step: {step}": r for step, r in rows.items()}, "Depth": deeper},
            figures={"speed": ratios(rows), "speed_depth": over_depth(deeper)},
            metrics=metrics(rows),
        )


def quick() -> Speed:
    """A toy model and shallow stacks: it shows that everything runs, and no more."""
    return Speed(models=("toy_swin",), frames=8, size=32, depths=(4, 12), grid=(4, 8, 8), rounds=3)
