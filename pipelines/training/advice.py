"""Advice for a new data set: choose a recipe from the data and the machine, and give the reasons.

Every choice follows from facts that any data set has (lengths of segments and gaps, their number,
frame rates) and from the machine's memory. Of the classes only the names are used.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

import re2tal
from pipelines.config.annotations import AnnotationConfig
from pipelines.config.recipe import (
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ScaleConfig,
)
from pipelines.training.facts import Facts, Machine
from pipelines.training.model import build_detector
from pipelines.training.workload import workload_of
from re2tal.backbones.protocol import Backbone
from re2tal.backbones.table import entry_of
from re2tal.errors import count_of, shortened
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.memory import predict_peak
from re2tal.memory.fit import GIBIBYTE
from re2tal.reversible.coupling import SMALLEST_PIECE
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.windows import WindowConfig
from re2tal.weights import without_weights

FEW = 10
"""Number of training instances below which a class can hardly be learnt."""

# Steps of the detector, and of the finetuning before it. With any settings, a few hundred segments
# are memorised within a thousand steps; processor cores need ten minutes for their pair of numbers.
_STEPS_ON_GPU, _STEPS_ON_CORES = (2000, 600), (600, 200)
_SIDES = ("left", "right", "clockwise")  # words in class names that a horizontal flip makes wrong


@dataclass(slots=True)
class Advice:
    """Recipe, the reason for each of its choices, and warnings.

    Attributes:
        recipe: the configuration.
        backbone: name of the backbone in the table.
        reasons: field of the recipe to a line on it.
        warnings: sentences.
    """

    recipe: Recipe
    backbone: str
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def advise(facts: Facts, machine: Machine) -> Advice:
    """Choose all settings of a recipe."""
    advice = _fitting(facts, machine)
    _schedule(advice, facts)
    _augmentation(advice, facts)
    advice.warnings += _warnings(facts, advice.recipe, machine)
    return advice


@dataclass(frozen=True, kw_only=True, slots=True)
class _Size:
    """Size of model and window that may be tried."""

    backbone: str
    size: int
    frames: int  # upper limit of a window's frames
    batch: int


# Sizes for a GPU, from the largest to the smallest; then one that processor cores train in minutes.
_ON_GPU = tuple(
    _Size(backbone="swin_t", size=size, frames=frames, batch=batch)
    for size, frames, batch in (
        (224, 1024, 2),
        (224, 1024, 1),
        (224, 512, 1),
        (160, 512, 1),
        (112, 512, 1),
        (112, 256, 1),
    )
)
_SMALL = _Size(backbone="swin_toy", size=64, frames=512, batch=2)


def _is_small(backbone: str) -> bool:
    return backbone == _SMALL.backbone


def _fitting(facts: Facts, machine: Machine) -> Advice:
    """Advise the first size whose predicted memory fits; if none does, the smallest, and warn."""
    for choice in (*_ON_GPU, _SMALL) if machine.gpus else (_SMALL, replace(_SMALL, batch=1)):
        advice = _sized(facts, machine, choice)
        needed = _memory(advice.recipe, facts.classes)
        advice.reasons["memory"] = (
            f"a step takes about {needed / GIBIBYTE:.2f} GiB (predicted), "
            f"and may take {0.85 * machine.memory / GIBIBYTE:.1f} GiB"
        )
        if needed <= 0.85 * machine.memory:  # the rest: the allocator's reserve, other processes
            return advice
    advice.warnings.append(
        f"the smallest model that is tried does not fit: {advice.reasons['memory']}"
    )
    return advice


def _memory(recipe: Recipe, classes: Sequence[str]) -> int:
    """Predict the bytes of a step, with the optimizer's state and the average of the weights."""
    detector = without_weights(lambda: build_detector(recipe, classes, None)).train()
    if recipe.scale.gpu:
        re2tal.rewire(detector.backbone, slice_bytes=SMALLEST_PIECE["cuda"])  # as it will run there
    work = workload_of(recipe)
    found = predict_peak(detector, *work.inputs("meta"), step=work.forward)
    return found.peak + 3 * found.parameters  # AdamW's two moments, and the moving average


