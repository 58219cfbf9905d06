"""Advice for a new data set: choose a recipe from the data and the machine, and give the reasons.

Every choice follows from facts that any data set has (lengths of segments and gaps, their number,
frame rates) and from the machine's memory. Of the classes only the names are used.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

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
from pipelines.data.clip_plan import gaps_of
from pipelines.data.inputs import resolved
from pipelines.data.plan import read_annotations
from pipelines.data.videos import Probe, find_videos, opened, probe_files_here
from pipelines.training.model import build_detector
from pipelines.training.workload import workload_of
from re2tal.annotations import Instance, VideoAnnotation
from re2tal.backbones.table import entry_of
from re2tal.errors import UserError, count_of, shortened
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.memory import predict_peak
from re2tal.memory.fit import GIBIBYTE
from re2tal.reversible.coupling import SMALLEST_PIECE
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.windows import WindowConfig

FEW = 10
"""Number of training instances below which a class can hardly be learnt."""

# Steps of the detector, and of the finetuning before it. With any settings, a few hundred segments
# are memorised within a thousand steps; processor cores need ten minutes for their pair of numbers.
_STEPS_ON_GPU, _STEPS_ON_CORES = (2000, 600), (600, 200)
_LOOKED_AT = 40  # videos that are opened, for the frame rate and to find unreadable files
_SIDES = ("left", "right", "clockwise")  # words in class names that a horizontal flip makes wrong
_TRAINING = ("training", "train", "trainval", "Train", "Training")
_VALIDATION = ("validation", "val", "valid", "test", "testing", "Validation", "Val", "Test")


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRecipeConfig(AnnotationConfig):
    """Data set, and the memory that a recipe for it may take.

    Attributes:
        videos: folder of the video files, named by id; a path or a URI.
        memory: memory of the GPU that will train, such as 24GiB; by default that of this machine's
            GPU, and without one a small model for the processor is chosen.
    """

    videos: str | None = None
    memory: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Facts about a data set.

    Attributes:
        data: place of the data set, with absolute paths.
        classes: names of the classes.
        training: usable videos of the training subset.
        validation: usable videos of the validation subset.
        subsets: names of the training and the validation subset.
        rate: median frames per second of the files, None if no file could be opened.
        missing: video id to the reason why it cannot be used.
        opened: number of annotated videos of both subsets, which were looked for.
    """

    data: NewRecipeConfig
    classes: tuple[str, ...]
    training: tuple[VideoAnnotation, ...]
    validation: tuple[VideoAnnotation, ...]
    subsets: tuple[str, str]
    rate: float | None
    missing: Mapping[str, str]
    opened: int

    @property
    def instances(self) -> list[Instance]:
        """Instances of the training videos."""
        return [instance for video in self.training for instance in video.instances]

    @property
    def lengths(self) -> NDArray[np.float64]:
        """Lengths in seconds of the training segments; of the validation's if there are none."""
        every = self.instances or [i for video in self.validation for i in video.instances]
        return np.array([i.end - i.start for i in every], np.float64)

    @property
    def seconds(self) -> float:
        """Seconds of the training videos."""
        return sum(video.duration for video in self.training)

    def quantile(self, share: float) -> float:
        """Return a quantile of the segments' lengths, in seconds; 5 if there is no segment."""
        return (
            float(np.quantile(self.lengths, share, method="inverted_cdf"))
            if len(self.lengths)
            else 5.0
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Machine that trains.

    Attributes:
        gpus: number of GPUs, 0 for processor cores alone.
        here: true for this machine, false for one that is planned for.
        memory: bytes that a worker's step may take.
        cores: processor cores.
        described: the machine in words.
    """

    gpus: int
    here: bool
    memory: int
    cores: int
    described: str


def this_machine(memory: int | None = None) -> Machine:
    """Look at this machine, or plan for a GPU with `memory` bytes."""
    cores = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if memory is not None:
        described = f"a GPU of {memory / GIBIBYTE:.1f} GiB, as asked for"
        return Machine(
            gpus=max(1, gpus), here=gpus > 0, memory=memory, cores=cores, described=described
        )
    if gpus:
        free = torch.cuda.get_device_properties(0).total_memory
        described = f"{gpus} x {torch.cuda.get_device_name(0)}, {free / GIBIBYTE:.1f} GiB"
        return Machine(gpus=gpus, here=True, memory=free, cores=cores, described=described)
    free = psutil.virtual_memory().available
    described = f"no GPU, {cores} processor cores, {free / GIBIBYTE:.1f} GiB free"
    return Machine(gpus=0, here=True, memory=free // 2, cores=cores, described=described)


def look_at(config: NewRecipeConfig, *, probe: Probe = probe_files_here) -> Facts:
    """Collect the facts about a data set, and open some of its videos.

    Args:
        config: place of the data set.
        probe: function that opens videos.

    Raises:
        AnnotationError: with every problem in the annotations.
        UserError: if something was not given or is not there; if there is no video.
    """
    config = resolved(config, needed=("annotations", "videos"))
    annotations = read_annotations(config)
    videos, record = str(config.videos), config.record
    names = sorted({video.subset for video in annotations.videos})
    training = next((n for n in (record.training, *_TRAINING) if n in names), names[0])
    others = [n for n in (record.validation, *_VALIDATION, *names) if n in names and n != training]
    validation = others[0] if others else training
    wanted = [v.video_id for v in annotations.videos if v.subset in (training, validation)]
    found = find_videos(videos, wanted)
    if not found.uris:
        raise UserError(
            f"None of the {len(wanted)} annotated videos is in {videos}: "
            f"{', '.join(shortened(sorted(wanted), 5))}. Files are named by the videos' ids. "
            "Correct --videos."
        )
    step = math.ceil(len(found.uris) / _LOOKED_AT)
    some = dict(sorted(found.uris.items())[::step])
    seen = opened(replace(found, uris=some), probe)
    rates = sorted(seen.rates.values())
    usable = {*found.uris} - {*seen.failures}

    def of(subset: str) -> tuple[VideoAnnotation, ...]:
        chosen = [v for v in annotations.videos if v.subset == subset]
        return tuple(v for v in chosen if v.video_id in usable)

    return Facts(
        data=config,
        classes=annotations.classes,
        training=of(training),
        validation=of(validation),
        subsets=(training, validation),
        rate=rates[len(rates) // 2] if rates else None,
        missing=seen.failures,
        opened=len(wanted),
    )


@dataclass(slots=True)
class Advice:
    """A recipe, the reason for each of its choices, and warnings.

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


def _fitting(facts: Facts, machine: Machine) -> Advice:
    """Advise the first size whose predicted memory fits; if none does, the smallest, and warn."""
    best: Advice | None = None
    for choice in (*_ON_GPU, _SMALL) if machine.gpus else (_SMALL, replace(_SMALL, batch=1)):
        advice = _sized(facts, machine, choice)
        needed = _memory(advice.recipe, facts.classes)
        advice.reasons["memory"] = (
            f"a step takes about {needed / GIBIBYTE:.2f} GiB (predicted), "
            f"and may take {0.85 * machine.memory / GIBIBYTE:.1f} GiB"
        )
        best = advice
        if needed <= 0.85 * machine.memory:  # the rest: the allocator's reserve, other processes
            break
    else:
        if best is not None:
            best.warnings.append(
                f"the smallest model that is tried does not fit: {best.reasons['memory']}"
            )
    if best is None:
        raise AssertionError("no size was tried")
    return best


def _memory(recipe: Recipe, classes: Sequence[str]) -> int:
    """Predict the bytes of a step, with the optimizer's state and the average of the weights."""
    detector = build_detector(recipe, classes, None).train()
    if recipe.scale.gpu:
        re2tal.rewire(detector.backbone, slice_bytes=SMALLEST_PIECE["cuda"])  # as it will run there
    work = workload_of(recipe)
    found = predict_peak(detector, *work.inputs("meta"), step=work.forward)
    return found.peak + 3 * found.parameters  # AdamW's two moments, and the moving average


def _sized(facts: Facts, machine: Machine, choice: _Size) -> Advice:
    """Fit windows and pyramid to the data, for one size of the model."""
    entry = entry_of(choice.backbone)
    backbone = entry.make()
    with torch.device("meta"):  # only stride and multiple are read, so no memory is needed
        built = backbone.build()
    stride, multiple = built.temporal_stride, built.multiple
    small = choice.backbone == _SMALL.backbone
    longest = facts.quantile(0.95)
    native = facts.rate or 30.0
    # 15, the rate of pretraining, at most; less if the largest window must hold long actions
    fps = min(native, 15.0, choice.frames / max(1.5 * longest, 1e-3))
    fps = max(fps, min(native, 1.0))
    fps = float(f"{fps:.3g}")
    features = fps / stride  # features per second
    # a regression range is a distance to an end of the segment: half of its length at its middle
    first = min(max(facts.quantile(0.2) * features / 2, 3.0), 32.0)
    first = float(f"{first:.2g}")
    levels = 2 + math.ceil(math.log2(max(facts.quantile(0.99) * features / 2 / first, 1.0)))
    levels = min(max(levels, 3), 7)
    # frames must fill whole features of the coarsest level, and suit the backbone
    unit = math.lcm(multiple, stride * 2 ** (levels - 1))
    frames = max(1.5 * longest * fps, 2 * unit, 64 if small else 256)
    frames = min(math.ceil(frames / unit) * unit, max(choice.frames // unit, 1) * unit)
    window = WindowConfig(
        frames=frames,
        fps=fps,
        overlap=min(max(0.25, round(2 * longest * fps / frames - 1, 2)), 0.5),
        sliding_overlap=0.5,
    )
    seconds = frames / fps
    gpus = machine.gpus if machine.here or not small else 0
    workers = max(1, gpus) if gpus else min(2, machine.cores)
    per_window = len(facts.instances) * min(seconds / max(facts.seconds, seconds), 1.0)
    windows = choice.batch * workers
    width = 96 if small else 256
    localizer = ActionFormerConfig(
        width=width,
        head_width=width,
        stem_layers=1 if small else 2,
        levels=levels,
        window=9 if small else 19,
        first_range=first,
        initial_normalizer=float(f"{max(3 * windows * per_window, 1.0):.2g}"),
        drop_path=0.1,
    )
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
    advice = Advice(recipe=recipe, backbone=choice.backbone)
    advice.reasons |= {
        "data.window.fps": f"the files have {native:.4g}; a feature lasts {stride / fps:.2g} s",
        "data.window.frames": f"{seconds:.3g} s; 95% of the segments last up to {longest:.3g} s",
        "data.window.overlap": "so that each segment is seen whole, at a random place",
        "data.window.sliding_overlap": "each segment of up to half a window lies whole in one",
        "model.localizer.levels": _shares(facts, localizer, features),
        "model.localizer.first_range": f"20% of segments last up to {facts.quantile(0.2):.3g} s",
        "model.localizer.initial_normalizer": f"{windows} x {per_window:.2g} segments a step",
        "model.localizer.width": f"narrow: there are {len(facts.instances)} segments to learn from",
        "model.localizer.window": "features that a feature attends to, on each level",
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
    return advice


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
    window, small = recipe.data.window, advice.backbone == _SMALL.backbone
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
        share = len(facts.missing) / facts.opened
        if share > recipe.data.max_failed:
            allowed = math.ceil(100 * share) / 100
            outcome = (
                f"more than the {recipe.data.max_failed:.0%} with which train.py starts: mend "
                f"them, leave them out (--exclude FILE), or give it --data.max-failed {allowed:.2g}"
            )
        else:
            outcome = "they are left out"
        yield (
            f"{len(facts.missing)} of {facts.opened} videos cannot be used "
            f"({'; '.join(listed)}): {outcome}"
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


def facts_of(facts: Facts) -> list[str]:
    """Describe a data set in a few lines."""
    gaps = [end - start for video in facts.training for start, end in gaps_of(video)]
    videos = f"{len(facts.training)} training and {len(facts.validation)} validation videos"
    lines = [f"{videos}, {len(facts.classes)} classes, {len(facts.instances)} training segments"]
    if len(facts.lengths):
        marks = ", ".join(f"{facts.quantile(q):.3g}" for q in (0.0, 0.05, 0.5, 0.95, 1.0))
        lines.append(f"lengths of segments in seconds (min, 5%, median, 95%, max): {marks}")
    if gaps:
        lines.append(f"gaps between them: median {np.median(gaps):.3g} s")
    return lines
