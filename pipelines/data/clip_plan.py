"""Plan of a classifier's run: check the lists, find the files, leave out unusable videos."""

import functools
import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pipelines.config.clip_recipes import TrimmedDataConfig
from pipelines.core.storage import is_folder, local_copy, walk_files
from pipelines.data.plan import Plan, check_failures, read_annotations
from pipelines.data.videos import Probe, find_videos, probe_files
from re2tal.annotations import VideoAnnotation
from re2tal.datasets.trimmed import (
    Entry,
    Place,
    TrimmedList,
    TrimmedVideo,
    find_files,
    joint_classes,
    read_classes,
    read_folders,
    read_list,
)
from re2tal.errors import UserError

_SUBSETS = ("training", "validation")
BACKGROUND = "background"
"""Class of stretches without annotated actions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lists:
    """Content of the lists of trimmed videos, before any file is opened.

    Attributes:
        classes: names of the classes; a label is an index into them.
        subsets: "training" and "validation" to their lists.
        files: subset to the files of its folder: path inside the folder to full path or URI.
        fingerprint: hash of classes and lists, or of the annotations.
        durations: path or URI to seconds, for videos that need not be opened.
    """

    classes: tuple[str, ...]
    subsets: Mapping[str, TrimmedList]
    files: Mapping[str, Mapping[str, str]]
    fingerprint: str
    durations: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationPlan:
    """Classes and usable videos of a run.

    Attributes:
        classes: names of the classes; a label is an index into them.
        uris: video id to path or URI, for all usable videos.
        failures: video id to the reason why the video is left out.
        fingerprint: hash of classes and lists.
    """

    classes: tuple[str, ...]
    training: tuple[TrimmedVideo, ...]
    validation: tuple[TrimmedVideo, ...]
    uris: dict[str, str]
    failures: Mapping[str, str]
    fingerprint: str


def read_lists(config: TrimmedDataConfig) -> Lists:
    """Read both lists, local or remote, and check every entry; `inputs` has resolved their paths.

    Annotations of untrimmed videos become lists of their segments.

    Raises:
        AnnotationError: with every problem in the lists.
        UserError: if the videos lie in incomplete shards.
    """
    if config.annotations is not None:
        return _annotated(config)
    classes = None
    if config.classes is not None:
        classes = read_classes(config.classes, _text(config.classes))
    walk = functools.cache(walk_files)  # both lists may belong to the same folder
    subsets: dict[str, TrimmedList] = {}
    files: dict[str, Mapping[str, str]] = {}
    for subset, uri, split in (
        ("training", str(config.training), config.training_split),
        ("validation", str(config.validation), config.validation_split),
    ):
        if is_folder(uri):
            files[subset] = walk(uri)
            subsets[subset] = read_folders(uri, files[subset])
        else:
            source = uri if split is None else f"{uri} ({split})"
            subsets[subset] = read_list(source, _text(uri), classes=classes, split=split)
            files[subset] = walk(str(config.videos))
    known = joint_classes(subsets["training"], subsets["validation"], classes)
    return Lists(
        classes=known,
        subsets=subsets,
        files=files,
        fingerprint=_fingerprint(known, subsets),
    )


def _annotated(config: TrimmedDataConfig) -> Lists:
    """List the annotated segments of untrimmed videos."""
    annotations = read_annotations(config)
    source = str(config.annotations)
    if config.background and BACKGROUND in annotations.classes:
        raise UserError(
            f"{source} has a class {BACKGROUND!r} of its own, the name that --data.background "
            "gives to the stretches between segments: leave out --data.background."
        )
    classes = (*annotations.classes, *([BACKGROUND] if config.background else []))
    named = {"training": config.trained_on, "validation": config.evaluated_on}
    videos = {
        use: annotations.subset(name, option=f"--data.{use}-subset").videos
        for use, name in named.items()
    }
    subsets = {
        subset: _segments(f"{source}, subset {named[subset]!r}", of_subset, config)
        for subset, of_subset in videos.items()
    }
    wanted = [video.video_id for of_subset in videos.values() for video in of_subset]
    found = find_videos(
        str(config.videos),
        wanted,
        fingerprint=annotations.fingerprint,
        size=config.size,
        fps=config.augmentation.densest(config.clip.fps),
    )
    return Lists(
        classes=joint_classes(subsets["training"], subsets["validation"], classes),
        subsets=subsets,
        files=dict.fromkeys(_SUBSETS, found.uris),
        fingerprint=annotations.fingerprint,
        durations={found.uris[name]: seconds for name, seconds in found.durations.items()},
    )


def _segments(
    source: str, videos: Sequence[VideoAnnotation], config: TrimmedDataConfig
) -> TrimmedList:
    """List the segments of a subset, followed by stretches of background if these are wanted."""
    entries = [
        Entry(
            video_id=f"{video.video_id}/{number}",
            label=instance.label,
            places=(Place(name=video.video_id, start=instance.start, end=instance.end),),
        )
        for video in videos
        for number, instance in enumerate(video.instances)
    ]
    if config.background and entries:
        # as many as the commonest class has, each at least half a clip long
        most = max(Counter(entry.label for entry in entries).values())
        gaps = [
            (video.video_id, start, end)
            for video in videos
            for start, end in gaps_of(video)
            if end - start >= config.clip.frames / config.clip.fps / 2
        ]
        # spread evenly over the videos, and the same in every run
        for number in sorted(
            {round(i) for i in np.linspace(0, len(gaps) - 1, most)} if gaps else ()
        ):
            name, start, end = gaps[number]
            place = Place(name=name, start=start, end=end)
            entries.append(
                Entry(video_id=f"{name}/{BACKGROUND}{number}", label=BACKGROUND, places=(place,))
            )
    return TrimmedList(
        source=source,
        root=source,
        entries=tuple(entries),
        problems=() if entries else ("has no annotated segment",),
    )


def gaps_of(video: VideoAnnotation) -> Iterator[tuple[float, float]]:
    """Yield the stretches of a video without annotated actions, in seconds."""
    reached = 0.0
    marked = sorted((i.start, i.end) for i in (*video.instances, *video.ambiguous))
    for start, end in [*marked, (video.duration, video.duration)]:
        if start > reached:
            yield reached, start
        reached = max(reached, end)  # annotations may overlap or contain one another


def _text(uri: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        # -sig: a byte order mark, as spreadsheets write it, is not part of the first field
        return local_copy(uri, Path(folder)).read_text(encoding="utf-8-sig")


def _fingerprint(classes: tuple[str, ...], subsets: Mapping[str, TrimmedList]) -> str:
    content = [
        classes,
        *(
            [[e.video_id, e.label] for e in sorted(subsets[name].entries, key=lambda e: e.video_id)]
            for name in _SUBSETS
        ),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_plan(
    config: TrimmedDataConfig, lists: Lists, *, probe: Probe = probe_files
) -> ClassificationPlan:
    """Find and open the videos, each file once, by default in parallel with Ray Data.

    Raises:
        UserError: if too many videos are missing or unreadable, or all videos of a subset are.
    """
    files: dict[str, tuple[str, Place]] = {}
    failures: dict[str, str] = {}
    for subset in _SUBSETS:
        found, missing = find_files(lists.subsets[subset].entries, lists.files[subset])
        files |= {f"{subset}/{name}": place for name, place in found.items()}
        failures |= {f"{subset}/{name}": reason for name, reason in missing.items()}
    durations, errors = _durations(
        {uri for uri, _ in files.values()} - lists.durations.keys(), probe
    )
    durations |= lists.durations
    number = {name: i for i, name in enumerate(lists.classes)}
    usable: dict[str, list[TrimmedVideo]] = {subset: [] for subset in _SUBSETS}
    for subset in _SUBSETS:
        for entry in lists.subsets[subset].entries:
            video_id = f"{subset}/{entry.video_id}"
            if video_id in failures:
                continue
            uri, place = files[video_id]
            end = min(place.end or math.inf, durations.get(uri, 0.0))
            if uri in errors:
                failures[video_id] = errors[uri]
            elif end <= place.start:
                failures[video_id] = f"{uri} ends at {end:g} s, before {place.start:g} s"
            else:
                label = number[entry.label]
                usable[subset].append(
                    TrimmedVideo(video_id=video_id, label=label, start=place.start, end=end)
                )
    total = sum(len(lists.subsets[subset].entries) for subset in _SUBSETS)
    check_failures(failures, total, config.max_failed)
    for subset, videos in usable.items():
        if not videos:
            raise UserError(f"No {subset} video can be used: all of them failed.")
    return ClassificationPlan(
        classes=lists.classes,
        training=tuple(usable["training"]),
        validation=tuple(usable["validation"]),
        uris={v.video_id: files[v.video_id][0] for of in usable.values() for v in of},
        failures=failures,
        fingerprint=lists.fingerprint,
    )


def _durations(uris: set[str], probe: Probe) -> tuple[dict[str, float], dict[str, str]]:
    """Open files; return the seconds of each, and the reasons why others cannot be read."""
    rows = probe({uri: uri for uri in uris}).select(["uri", "duration", "error"]).to_pylist()
    durations = {row["uri"]: row["duration"] for row in rows if not row["error"]}
    return durations, {row["uri"]: row["error"] for row in rows if row["error"]}


AnyPlan: TypeAlias = Plan | ClassificationPlan
