"""Fit of a recipe's step to a GPU: its predicted memory there, the choice, and the reasons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pipelines.training.layouts import (
    Considered,
    Layout,
    Needs,
    choose,
    in_order,
    layouts,
    mebibytes,
)
from pipelines.training.workload import SOME_CLASSES, workload_of
from re2tal.errors import UserError
from re2tal.memory import StepMemory, predict_peak
from re2tal.memory.fit import GIBIBYTE, largest_that_fits, parse_size
from re2tal.reversible.controls import reversible_stages, set_coupling
from re2tal.weights import without_weights

if TYPE_CHECKING:
    from pipelines.config.recipe import Recipe
    from re2tal.detector import Detector

AUTO = "auto"
"""Value of `--fit` that stands for the free memory of the GPU."""

CONTEXT = GIBIBYTE
"""Bytes of a process on a GPU that PyTorch's allocator does not hand out: the context of CUDA, and
buffers of its libraries and of NCCL. A round number above the half GiB of the context alone."""

OF_ACTIVATIONS, OF_PIECE = 0.08, 0.3
"""Shares of the activations and of a piece that are added to a prediction, for scratch space of the
GPU's own operators and for fragmentation. Measured and predicted GiB of Swin-T's step on 768 frames
on an H200: 59.6 and 56.2 with stored activations, 4.60 and 3.73 in pieces of 2 GiB, 3.85 and 3.73
in smaller pieces. Steps of SlowFast-101 took 1 to 8 % more than predicted."""
_PIXELS = 32  # unit of the frames' size that is suggested where nothing fits


class Predictor:
    """Predictor of a recipe's steps in all layouts, with a cache.

    Attributes:
        most: upper limit of the number of layouts to predict, for the progress; 0 where layouts
            are not being compared.

    Args:
        recipe: the recipe.
        classes: names of the action classes.
        say: function that receives a line before each prediction.
    """

    def __init__(
        self, recipe: Recipe, classes: Sequence[str], say: Callable[[str], object]
    ) -> None:
        self.recipe, self._classes, self._say = recipe, tuple(classes), say
        self.device = "cuda" if recipe.scale.gpu else "cpu"
        self.most = 0
        self._detectors: dict[bool, Detector[Any, Any]] = {}
        self._steps: dict[tuple[Layout, int, int], StepMemory] = {}

    def detector(self, *, reversible: bool) -> Detector[Any, Any]:
        """Build the detector, rewired or not, without weights and in training mode.

        Raises:
            ValueError: if it is to be rewired and cannot be.
        """
        # Imported here, because a backbone by itself is also predicted where there is no PyAV.
        from pipelines.training.model import build_detector, train_mode

        if reversible not in self._detectors:
            model = replace(self.recipe.model, reversible=reversible, stored=False, slice_mb=None)
            shown = replace(self.recipe, model=model)
            built = without_weights(lambda: build_detector(shown, self._classes, weights=None))
            train_mode(built, model)
            self._detectors[reversible] = built
        return self._detectors[reversible]

    @property
    def batch_statistics(self) -> bool:
        """Presence of a layer in the detector that computes statistics over a batch."""
        modules = self.detector(reversible=self.recipe.model.reversible).modules()
        return any(isinstance(m, _BatchNorm) and m.training for m in modules)

    @property
    def branches(self) -> int:
        """Number of branches (F and G) in the backbone's rewired stages, at least 1."""
        stages = reversible_stages(self.detector(reversible=True))
        return max(1, 2 * sum(len(stage.rewired) for _, stage in stages))

    def step(self, layout: Layout, *, frames: int | None = None, size: int | None = None) -> Any:
        """Predict the memory of a pass; if a step has several, with accumulated gradients."""
        from pipelines.training.model import run_as_on

        recipe = self.recipe
        at = frames or recipe.data.window.frames, size or recipe.data.size
        if (layout, *at) not in self._steps:
            work = replace(workload_of(recipe), batch=layout.batch, frames=at[0], size=at[1])
            about = "looking for what would fit"
            if self.most:
                about = f"considering {len(self._steps) + 1} of at most {self.most}"
            self._say(f"{about}: {work}, {layout.title(self.device)}")
            model = layout.applied(recipe).model
            detector = self.detector(reversible=layout.reversible)
            run_as_on(self.device, detector, model)
            if model.coupling_epochs is not None:
                # before the coupling has reached its end, stages store their activations
                set_coupling(detector, alpha=0.5, beta=0.5)

            def forward(model: Any, *inputs: Any) -> Any:
                for parameter in model.parameters():
                    if layout.passes > 1 and parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
                return work.forward(model, *inputs)

            self._steps[(layout, *at)] = predict_peak(detector, *work.inputs("meta"), step=forward)
        return self._steps[(layout, *at)]

    def needs(self, layout: Layout, *, frames: int | None = None, size: int | None = None) -> Needs:
        """Predict all memory that a layout needs; see `step`."""
        from pipelines.training.optimizer import build_optimizer

        step = self.step(layout, frames=frames, size=size)
        scale, optim = self.recipe.scale, self.recipe.optim
        detector = self.detector(reversible=layout.reversible)
        groups = build_optimizer(detector, optim).param_groups
        trained = [sum(p.numel() * p.element_size() for p in g["params"]) for g in groups]
        gpu = self.device == "cuda"
        weights, gradients = step.parameters + step.buffers, sum(trained)
        # AdamW's moments and the average: sharded (FSDP2), or whole, beside the buckets of DDP
        shards = scale.workers if scale.sharded else 1
        beside = weights if scale.sharded else gradients
        kept = beside + (2 * gradients + weights) // shards
        state = weights + gradients + kept
        # on GPUs, the multi-tensor AdamW makes a temporary tensor for each parameter of a group
        update = state + step.inputs + (max(trained, default=0) // shards if gpu else 0)
        peak = max(step.peak + kept, update)
        piece = 0
        if layout.reversible and not layout.stored:
            piece = min(layout.piece(self.device), step.activations)
        scratch = OF_ACTIVATIONS * step.activations + OF_PIECE * piece
        return Needs(
            state=state,
            activations=max(0, peak - state),
            margin=CONTEXT + int(scratch),
            earlier=int((1 + OF_ACTIVATIONS) * gradients) if layout.passes > 1 else 0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Chosen layout of a recipe's step.

    Attributes:
        asked: the recipe as it was given.
        layout: the choice.
        budget: bytes of the GPU that it fits.
        considered: all layouts that were considered.
        remarks: reasons for the choice and its limits, in sentences.
    """

    asked: Recipe
    layout: Layout
    budget: int
    considered: Sequence[Considered]
    remarks: Sequence[str] = field(default=())

    @property
    def recipe(self) -> Recipe:
        """Recipe with its step laid out."""
        return self.layout.applied(self.asked)

    def rows(self) -> list[dict[str, Any]]:
        """Tabulate the layouts that were considered; sizes are in GiB."""
        device = "cuda" if self.asked.scale.gpu else "cpu"
        window = f"{self.asked.data.window.frames} x {self.asked.data.size}"
        found: list[dict[str, Any]] = []
        for one in self.considered:
            layout, needs = one.layout, one.needs
            verdict = "no, nor does less" if needs is None else "no"
            found.append(
                {
                    "frames x size x batch": f"{window} x {layout.batch}",
                    "passes": layout.passes,
                    "way": layout.title(device),
                    "state, GiB": _gib(needs, "state"),
                    "activations, GiB": _gib(needs, "activations"),
                    "margin, GiB": _gib(needs, "margin"),
                    "peak, GiB": _gib(needs, "peak"),
                    "time": round(one.time, 2),
                    "fits": "chosen" if layout == self.layout else "yes" if one.fits else verdict,
                }
            )
        return found


def text_of(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format rows, at least one, as lines of text."""
    lines = [list(table[0]), *(list(map(str, row.values())) for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def budget_of(size: str, recipe: Recipe, free: Callable[[], Sequence[int]]) -> int:
    """Read the value of `--fit` as bytes.

    Args:
        size: a size of memory, or `AUTO` for the smallest free memory of all GPUs.
        recipe: the recipe.
        free: function that lists the free bytes of each GPU.

    Raises:
        UserError: if the size cannot be read, or if there is no GPU for `AUTO`.
    """
    if size != AUTO:
        try:
            return parse_size(size)
        except ValueError as problem:
            raise UserError(f"--fit: {problem} Or give {AUTO}.") from problem
    if not recipe.scale.gpu:
        raise UserError(
            "--fit auto asks a GPU for its free memory, but this recipe trains without one "
            "(--scale.no-gpu): give a size, such as --fit 24GiB."
        )
    found = free()
    if not found:
        raise UserError(
            "--fit auto asks a GPU for its free memory, but there is none: give the memory of the "
            "GPU that will train, such as --fit 24GiB."
        )
    return min(found)


def fit_recipe(
    recipe: Recipe,
    budget: int,
    *,
    classes: Sequence[str] = SOME_CLASSES,
    say: Callable[[str], object] = print,
) -> Fit:
    """Choose the fastest layout of a recipe's step that fits.

    Args:
        recipe: the recipe, with videos.
        budget: bytes of a GPU for one worker.
        classes: names of the action classes.
        say: function that receives a line before each prediction, which takes seconds.

    Raises:
        UserError: if no layout fits; the message says how much the smallest needs, and which
            shorter window or smaller frames would fit.
    """
    if recipe.data.features:
        raise UserError(
            "--fit lays out a step on frames, but with --data.features the localizer trains on "
            "features, which takes little memory: leave --fit out."
        )
    predictor = Predictor(recipe, classes, say)
    split = not predictor.batch_statistics
    found = layouts(recipe, split=split)
    if not recipe.model.reversible and not _can_be_rewired(predictor):
        found = [layout for layout in found if not layout.reversible]
    predictor.most = len(found)
    # a window's stored activations, predicted from the smallest layout that stores them
    least = min(found, key=lambda one: (one.reversible and not one.stored, one.batch))
    activations = predictor.step(least).activations
    ordered = in_order(
        recipe,
        found,
        per_window=activations // least.batch,
        branches=predictor.branches if any(one.reversible for one in found) else 1,
    )
    considered = choose(ordered, predictor.needs, budget, device=predictor.device)
    chosen = next((one for one in considered if one.fits), None)
    if chosen is None:
        raise UserError(_nothing_fits(predictor, considered, budget, split=split))
    return Fit(
        asked=recipe,
        layout=chosen.layout,
        budget=budget,
        considered=considered,
        remarks=list(_remarks(recipe, chosen.layout, budget, split=split)),
    )


def _can_be_rewired(predictor: Predictor) -> bool:
    try:
        predictor.detector(reversible=True)
    except ValueError:
        return False
    return True


def _remarks(recipe: Recipe, chosen: Layout, budget: int, *, split: bool) -> Iterator[str]:
    """Yield the reason for the choice and the limits of what could be chosen, in sentences."""
    device = "cuda" if recipe.scale.gpu else "cpu"
    windows = recipe.batch_size * recipe.optim.accumulation
    workers = recipe.scale.workers
    yield (
        f"Chosen: batch {chosen.batch}, passes {chosen.passes}, {chosen.title(device)}: the "
        f"fastest, by estimate, of what fits {_size(budget)}. A step keeps the recipe's learning "
        f"rates and its number of windows, {workers * windows} (workers {workers} x passes "
        f"{chosen.passes} x batch {chosen.batch})."
    )
    if not split:
        yield _BATCH_NORMS.format(batch=recipe.batch_size)
    if chosen.reversible != recipe.model.reversible:
        yield (
            "The recipe's network fits in no layout, so it is rewired: IT COMPUTES ANOTHER "
            "FUNCTION, to which its weights have to be finetuned first (finetune_backbone.py)."
        )
    if recipe.model.coupling_epochs is not None:
        yield (
            "Until --model.coupling-epochs have passed, activations are stored in every layout: "
            "the needs are predicted for that time."
        )
    if recipe.scale.sharded:
        yield (
            "With --scale.sharded, parameters and gradients are counted whole, as they are while a "
            "stage is gathered: an upper bound."
        )
    yield (
        f"State: parameters, gradients, DDP's copy of them, AdamW's moments, moving average. "
        f"Margin: {CONTEXT / GIBIBYTE:g} GiB for the process, {OF_ACTIVATIONS:.0%} of the "
        f"activations and {OF_PIECE:.0%} of a piece (measured on an H200). Time: an estimate "
        "relative to stored activations in one pass."
    )


_BATCH_NORMS = (
    "BatchNorms are trained, and their statistics are those of a pass: only the recipe's batch of "
    "{batch} is considered (--model.norms statistics keeps the backbone's statistics, which allows "
    "smaller passes)."
)


def _nothing_fits(
    predictor: Predictor, considered: Sequence[Considered], budget: int, *, split: bool
) -> str:
    """Say how much the smallest layout needs, and what would fit."""
    recipe = predictor.recipe
    known = [(one.needs.peak, one.layout) for one in considered if one.needs]
    peak, least = min(known, key=lambda one: one[0])
    data = recipe.data
    window = f"{data.window.frames} frames of {data.size} pixels"
    norms = f" {_BATCH_NORMS.format(batch=recipe.batch_size)}" if not split else ""
    return (
        f"No layout of {recipe.name} fits {_size(budget)}: the smallest, batch {least.batch} of "
        f"{window}, {least.title(predictor.device)}, needs {_size(peak)}.{norms} "
        f"{_suggestion(predictor, least, budget)}"
    )


def _suggestion(predictor: Predictor, layout: Layout, budget: int) -> str:
    """Name the longest window and the largest frames that would fit, without taking them."""
    data, detector = predictor.recipe.data, predictor.detector(reversible=layout.reversible)
    predictor.most = 0
    unit = math.lcm(16, detector.multiple)

    def largest(name: str, unit: int, now: int) -> int:
        try:
            return unit * largest_that_fits(
                lambda units: predictor.needs(layout, **{name: units * unit}).peak,
                budget,
                start=max(1, now // unit // 2),
            )
        except (ValueError, RuntimeError, UserError):  # the model takes no other length or size
            return 0

    frames = largest("frames", unit, data.window.frames)
    size = largest("size", _PIXELS, data.size)
    options = [f"--data.window.frames {frames}"] if 0 < frames < data.window.frames else []
    options += [f"--data.size {size}"] if 0 < size < data.size else []
    if not options:
        return "Neither shorter windows nor smaller frames would fit: take a smaller model."
    return (
        f"{' or '.join(options)} would fit, but is another experiment than the recipe's, so it is "
        "not chosen automatically."
    )


def _gib(needs: Needs | None, part: str) -> str:
    return "" if needs is None else f"{getattr(needs, part) / GIBIBYTE:.2f}"


def _size(size: int) -> str:
    return f"{size / GIBIBYTE:.4g} GiB" if size >= GIBIBYTE else mebibytes(size)
