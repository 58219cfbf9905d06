"""Raw predictions: detections before non-maximum suppression, in one file.

With them the parameters of the suppression can be searched without running the network, and several
runs can form an ensemble. The safetensors file holds the detections of all videos one after the
other: `segments` `(N, 2)` and `scores` `(N,)` in their precision, `labels` `(N,)` int32, and
`counts` `(V,)` int64, the number of detections of each video. Its metadata hold `videos` and
`classes`, JSON lists of names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from re2tal.atomic import replacing
from re2tal.detection.segments import Detections
from re2tal.errors import shortened
from re2tal.json_files import FileError, check_regular

_TENSORS = ("segments", "scores", "labels", "counts")
_NAMES = ("videos", "classes")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def write_raw(
    path: str | Path, predictions: Mapping[str, Detections], classes: Sequence[str]
) -> None:
    """Write the predictions of videos, in their order.

    Args:
        path: file; an existing one is replaced once the new one is complete.
        predictions: video id -> detections in seconds, on any device; if precisions differ, the
            widest is written.
        classes: class names, indexed by the labels.

    Raises:
        ValueError: a label has no class.
    """
    pool = Detections.concat([found.to("cpu") for found in predictions.values()])  # widest dtype
    if bool(((pool.labels < 0) | (pool.labels >= len(classes))).any()):
        raise ValueError(
            f"The predictions for {path} have labels outside 0 to {len(classes) - 1}: there are "
            f"{len(classes)} classes."
        )
    tensors = {
        "segments": pool.segments.detach().contiguous(),
        "scores": pool.scores.detach().contiguous(),
        "labels": pool.labels.int(),
        "counts": torch.tensor([len(found) for found in predictions.values()], dtype=torch.int64),
    }
    names = {"videos": json.dumps([*predictions]), "classes": json.dumps([*classes])}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=names)


def read_raw(path: str | Path) -> tuple[dict[str, Detections], tuple[str, ...]]:
    """Read a file that `write_raw` wrote.

    Returns:
        Video id -> predictions in the order written, bit for bit; the class names.

    Raises:
        FileError: the file cannot be read, or its content is wrong; the message lists all problems.
    """
    tensors, names = _content(path)
    if problems := [*_misnamed(names)] or [*_misfits(tensors, names)]:
        raise FileError(str(path), problems)
    counts = tensors["counts"].tolist()
    parts = zip(
        names["videos"],
        tensors["segments"].split(counts),
        tensors["scores"].split(counts),
        tensors["labels"].long().split(counts),
        strict=True,
    )
    predictions = {
        video_id: Detections(segments=segments, scores=scores, labels=labels)
        for video_id, segments, scores, labels in parts
    }
    return predictions, tuple(names["classes"])


def _content(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the file's tensors and names; none may be missing."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            there = {*file.keys(), *metadata}
            missing = [name for name in (*_TENSORS, *_NAMES) if name not in there]
            if missing:
                listed = ", ".join(missing)
                raise FileError(str(path), [f"holds no raw predictions: no {listed}"])
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
            names = {name: json.loads(metadata[name]) for name in _NAMES}
    except (OSError, SafetensorError, ValueError) as error:
        raise FileError(str(path), [f"cannot be read: {error}"]) from error
    return tensors, names


def _misnamed(names: Mapping[str, Any]) -> Iterator[str]:
    """Describe problems of the names in a file."""
    for kind, found in names.items():
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            yield f'"{kind}" must be a JSON list of names (found {found!r:.60})'
        elif twice := sorted({name for name in found if found.count(name) > 1}):
            names_twice = ", ".join(shortened(twice, 10))
            yield f'"{kind}" has names more than once: {names_twice}'


def _misfits(tensors: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Describe problems of the tensors in a file."""
    segments, scores, labels, counts = (tensors[name] for name in _TENSORS)
    videos, classes = (len(names[kind]) for kind in _NAMES)
    if scores.ndim != 1:
        yield f"scores must be of shape (N,), but are {tuple(scores.shape)}"
        return
    total = len(scores)
    for name, tensor, shape in (("segments", segments, (total, 2)), ("labels", labels, (total,))):
        if tensor.shape != shape:
            yield f"{name} must be of shape {shape} for {total} scores, not {tuple(tensor.shape)}"
    for name in ("segments", "scores"):
        if not tensors[name].is_floating_point():
            yield f"{name} must be floating point, not {tensors[name].dtype}"
        elif wrong := int((~tensors[name].isfinite()).sum()):
            yield f"{name} must be finite numbers, but {wrong} are nan or inf"
    if scores.is_floating_point() and bool((scores < 0).any()):
        yield "scores must not be negative: are they logits?"
    if labels.dtype not in _INTEGERS:
        yield f"labels must be integers, not {labels.dtype}"
    elif bool(((labels < 0) | (labels >= classes)).any()):
        yield f"labels are {labels.min()} to {labels.max()}, but there are {classes} classes"
    if counts.dtype not in _INTEGERS or counts.shape != (videos,):
        yield (
            f"counts must be {videos} integers, one per video, not {tuple(counts.shape)} of "
            f"{counts.dtype}"
        )
    elif bool((counts < 0).any()) or int(counts.sum()) != total:
        yield f"counts must be 0 or more and add up to {total} detections: {counts.tolist()!s:.60}"


def ensemble(
    runs: Sequence[Mapping[str, Detections]], weights: Sequence[float]
) -> dict[str, Detections]:
    """Merge the detections of several runs, before non-maximum suppression.

    A score becomes `score * weight / sum of weights`. The scores of an action over all runs then
    sum to their weighted average, if a run that missed the action counts as 0. Scores become lower,
    so a minimum score must be lowered as well.

    Args:
        runs: for each run, video id -> detections in seconds, before NMS, with the same classes.
        weights: weight above 0 for each run; only their ratios matter.

    Returns:
        Video id -> detections of all runs in their order; videos in the first run's order.

    Raises:
        ValueError: there are no runs, the number of weights differs, a weight is not above 0, or a
            run lacks a video that another has; the message lists such videos.
    """
    if not runs or len(runs) != len(weights):
        raise ValueError(
            f"An ensemble needs runs and one weight for each, but got {len(runs)} runs and "
            f"{len(weights)} weights."
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(
            f"The weights of an ensemble must be above 0, but are {list(weights)}: leave out runs "
            "that should have no weight."
        )
    _check_videos(runs)
    total = sum(weights)
    return {
        video_id: Detections.concat(
            [
                _scaled(run[video_id], weight / total)
                for run, weight in zip(runs, weights, strict=True)
            ]
        )
        for video_id in runs[0]
    }


def _scaled(found: Detections, factor: float) -> Detections:
    return Detections(segments=found.segments, scores=found.scores * factor, labels=found.labels)


def _check_videos(runs: Sequence[Mapping[str, Detections]]) -> None:
    everything = dict.fromkeys(video_id for run in runs for video_id in run)
    problems = []
    for number, run in enumerate(runs):
        missing = [video_id for video_id in everything if video_id not in run]
        if missing:
            problems.append(f"run {number} lacks {', '.join(shortened(missing, 10))}")
    if problems:
        raise ValueError(
            "The runs of an ensemble must have predictions of the same videos (maybe empty ones), "
            f"but {'; '.join(problems)}."
        )
