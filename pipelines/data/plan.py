"""Plan of a detector's run: check the annotations, find the files, leave out unusable videos."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pipelines.config.annotations import PROBE, AnnotationConfig, ScoredAnnotationConfig
from pipelines.config.clip_recipes import TrimmedDataConfig
from pipelines.config.recipe import DataConfig
from pipelines.core.storage import local_copy, require
from pipelines.data.batches import Video
from pipelines.data.features import Features
from pipelines.data.videos import (
    FoundVideos,
    Probe,
    find_videos,
    opened,
    probe_files,
    probe_files_here,
)
from re2tal.annotations import Annotations, VideoAnnotation, as_named
from re2tal.datasets import check_durations, load_annotations, read_durations, read_ids
from re2tal.datasets.loading import Durations
from re2tal.detection.video_scores import VideoScores, load_video_scores
from re2tal.errors import UserError, apart, shortened

ACTION = "action"
"""The one class of a class-agnostic detector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Classes and videos that a run works on.

    Attributes:
        classes: names of the action classes, sorted.
        failures: video id to the reason why the video is left out.
        fingerprint: hash of the annotations that are used.
        remarks: sentences about unexpected facts: shards made for other settings, and videos whose
            file is longer or shorter than annotated. These videos are used all the same; where a
            file is too short, the failed windows are counted.
        video_scores: an external classifier's scores of the validation videos.
        features: features of all usable videos, in runs that use features instead of frames.
    """

    classes: tuple[str, ...]
    training: tuple[Video, ...]
    validation: tuple[Video, ...]
    failures: Mapping[str, str]
    fingerprint: str
    remarks: tuple[str, ...] = ()
    video_scores: VideoScores | None = None
    features: Features | None = None

    def restricted(self, classes: Sequence[str]) -> "Plan":
        """Return the plan for `classes`: those of the plan, or only the class `ACTION`."""
        if tuple(classes) == self.classes:
            return self
        return replace(
            self,
            classes=(ACTION,),
            training=tuple(_class_agnostic(video) for video in self.training),
            validation=tuple(_class_agnostic(video) for video in self.validation),
        )

    @property
    def uris(self) -> dict[str, str]:
        """Video id to path or URI, for all usable videos."""
        return {v.annotation.video_id: v.uri for v in (*self.training, *self.validation)}

    @property
    def durations(self) -> dict[str, float]:
        """Video id to seconds, for all usable videos."""
        videos = (v.annotation for v in (*self.training, *self.validation))
        return {video.video_id: video.duration for video in videos}


def _class_agnostic(video: Video) -> Video:
    old = video.annotation
    relabelled = replace(
        old,
        instances=tuple(replace(i, label=ACTION) for i in old.instances),
        published=old.published and tuple(replace(i, label=ACTION) for i in old.published),
    )
    return replace(video, annotation=relabelled)


def read_annotations(config: AnnotationConfig) -> Annotations:
    """Read annotations with their exclusions and durations, local or remote, and check them whole.

    `inputs` has resolved the paths. Known faults of the data set are repaired.

    Raises:
        AnnotationError: with every problem in the annotations.
        UserError: if durations cannot be read from the videos.
    """
    with tempfile.TemporaryDirectory() as folder:
        excluded: frozenset[str] = frozenset()
        if config.exclude is not None:
            excluded = read_ids(local_copy(config.exclude, Path(folder)))
        durations: Durations | None = None
        if config.durations == PROBE:
            durations = partial(_probed, config)
        elif config.durations is not None:
            durations = read_durations(local_copy(config.durations, Path(folder)))
        return load_annotations(
            local_copy(str(config.annotations), Path(folder)),
            form=config.form,
            dataset=config.record,
            exclude=excluded,
            keep=config.keep,
            durations=durations,
        )


def _probed(config: Any, video_ids: Sequence[str]) -> dict[str, float]:
    """Read the durations of videos from their files, their shards, or their features."""
    prefix = "--data." if isinstance(config, (DataConfig, TrimmedDataConfig)) else "--"
    if getattr(config, "features", None) is not None:
        features = Features(config.features)
        found = FoundVideos(
            uris={},
            failures=features.missing(video_ids),
            durations=as_named(features.durations, video_ids),
            rates={},
        )
    else:
        folder = require(config.videos, what="The videos", option=f"{prefix}videos")
        found = find_videos(folder, video_ids)
        if left := len(found.uris.keys() - found.durations.keys()):
            print(f"opening {left} videos: their annotations have no duration", flush=True)
        found = opened(found, probe_files_here)
    lost = [
        f"{v} ({found.failures.get(v, 'it is not known')})"
        for v in video_ids
        if v not in found.durations
    ]
    if lost:
        raise UserError(
            f"{len(lost)} of {len(video_ids)} videos without an annotated duration cannot be "
            f"opened for it: {'; '.join(shortened(lost, 3))}. Leave them out ({prefix}exclude), or "
            f"give a file of durations ({prefix}durations)."
        )
    return found.durations


def _find_features(features: Features, videos: Sequence[VideoAnnotation]) -> FoundVideos:
    """Find the features of videos, and read each file once."""
    durations = {video.video_id: video.duration for video in videos}
    missing = features.missing(durations)
    if len(missing) == len(durations):  # a wrong folder, or other ids, rather than failed videos
        raise UserError(
            f"None of the {len(durations)} videos has features: {next(iter(missing.values()))}. "
            f"Do the ids match? {apart(features.video_ids, durations)}. Correct --data.features."
        )
    damaged, remarks = features.examine(durations)
    failures = missing | damaged
    return FoundVideos(
        uris={v: features.uri(v) for v in sorted(durations.keys() - failures.keys())},
        failures=failures,
        durations={},
        rates={},
        remarks=tuple(remarks),
    )


class KnownVideos(Protocol):
    """Plan of any task."""

    @property
    def uris(self) -> Mapping[str, str]:
        """Video id to path or URI, for the usable videos."""

    @property
    def failures(self) -> Mapping[str, str]:
        """Video id to the reason why the video is left out."""


def all_failures(
    plan: KnownVideos, of_workers: Iterable[Mapping[str, str]], max_failed: float
) -> dict[str, str]:
    """Collect the videos that failed before training or on any worker; raise if too many failed.

    Raises:
        UserError: see `check_failures`.
    """
    failed = dict(plan.failures)
    for of_worker in of_workers:
        failed |= of_worker
    check_failures(failed, len(plan.uris) + len(plan.failures), max_failed)
    return failed


def check_failures(
    failures: Mapping[str, str],
    total: int,
    max_failed: float,
    *,
    prefix: str = "--data.",
    source: str = "videos",
) -> None:
    """Raise if too many videos of a run failed.

    `max_failed` is the largest share that may fail, 0 to 1. Messages name the options
    `{prefix}{source}` (source: videos or features) and `{prefix}max-failed`.

    Raises:
        UserError: if all videos failed, or more than that share.
    """
    # all failed is an error even if `max_failed` is 1: nothing is left to work on
    if len(failures) < total and len(failures) <= max_failed * total:
        return
    reasons = [f"{video_id}: {reason}" for video_id, reason in sorted(failures.items())]
    listed = "\n".join(f"  {line}" for line in shortened(reasons))
    share = f"{len(failures)} of {total} videos cannot be used"
    if len(failures) == total:
        problem = f"No usable video: {share}. Is {prefix}{source} the right folder?"
    else:
        problem = f"{share}, more than the allowed {max_failed:.0%} ({prefix}max-failed)."
    raise UserError(f"{problem}\n{listed}")


def make_plan(config: DataConfig, annotations: Annotations, *, probe: Probe = probe_files) -> Plan:
    """Find and check the videos or their features, and plan the run on the usable ones.

    Every video file is opened once (`probe`), by default in parallel with Ray Data; the plan holds
    only videos that could be opened. Videos in shards were decoded when the shards were made, and
    are not opened. All features are read once, so that damaged ones fail here and not in training.

    Raises:
        UserError: if the videos lie in incomplete shards; if features are missing or incomplete; if
            settings contradict one another; if too many videos are missing or unreadable, or have
            no scores; or if the validation videos have no annotated action.
        FileError: if the file of an external classifier is not usable.
    """
    features = Features(config.features) if config.features else None
    named = {"training": config.trained_on, "validation": config.evaluated_on}
    subsets = {
        name: annotations.subset(name, option=f"--data.{use}-subset") for use, name in named.items()
    }
    scores = read_video_scores(config, annotations.classes, subsets[config.evaluated_on].videos)
    wanted = [video for subset in subsets.values() for video in subset.videos]
    if features is not None:
        found = _find_features(features, wanted)
    else:
        found = find_videos(
            str(config.videos),
            [video.video_id for video in wanted],
            fingerprint=annotations.fingerprint,
            size=config.size,
            fps=config.augmentation.densest(config.window.fps),
        )
        found = opened(found, probe)
    failures = found.failures
    source = "videos" if features is None else "features"
    total = len({video.video_id for video in wanted})
    check_failures(failures, total, config.max_failed, source=source)

    def usable(subset: str) -> tuple[Video, ...]:
        return tuple(
            Video(annotation=video, uri=found.uris[video.video_id])
            for video in subsets[subset].videos
            if video.video_id not in failures
        )

    training, validation = usable(config.trained_on), usable(config.evaluated_on)
    _require_some(config, training, validation)
    return Plan(
        classes=annotations.classes,
        training=training,
        validation=validation,
        failures=failures,
        fingerprint=annotations.fingerprint,
        remarks=(*found.remarks, *check_durations(annotations, found.durations).values()),
        video_scores=scores,
        features=features,
    )


def evaluation_plan(
    annotations: Annotations, videos: Sequence[VideoAnnotation], scores: VideoScores | None
) -> Plan:
    """Make the plan of an evaluation alone, which needs no video files."""
    return Plan(
        classes=annotations.classes,
        training=(),
        validation=tuple(Video(annotation=video, uri="") for video in videos),
        failures={},
        fingerprint=annotations.fingerprint,
        video_scores=scores,
    )


def read_video_scores(
    config: ScoredAnnotationConfig,
    classes: Sequence[str],
    videos: Sequence[VideoAnnotation],
    *,
    prefix: str = "--data.",
) -> VideoScores | None:
    """Read an external classifier's scores of videos, and check that every video has some.

    `inputs` has resolved the path; `prefix` is that of the options' names, for messages.

    Returns:
        The scores; None if no classifier is configured.

    Raises:
        UserError: if `video_scores_top` exceeds the classes or is below 1; if videos lack scores.
        FileError: with every problem in the file.
    """
    place, top = config.video_scores, config.video_scores_top
    if place is None:
        return None
    if not 1 <= top <= len(classes):
        raise UserError(
            f"A proposal can be given 1 to {len(classes)} classes, not {top} "
            f"({prefix}video-scores-top)."
        )
    with tempfile.TemporaryDirectory() as folder:
        file = local_copy(place, Path(folder))
        scores = load_video_scores(file, classes, logits=config.video_scores_logits)
    missing = [video.video_id for video in videos if scores.get(video.video_id) is None]
    if missing:
        sides = (
            f" Do the ids match? {apart(scores.scores, missing)}."
            if len(missing) == len(videos)
            else ""
        )
        raise UserError(
            f"{len(missing)} of the {len(videos)} videos of the subset {videos[0].subset!r} have "
            f"no scores in {place}: {', '.join(shortened(missing, 10))}. Take "
            f"the scores of that subset, or leave the videos out ({prefix}exclude).{sides}"
        )
    return scores


def _require_some(
    config: DataConfig, training: Sequence[Video], validation: Sequence[Video]
) -> None:
    for name, videos in (
        (config.trained_on, training),
        (config.evaluated_on, validation),
    ):
        if not videos:
            raise UserError(f"No usable video in subset {name!r}: all of its videos failed.")
    if not any(video.annotation.evaluated for video in validation):
        raise UserError(
            f"No instance to evaluate detections against in subset {config.evaluated_on!r}: "
            f"its {len(validation)} usable videos have none. Name a subset with annotated actions "
            "(--data.validation-subset)."
        )
