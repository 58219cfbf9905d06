"""Detection in a video file: sliding windows, detector, one set of segments.

The steps are separate functions because the evaluation during training uses them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from re2tal.annotations import VideoAnnotation
from re2tal.detection.files import rows
from re2tal.detection.segments import Detections, without_repetitions
from re2tal.detection.suppression import NmsConfig, nms
from re2tal.detector import Detector
from re2tal.errors import UserError
from re2tal.trained import SPEC_FILE, DetectorSpec, load_detector
from re2tal.videos.decoding import Source, probe
from re2tal.videos.windows import Window, sliding_windows, window_frames

# Least tIoU of two detections of the same action in the clip and the copy of a stitched window; the
# value with which VSGN's authors suppress the detections of a window and class.
REPETITION = 0.4


def window_detections(raw: Detections, window: Window, duration: float) -> Detections:
    """Convert the detections of one window to seconds of the video.

    Detections in the copy of a stitched window are mapped back to the clip. A detection belongs to
    the part that contains its centre; in the gap, to the nearer part. An action may then be
    detected in both parts. If two detections of one class in different parts overlap by at least
    `REPETITION`, the one with the lower score is removed, whatever suppression follows.

    Args:
        raw: detections in feature-grid units of the window, on any device.
        window: place of the window in the video.
        duration: duration of the video in seconds.

    Returns:
        Detections on the CPU, in their order, clipped to the video and to the clip of a stitched
        window, without repetitions and detections outside.
    """
    raw = raw.to("cpu")
    segments = window.grid.to_seconds(raw.segments)
    first, last, copied = 0.0, duration, None
    if window.copy is not None:
        # from frames to feature coordinates, as in TimeGrid
        middle_of_gap = (window.valid + window.copy.first) / 2 / window.grid.stride - 0.5
        copied = raw.segments.mean(dim=1) >= middle_of_gap
        segments = torch.where(copied[:, None], window.copy.grid.to_seconds(raw.segments), segments)
        first = window.grid.offset
        last = min(first + window.valid / window.grid.fps, duration)
    segments = segments.clamp(first, last)
    inside = segments[:, 1] > segments[:, 0]  # clamping makes segments outside empty
    found = raw.with_segments(segments)[inside]
    return found if copied is None else without_repetitions(found, copied[inside], iou=REPETITION)


def video_detections(windows: Sequence[Detections], config: NmsConfig) -> Detections:
    """Combine the detections of a video's windows.

    Windows overlap, so most actions are found several times; non-maximum suppression removes these
    repetitions, or lowers their scores, like all others.

    Args:
        windows: detections of each window in seconds of the video.
        config: settings of the suppression.

    Returns:
        Detections in seconds by falling score.
    """
    return nms(Detections.concat(windows), config)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DetectedVideo:
    """Detections in a video.

    Attributes:
        detections: detections in seconds by falling score, on the CPU. Those of a class-agnostic
            detector are proposals of a single class: `re2tal.detection.fuse` adds the video's
            classes.
        classes: class names, indexed by the labels.
        duration: duration of the video in seconds.
    """

    detections: Detections
    classes: tuple[str, ...]
    duration: float

    def __len__(self) -> int:
        return len(self.detections)

    def __str__(self) -> str:
        return "\n".join(
            f"{row['segment'][0]:9.2f} {row['segment'][1]:9.2f}  {row['score']:.3f}  {row['label']}"
            for row in self.to_list()
        )

    def to_list(self) -> list[dict[str, Any]]:
        """List the detections as plain data; see `re2tal.detection.files.rows`."""
        return rows(self.detections, self.classes)


def detector_folder(folder: str | Path) -> Path:
    """Find a saved detector.

    Args:
        folder: folder that `save_detector` wrote, or a checkpoint of a training run, which contains
            such a folder as `detector`.

    Raises:
        UserError: the folder holds no detector.
    """
    folder = Path(folder)
    for candidate in (folder, folder / "detector"):
        if (candidate / SPEC_FILE).is_file():
            return candidate
    raise UserError(
        f"{folder} holds no detector: there is no {SPEC_FILE} in it or in its folder detector. "
        "Give the folder of a saved detector, or of a training run's checkpoint."
    )


def windows_of(
    duration: float, spec: DetectorSpec, *, stride: int, video_id: str = ""
) -> list[Window]:
    """List the sliding windows of a video without annotations.

    Args:
        duration: duration of the video in seconds.
        spec: specification of the detector.
        stride: frames per feature: the backbone's temporal stride.
        video_id: name of the video in the windows.
    """
    video = VideoAnnotation(video_id=video_id, subset="", duration=duration)
    return sliding_windows(video, spec.classes, spec.window, stride=stride)


@torch.inference_mode()
def detect(
    video: Source,
    model: str | Path | tuple[DetectorSpec, Detector[Any, Any]],
    *,
    batch_size: int = 1,
    device: torch.device | str | None = None,
) -> DetectedVideo:
    """Detect the actions in a video of any length.

    Example:
        found = re2tal.detect("video.mp4", "checkpoint")
        print(found)

    Args:
        video: path, content or open binary file of the video.
        model: folder of a saved detector or of a training run's checkpoint; for many videos, the
            result of `load_detector`, which is then read only once.
        batch_size: number of windows per forward pass of the detector.
        device: device of a detector from a folder; by default a GPU if there is one.

    Raises:
        VideoError: the video cannot be read.
        UserError: the folder holds no detector, or a damaged one.
        ValueError: the detector was trained on features, or is in training mode, which would make
            its results random.
    """
    if isinstance(model, tuple):
        spec, detector = model
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        spec, detector = load_detector(detector_folder(model), device=device)
    if detector.training:
        raise ValueError("The detector is in training mode: call detector.eval() first.")
    duration = probe(video).duration
    windows = windows_of(duration, spec, stride=detector.backbone.temporal_stride)
    found = []
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        frames = [torch.from_numpy(window_frames(video, w, size=spec.size)) for w in batch]
        mask = torch.stack([torch.from_numpy(window.mask()) for window in batch])
        device = detector.mean.device
        raw = detector(torch.stack(frames).to(device), mask.to(device))
        found += [
            window_detections(detections, window, duration)
            for window, detections in zip(batch, raw, strict=True)
        ]
    return DetectedVideo(
        detections=video_detections(found, spec.nms), classes=spec.classes, duration=duration
    )
