"""Raw predictions: what a detector found before non-maximum suppression, kept as one file.

With it the parameters of the suppression are searched without running the network, and several
runs are ensembled. A safetensors file holds the detections of all videos one after the other:
`segments` `(N, 2)` and `scores` `(N,)` in their precision, `labels` `(N,)` int32, `counts` `(V,)`
int64 detections a video; its metadata hold `videos` and `classes`, JSON lists of names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from re2tal.detection.atomic import replacing
from re2tal.detection.files import DetectionFileError
from re2tal.detection.segments import Detections

_TENSORS = ("segments", "scores", "labels", "counts")
_NAMES = ("videos", "classes")


def write_raw(
    path: str | Path, predictions: Mapping[str, Detections], classes: Sequence[str]
) -> None:
    """Writes the predictions of videos, in their order.

    Args:
        path: the file; it is replaced when the new one is whole.
        predictions: by video, in seconds, on any device; where precisions differ, the widest is
            written.
        classes: class names, which the labels index.

    Raises:
        ValueError: If a label has no class.
    """
    pool = Detections.concat([found.to("cpu") for found in predictions.values()])
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
    """Reads what `write_raw` wrote.

    Args:
        path: the file.

    Returns:
        Video id to predictions in the order written, bit for bit; the class names.

    Raises:
        DetectionFileError: If the file cannot be read, or holds something else.
    """
    tensors, names = _content(path)
    if not _consistent(tensors, names):
        raise DetectionFileError(str(path), ["its tensors and names do not fit one another"])
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


def _content(path: str | Path) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The file's tensors and names, all of those that it should have."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            there = {*file.keys(), *metadata}
            missing = [name for name in (*_TENSORS, *_NAMES) if name not in there]
            if missing:
                listed = ", ".join(missing)
                raise DetectionFileError(str(path), [f"holds no raw predictions: no {listed}"])
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
            names = {name: json.loads(metadata[name]) for name in _NAMES}
    except FileNotFoundError as error:
        raise DetectionFileError(str(path), ["there is no such file"]) from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise DetectionFileError(str(path), [f"cannot be read: {error}"]) from error
    return tensors, names


def _consistent(tensors: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]) -> bool:
    """Whether the parts of a file belong together."""
    segments, scores, labels, counts = (tensors[name] for name in _TENSORS)
    return (
        segments.shape == (len(scores), 2)
        and labels.shape == scores.shape == (len(scores),)
        and counts.shape == (len(names["videos"]),)
        and bool((counts >= 0).all())
        and int(counts.sum()) == len(scores)
        and bool(((labels >= 0) & (labels < len(names["classes"]))).all())
    )