def _sized(facts: Facts, machine: Machine, choice: _Size) -> Advice:
    """Choose the data and the model for one size, and the workers that train it."""
    entry = entry_of(choice.backbone)
    backbone = entry.make()
    built = without_weights(backbone.build)
    small = _is_small(choice.backbone)
    gpus = machine.gpus if machine.here or not small else 0
    workers = max(1, gpus) if gpus else min(2, machine.cores)
    windows = choice.batch * workers
    window, localizer, reasons = _in_time(facts, choice, built, windows)
    recipe = Recipe(
        name="my_recipe",
        epochs=1,
        batch_size=choice.batch,
        data=DataConfig(
            **{one.name: getattr(facts.data, one.name) for one in fields(AnnotationConfig)},
            videos=facts.data.videos,
            training_subset=_unusual(facts.subsets[0], facts.data.record.training),
            validation_subset=_unusual(facts.subsets[1], facts.data.record.validation),
            size=choice.size,
            window=window,
        ),
        model=ModelConfig(
            backbone=backbone,
            weights=entry.weights[0],
            mean=entry.mean,
            std=entry.std,
            localizer=localizer,
        ),
        optim=OptimConfig(backbone_lr=1e-5, localizer_lr=1e-4),
        scale=ScaleConfig(workers=workers)
        if gpus
        else ScaleConfig(workers=workers, gpu=False, cpus_per_worker=0.5),
    )
    reasons |= {
        "model.weights": "another path, URI or name for weights of yours",
        "scale.workers": machine.described,
        "data.size": "the size that the weights were trained on"
        if small
        else "if memory allows, 224",
        "batch_size": f"{windows} windows a step on {workers} worker{'s' * (workers > 1)}",
        "model.backbone": f"{choice.backbone}, the largest of those tried that fits"
        if not small
        else "small, for minutes on processor cores; --memory plans for a GPU",
    }
    return Advice(recipe=recipe, backbone=choice.backbone, reasons=reasons)


