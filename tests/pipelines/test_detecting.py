"""Detections of windows joined by video, and requests refused that Ray would wait for forever."""

from typing import Any

import numpy as np

from pipelines.inference.detecting import VideoResult, _by_video
from re2tal.backbones.swin import swin_toy
from re2tal.detection.suppression import NmsConfig
from re2tal.inference import windows_of
from re2tal.localizers import ActionFormerConfig
from re2tal.trained import DetectorSpec
from re2tal.videos.windows import WindowConfig

SPEC = DetectorSpec(
    classes=("a", "b"),
    backbone=swin_toy(),
    localizer=ActionFormerConfig(),
    size=16,
    window=WindowConfig(frames=16, fps=2.0, overlap=0.5),
    nms=NmsConfig(method="hard"),
)
DURATIONS = {"x": 12.0, "y": 6.0, "z": 12.0}


def row(index: int, error: str = "") -> dict[str, Any]:
    """Detection in the first two features of a window, which are its first two seconds."""
    return {
        "index": index,
        "error": error,
        "segments": np.array([[-0.5, 1.5]], np.float32),
        "scores": np.array([0.5], np.float32),
        "labels": np.array([1]),
    }


def results(rows: list[dict[str, Any]]) -> tuple[list[VideoResult], list[tuple[int, int]]]:
    windows = [
        window
        for video_id, duration in DURATIONS.items()
        for window in windows_of(duration, SPEC, stride=2, video_id=video_id)
    ]
    assert [window.video_id for window in windows] == ["x", "x", "y", "z", "z"]
    told: list[tuple[int, int]] = []
    found = _by_video(iter(rows), windows, DURATIONS, SPEC, lambda *numbers: told.append(numbers))
    return list(found), told


def test_a_video_is_through_with_the_last_of_its_windows() -> None:
    found, told = results([row(2), row(1), row(3), row(0), row(4)])
    assert [result.video_id for result in found] == ["y", "x", "z"]
    assert told == [(number, 5) for number in range(1, 6)]
    x = found[1].found
    assert x is not None
    # windows of 8 s begin at 0 and 4 s
    assert sorted(x.detections.segments.tolist()) == [[0.0, 2.0], [4.0, 6.0]]
    assert {row["label"] for row in x.to_list()} == {"b"}
    assert (x.duration, found[1].windows, found[1].problems) == (12.0, 2, ())


def test_what_is_damaged_is_told_and_the_rest_is_found() -> None:
    found, _ = results([row(0), row(1, "bad"), row(2), row(3, "worse"), row(4, "worse")])
    by_id = {result.video_id: result for result in found}
    x, z = by_id["x"], by_id["z"]
    assert x.found is not None
    assert x.found.detections.segments.tolist() == [[0.0, 2.0]]
    assert (x.windows, x.problems) == (1, ("bad",))
    assert (z.found, z.windows, z.problems) == (None, 0, ("worse",))
