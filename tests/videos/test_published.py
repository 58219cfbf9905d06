"""What is trained on may be repaired; what is evaluated against is what was published."""

import json
from pathlib import Path
from typing import Any

from re2tal.videos.annotations import ACTIVITYNET13, THUMOS14, DatasetQuirks, load_annotations


def load(folder: Path, quirks: DatasetQuirks | None, *segments: tuple[float, float, str]) -> Any:
    actions = [{"segment": [start, end], "label": label} for start, end, label in segments]
    entry = {"subset": "validation", "duration": 10.0, "annotations": actions}
    path = folder / "annotations.json"
    path.write_text(json.dumps({"database": {"v": entry}}))
    (video,) = load_annotations(path, quirks=quirks).videos
    return video


def seconds(instances: Any) -> list[tuple[float, float]]:
    return [(i.start, i.end) for i in instances]


def test_instances_without_length_and_beyond_the_end_are_evaluated_as_published(
    tmp_path: Path,
) -> None:
    video = load(
        tmp_path, ACTIVITYNET13, (1, 2, "run"), (3, 3, "run"), (8, 10.4, "run"), (8, 11.5, "run")
    )
    assert seconds(video.instances) == [(1, 2), (8, 10), (8, 10)]
    assert seconds(video.evaluated) == [(1, 2), (3, 3), (8, 10.4), (8, 11.5)]


def test_ambiguous_stretches_are_not_evaluated_and_implied_instances_are(tmp_path: Path) -> None:
    video = load(
        tmp_path, THUMOS14, (1, 2, "CliffDiving"), (4, 5, "Ambiguous"), (30, 40, "CliffDiving")
    )
    assert [(i.start, i.label) for i in video.evaluated] == [
        (1, "CliffDiving"),
        (1, "Diving"),
        (30, "CliffDiving"),
    ]
    assert seconds(video.ambiguous) == [(4, 5)]


def test_without_repairs_nothing_is_kept_twice(tmp_path: Path) -> None:
    video = load(tmp_path, None, (1, 2, "run"), (4, 5, "jump"))
    assert video.published is None
    assert video.evaluated == video.instances
