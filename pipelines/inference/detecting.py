"""Batch inference: many videos through a detector, with Ray Data.

One execution does all the work. Tasks decode windows; actors, each of which loads the detector
once, run it on the windows; and the detections of a video are merged as soon as its last window is
finished. Ray Data throttles decoding while the actors are slower, so memory does not grow with the
length or number of the videos.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from torch import Tensor

from pipelines.core.resources import Pool, pool_for
from pipelines.data.decoding import decode_masked
from pipelines.data.videos import FoundVideos, opened
from pipelines.inference.options import Resources
from re2tal.detection.segments import Detections
from re2tal.inference import DetectedVideo, video_detections, window_detections, windows_of
from re2tal.trained import DetectorSpec, load_detector
from re2tal.videos.windows import Window

# Limit on decoding tasks: beyond it, scheduling costs more than the finer balance saves.
_MOST_TASKS = 2000
_CPU_SHARE = 0.5  # share of the CPUs for actors; the others decode


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoResult:
    """Outcome of detection in one video.

    Attributes:
        found: detections; None if no window could be decoded.
        windows: number of windows that went through the detector.
        problems: distinct reasons why the video, or windows of it, could not be decoded.
    """

    video_id: str
    found: DetectedVideo | None
    windows: int
    problems: tuple[str, ...]


def detect_videos(
    videos: Mapping[str, str],
    model: str | Path,
    resources: Resources,
    *,
    durations: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[VideoResult]:
    """Detect the actions in videos, as `re2tal.detect` does in one. Ray must be running.

    Args:
        videos: video id to path or URI of its file, or of the video in a shard.
        model: folder of a saved detector.
        resources: hardware and batches.
        durations: video id to seconds, as far as they are known, for example from annotations;
            other videos are opened first to read their durations.
        progress: function called after each window with the numbers of finished and of all windows.

    Yields:
        Each video as soon as it is finished, beginning with those that cannot be opened.

    Raises:
        UserError: if the folder holds no detector, or a damaged one; if the cluster is too small.
    """
    spec, detector = load_detector(model)
    pool = pool_for(resources.pool, cpu_share=_CPU_SHARE)
    known = {v: seconds for v, seconds in (durations or {}).items() if v in videos}
    found = opened(FoundVideos(uris=dict(videos), failures={}, durations=known, rates={}))
    seconds = dict(sorted(found.durations.items()))
    for video_id, reason in found.failures.items():
        yield VideoResult(video_id=video_id, found=None, windows=0, problems=(reason,))
    stride = detector.backbone.temporal_stride  # frames per feature, for the windows' grids
    windows = [
        window
        for video_id, duration in seconds.items()
        for window in windows_of(duration, spec, stride=stride, video_id=video_id)
    ]
    if not windows:
        return
    rows = _execute(windows, videos, resources, pool, spec, detector.state_dict())
    yield from _by_video(rows, windows, seconds, spec, progress)


def _execute(
    windows: Sequence[Window],
    videos: Mapping[str, str],
    resources: Resources,
    pool: Pool,
    spec: DetectorSpec,
    weights: dict[str, Tensor],
) -> Iterator[dict[str, Any]]:
    """Yield a row from `_Detecting` for each window, in the order of the windows."""
    rows = [
        {"index": index, "uri": videos[window.video_id], "window": window}
        for index, window in enumerate(windows)
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_TASKS)).map(
        functools.partial(decode_masked, size=spec.size, threads=pool.config.decoder_threads),
        num_cpus=pool.config.cpus_per_decoder,
    )
    dataset = pool.map_batches(
        dataset,
        _Detecting,
        batch_size=resources.batch_size,
        spec=spec,
        weights=weights,  # the tensors, not a path: an actor may run on another machine
        device=pool.device,
    )
    dataset.set_name("detecting")
    # otherwise many videos would be begun, and held in memory, before any is finished
    dataset.context.execution_options.preserve_order = True
    return iter(dataset.iter_rows())


class _Detecting:
    """Actor of Ray Data that runs a detector."""

    def __init__(self, *, spec: DetectorSpec, weights: dict[str, Tensor], device: str) -> None:
        detector = spec.build()
        detector.load_state_dict(weights)
        self._detector = detector.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Detect the actions in a batch of windows; segments are in feature-grid units."""
        # copies: Ray's arrays are read-only
        frames, mask = (torch.from_numpy(batch[name].copy()) for name in ("frames", "mask"))
        found = [
            raw.to("cpu") for raw in self._detector(frames.to(self._device), mask.to(self._device))
        ]
        return {
            "index": batch["index"],
            "error": batch["error"],
            "segments": _column([raw.segments for raw in found]),
            "scores": _column([raw.scores for raw in found]),
            "labels": _column([raw.labels for raw in found]),
        }


def _column(values: Sequence[Tensor]) -> np.ndarray:
    """Make an object column of arrays, whose lengths may differ."""
    column = np.empty(len(values), object)
    for place, value in enumerate(values):
        column[place] = value.numpy()
    return column


@dataclass(slots=True)
class _Pending:
    """Video with unfinished windows; `through` counts the finished ones."""

    found: list[Detections] = field(default_factory=list)
    problems: dict[str, None] = field(default_factory=dict)
    through: int = 0


def _by_video(
    rows: Iterator[dict[str, Any]],
    windows: Sequence[Window],
    durations: Mapping[str, float],
    spec: DetectorSpec,
    progress: Callable[[int, int], None] | None,
) -> Iterator[VideoResult]:
    """Merge the windows of each video, and yield the video after its last window."""
    counts: dict[str, int] = defaultdict(int)
    for window in windows:
        counts[window.video_id] += 1
    pending: dict[str, _Pending] = defaultdict(_Pending)
    for done, row in enumerate(rows, start=1):
        window = windows[row["index"]]
        video_id, duration = window.video_id, durations[window.video_id]
        video = pending[video_id]
        video.through += 1
        if row["error"]:
            video.problems[str(row["error"])] = None  # a dict as an ordered set
        else:
            video.found.append(window_detections(_detections(row), window, duration))
        if progress is not None:
            progress(done, len(windows))
        if video.through == counts[video_id]:
            yield _result(video_id, pending.pop(video_id), duration, spec)


def _detections(row: Mapping[str, Any]) -> Detections:
    segments, scores, labels = (
        torch.from_numpy(np.array(row[name])) for name in ("segments", "scores", "labels")
    )
    return Detections(segments=segments.reshape(-1, 2), scores=scores, labels=labels)


def _result(video_id: str, video: _Pending, duration: float, spec: DetectorSpec) -> VideoResult:
    found = DetectedVideo(
        detections=video_detections(video.found, spec.nms), classes=spec.classes, duration=duration
    )
    return VideoResult(
        video_id=video_id,
        found=found if video.found else None,
        windows=len(video.found),
        problems=tuple(video.problems),
    )
