"""From a video file to its detections: sliding windows, detector, one set of segments.

The steps are functions of their own because the evaluation during training takes the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from re2tal.detection.nms import NmsConfig, nms
from re2tal.detection.repetitions import without_repetitions
from re2tal.detection.segments import Detections
from re2tal.detector import Detector
from re2tal.trained import DetectorSpec
from re2tal.videos.annotations import VideoAnnotation
from re2tal.videos.decoding import Source, probe
from re2tal.videos.windows import Window, sliding_windows, window_frames

# From this overlap on, clip and copy of a stitched window show the same action: the tIoU at which
# VSGN's authors suppress the detections of a window and class.
REPETITION = 0.4


def window_detections(raw: Detections, window: Window, duration: float) -> Detections:
    """What a localizer found in one window, in seconds of the video.

    What it found in the copy of a stitched window is put where the clip shows it. A detection
    belongs to the part that its centre lies in or, in the gap, next to. Of an action that both
    parts show there are then two detections, and the one with the lower score is removed, however
    a video's detections are thinned out later: detections of one class in different parts that
    overlap by at least `REPETITION`.

    Args:
        raw: detections in feature-grid units of the window, on any device.
        window: where it lies in the video.
        duration: of the video, in seconds.

    Returns:
        Detections on the CPU, in their order, cut to the video and to the clip of a stitched
        window, without those that lie outside or are repetitions.
    """
    raw = raw.to("cpu")
    segments = window.grid.to_seconds(raw.segments)
    first, last, copied = 0.0, duration, None
    if window.copy is not None:
        middle_of_gap = (window.valid + window.copy.first) / 2 / window.grid.stride - 0.5
        copied = raw.segments.mean(dim=1) >= middle_of_gap
        segments = torch.where(copied[:, None], window.copy.grid.to_seconds(raw.segments), segments)
        first = window.grid.offset
        last = min(first + window.valid / window.grid.fps, duration)
    segments = segments.clamp(first, last)
    inside = segments[:, 1] > segments[:, 0]
    found = raw.with_segments(segments)[inside]
    return found if copied is None else without_repetitions(found, copied[inside], iou=REPETITION)


def video_detections(windows: Sequence[Detections], config: NmsConfig) -> Detections:
    """The detections of a whole video.

    Windows overlap, so that most actions are found several times: non-maximum suppression removes
    or weakens these repetitions with all others.

    Args:
        windows: of each window its detections in seconds of the video.
        config: of the suppression.

    Returns:
        Detections in seconds by falling score.
    """
    return nms(Detections.concat(windows), config)


@torch.inference_mode()
def detect(
    source: Source, spec: DetectorSpec, detector: Detector, *, batch_size: int = 1
) -> Detections:
    """Detects the actions in a video, of any length.

    Args:
        source: path or content of the video file.
        spec: how the detector reads videos; its classes are what the labels index.
        detector: in evaluation mode, on any device.
        batch_size: windows that go through the detector at a time.

    Returns:
        Detections in seconds by falling score, on the CPU. A class-agnostic detector's are
        proposals, all of one class: `re2tal.detection.fuse` gives them those of the video.

    Raises:
        VideoError: if the video cannot be read.
        ValueError: if the detector is in training mode, in which its results are random.
    """
    if detector.training:
        raise ValueError("The detector is in training mode: call detector.eval() first.")
    duration = probe(source).duration
    video = VideoAnnotation(video_id="", subset="", duration=duration)
    windows = sliding_windows(
        video, spec.classes, spec.window, stride=detector.backbone.temporal_stride
    )
    found = []
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        frames = [torch.from_numpy(window_frames(source, w, size=spec.size)) for w in batch]
        mask = torch.stack([torch.from_numpy(window.mask()) for window in batch])
        device = detector.mean.device
        raw = detector(torch.stack(frames).to(device), mask.to(device))
        found += [
            window_detections(detections, window, duration)
            for window, detections in zip(batch, raw, strict=True)
        ]
    return video_detections(found, spec.nms)