def _in_time(
    facts: Facts, choice: _Size, backbone: Backbone, windows: int
) -> tuple[WindowConfig, ActionFormerConfig, dict[str, str]]:
    """Fit window and pyramid to the segments' lengths, for `windows` a step; give the reasons."""
    small = _is_small(choice.backbone)
    stride, longest = backbone.temporal_stride, facts.quantile(0.95)
    native = facts.rate or 30.0
    # 15, the rate of pretraining, at most; less if the largest window must hold long actions
    fps = min(native, 15.0, choice.frames / max(1.5 * longest, 1e-3))
    fps = float(f"{max(fps, min(native, 1.0)):.3g}")
    features = fps / stride  # features per second
    # a regression range is a distance to an end of the segment: half of its length at its middle
    first = float(f"{min(max(facts.quantile(0.2) * features / 2, 3.0), 32.0):.2g}")
    levels = 2 + math.ceil(math.log2(max(facts.quantile(0.99) * features / 2 / first, 1.0)))
    levels = min(max(levels, 3), 7)
    # frames must fill whole features of the coarsest level, and suit the backbone
    unit = math.lcm(backbone.multiple, stride * 2 ** (levels - 1))
    frames = max(1.5 * longest * fps, 2 * unit, 64 if small else 256)
    frames = min(math.ceil(frames / unit) * unit, max(choice.frames // unit, 1) * unit)
    seconds = frames / fps
    window = WindowConfig(
        frames=frames,
        fps=fps,
        overlap=min(max(0.25, round(2 * longest * fps / frames - 1, 2)), 0.5),
        sliding_overlap=0.5,
    )
    per_window = len(facts.instances) * min(seconds / max(facts.seconds, seconds), 1.0)
    width, stem, reach = (96, 1, 9) if small else (256, 2, 19)
    localizer = ActionFormerConfig(
        width=width,
        head_width=width,
        stem_layers=stem,
        levels=levels,
        window=reach,
        first_range=first,
        initial_normalizer=float(f"{max(3 * windows * per_window, 1.0):.2g}"),
        drop_path=0.1,
    )
    reasons = {
        "data.window.fps": f"the files have {native:.4g}; a feature lasts {stride / fps:.2g} s",
        "data.window.frames": f"{seconds:.3g} s; 95% of the segments last up to {longest:.3g} s",
        "data.window.overlap": "so that each segment is seen whole, at a random place",
        "data.window.sliding_overlap": "each segment of up to half a window lies whole in one",
        "model.localizer.levels": _shares(facts, localizer, features),
        "model.localizer.first_range": f"20% of segments last up to {facts.quantile(0.2):.3g} s",
        "model.localizer.initial_normalizer": f"{windows} x {per_window:.2g} segments a step",
        "model.localizer.width": f"narrow: there are {len(facts.instances)} segments to learn from",
        "model.localizer.window": "features that a feature attends to, on each level",
    }
    return window, localizer, reasons


def _unusual(name: str, usual: str) -> str | None:
    return None if name == usual else name


def _shares(facts: Facts, localizer: ActionFormerConfig, features: float) -> str:
    """Say which share of the segments each level of the pyramid holds."""
    if not len(facts.lengths):
        return "no segment to fit the levels to"
    bounds = [localizer.first_range * 2**level for level in range(localizer.levels - 1)]
    # a point in the middle of a segment has half of its length on either side
    level = np.searchsorted(bounds, facts.lengths * features / 2)
    counts = np.bincount(level, minlength=localizer.levels) / len(facts.lengths)
    upto = [f"to {2 * bound / features:.3g} s" for bound in bounds] + ["longer"]
    return ", ".join(f"{name} {share:.0%}" for name, share in zip(upto, counts, strict=True))


def _schedule(advice: Advice, facts: Facts) -> None:
    """Choose epochs, learning rates and the decay of the EMA from the number of windows."""
    recipe = advice.recipe
    window, small = recipe.data.window, _is_small(advice.backbone)
    seconds = window.frames / float(window.fps or 1)
    step = seconds * (1 - window.overlap)
    windows = sum(1 + math.ceil(max(0.0, v.duration - seconds) / step) for v in facts.training)
    steps = max(1, windows // (recipe.batch_size * recipe.scale.workers))
    wanted, clips_wanted = _STEPS_ON_CORES if small else _STEPS_ON_GPU
    epochs = min(max(math.ceil(wanted / steps), 5), 60)
    clip = _clip_frames(facts, recipe)
    count = len(facts.instances)
    per_step = max(1, recipe.batch_size * window.frames // clip) * recipe.scale.workers
    clip_steps = count // per_step
    finetuned = 0
    if clip_steps and len({i.label for i in facts.instances}) > 1:
        finetuned = min(max(math.ceil(clips_wanted / clip_steps), 3), 30)
    elif count:
        advice.reasons["finetune.epochs"] = (
            "left out: there are too few segments to tell classes apart"
        )
    rates = (3e-4, 1e-3, 3e-4) if small else (1e-5, 1e-4, 1e-4)
    # 1 / (1 - decay), over about as many steps of which an EMA averages, is a tenth of all steps
    average = min(max(1 - 10 / (steps * epochs), 0.9), 0.999)
    advice.recipe = replace(
        recipe,
        epochs=epochs,
        evaluate_from=max(1, epochs // 3),
        finetune=FinetuneConfig(epochs=finetuned, frames=clip, lr=rates[2]),
        optim=OptimConfig(
            backbone_lr=rates[0],
            localizer_lr=rates[1],
            warmup_epochs=round(0.05 * epochs, 2),
            ema=float(f"{average:.3f}"),
            precision="float32" if not recipe.scale.gpu else "bfloat16",
        ),
    )
    advice.reasons |= {
        "epochs": f"{steps} steps of {windows} windows an epoch; at least {wanted} in all",
        "evaluate_from": "the first epochs are not worth an evaluation",
        "optim.backbone_lr": "below the localizer's: the backbone is pretrained",
        "optim.warmup_epochs": "a twentieth of the epochs",
        "optim.precision": "half the memory and more speed"
        if recipe.scale.gpu
        else "lower precision gains nothing on processor cores",
        "finetune.frames": f"{clip / float(window.fps or 1):.2g} s, as a typical segment",
        "finetune.lr": "rate of the backbone; that of the classifier is ten times as high",
        "optim.localizer_lr": "the localizer begins with random weights",
        "optim.ema": f"an average over about a tenth of the {steps * epochs} steps",
    }
    advice.reasons.setdefault(
        "finetune.epochs",
        f"the backbone first learns the classes from {count} segments, {clip_steps} steps an epoch",
    )


def _clip_frames(facts: Facts, recipe: Recipe) -> int:
    """Return the frames of a clip that holds a typical segment, as a power of two."""
    frames = max(facts.quantile(0.5) * float(recipe.data.window.fps or 1), 1.0)
    return int(min(max(2 ** round(math.log2(frames)), 16), 64, recipe.data.window.frames))


def _augmentation(advice: Advice, facts: Facts) -> None:
    """Choose the augmentation; if the name of a class names a side, frames are not flipped."""
    recipe = advice.recipe
    size = recipe.data.size
    sided = [name for name in facts.classes if any(w in name.casefold() for w in _SIDES)]
    augmentation = AugmentationConfig(
        source_size=math.ceil(size * 8 / 7),
        crop_area=(0.5, 1.0),
        flip=0.0 if sided else 0.5,
        brightness=0.2,
        contrast=0.2,
    )
    advice.recipe = replace(recipe, data=replace(recipe.data, augmentation=augmentation))
    advice.reasons |= {
        "data.augmentation": f"{len(facts.training)} videos: crops and light are varied",
        "data.augmentation.source_size": "larger, so that crops keep their detail",
        "data.augmentation.flip": f"{sided[0]!r} is another action in a mirror"
        if sided
        else "set it to 0 if a mirror image is another action",
    }


def _warnings(facts: Facts, recipe: Recipe, machine: Machine) -> Iterator[str]:
    """Yield warnings about the data, the model and the machine."""
    if facts.missing:
        listed = shortened([f"{v}: {why}" for v, why in sorted(facts.missing.items())], 3)
        if facts.unusable > recipe.data.max_failed:
            allowed = math.ceil(100 * facts.unusable) / 100
            outcome = (
                f"more than the {recipe.data.max_failed:.0%} with which train.py starts: mend "
                f"them, leave them out (--exclude FILE), or give it --data.max-failed {allowed:.2g}"
            )
        else:
            outcome = "they are left out"
        yield (
            f"of {facts.sought} videos, of which {facts.opened} were opened, {len(facts.missing)} "
            f"cannot be used ({'; '.join(listed)}): {outcome}"
        )
    if facts.subsets[0] == facts.subsets[1]:
        yield (
            f"all videos are in the subset {facts.subsets[0]!r}: training and evaluation use the "
            "same ones, so the mAP says nothing; put some videos into a subset 'validation'"
        )
    for name, videos in zip(facts.subsets, (facts.training, facts.validation), strict=True):
        labels = {i.label for video in videos for i in video.instances}
        if not labels:
            yield f"the subset {name!r} has no annotated segment: train.py will refuse it"
        elif lacking := [repr(label) for label in facts.classes if label not in labels]:
            yield f"the subset {name!r} has no instance of {', '.join(shortened(lacking, 10))}"
    counts = Counter(instance.label for instance in facts.instances)
    few = [f"{label!r} {number}" for label, number in sorted(counts.items()) if number < FEW]
    if few:
        yield (
            f"{count_of(len(few), 'class has', 'classes have')} fewer than {FEW} training "
            f"instances, and can hardly be learnt: {', '.join(shortened(few, 10))}"
        )
    stride = recipe.model.backbone.build().temporal_stride
    feature = stride / float(recipe.data.window.fps or 1)
    short = int((facts.lengths < 2 * feature).sum())
    if short:
        yield (
            f"{count_of(short, 'segment is', 'segments are')} shorter than two features "
            f"({2 * feature:.2g} s), and will hardly be found: raise data.window.fps if the files "
            "allow it"
        )
    seconds = recipe.data.window.frames / float(recipe.data.window.fps or 1)
    long = int((facts.lengths > seconds).sum())
    if long:
        yield (
            f"{count_of(long, 'segment is', 'segments are')} longer than a window of "
            f"{seconds:.3g} s, and can be found only in part"
        )
    if recipe.scale.gpu and not torch.cuda.is_available():
        yield f"planned for {machine.described}: this machine has none"
