"""Facts about a data set and about the machine, by which a recipe is chosen."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from pipelines.config.annotations import AnnotationConfig
from pipelines.data.clip_plan import gaps_of
from pipelines.data.inputs import resolved
from pipelines.data.plan import read_annotations
from pipelines.data.videos import find_videos, opened, probe_files_here
from re2tal.annotations import Instance, VideoAnnotation
from re2tal.errors import UserError, shortened
from re2tal.memory.fit import GIBIBYTE

_LOOKED_AT = 40  # videos that are opened at most, for the frame rate and to find unreadable files
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
        sought: number of annotated videos of both subsets, which were looked for.
        opened: number of those that were opened.
        unusable: share of the videos that cannot be used, as far as a sample tells.
    """

    data: NewRecipeConfig
    classes: tuple[str, ...]
    training: tuple[VideoAnnotation, ...]
    validation: tuple[VideoAnnotation, ...]
    subsets: tuple[str, str]
    rate: float | None
    missing: Mapping[str, str]
    sought: int
    opened: int
    unusable: float

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


def look_at(config: NewRecipeConfig) -> Facts:
    """Collect the facts about a data set, and open some of its videos.

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
    seen = opened(replace(found, uris=some), probe_files_here)
    rates = sorted(seen.rates.values())
    unreadable = len(found.uris) * (len(some) - len(seen.uris)) / len(some)
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
        sought=len(wanted),
        opened=len(some.keys() - found.durations.keys()),  # shards give durations without opening
        unusable=(len(found.failures) + unreadable) / len(wanted),
    )


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
