"""What is trained on may be repaired; what is evaluated against is what was published."""

import json
from pathlib import Path
from typing import Any

import pytest

from re2tal.datasets import ACTIVITYNET13, ANY_OTHER, THUMOS14, Dataset, load_annotations


def load(folder: Path, dataset: Dataset, *segments: tuple[float, float, str]) -> Any:
    actions = [{"segment": [start, end], "label": label} for start, end, label in segments]
    entry = {"subset": "validation", "duration": 10.0, "annotations": actions}
    path = folder / "annotations.json"
    path.write_text(json.dumps({"database": {"v": entry}}))
    (video,) = load_annotations(path, dataset=dataset).videos
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


def test_ambiguous_stretches_are_not_evaluated(tmp_path: Path) -> None:
    video = load(tmp_path, THUMOS14, (1, 2, "Diving"), (4, 5, "Ambiguous"), (30, 40, "Diving"))
    assert seconds(video.evaluated) == [(1, 2), (30, 40)]
    assert seconds(video.instances) == [(1, 2)]
    assert seconds(video.ambiguous) == [(4, 5)]


CLIFF_DIVES = [(1, 2), (9, 10.8), (9, 14), (30, 40)]  # one inside, one clipped, two dropped


def test_the_twin_of_an_instance_is_as_published_where_the_instance_is(tmp_path: Path) -> None:
    dives = [(start, end, "CliffDiving") for start, end in CLIFF_DIVES]
    video = load(tmp_path, THUMOS14, *dives)

    def both(*segments: tuple[float, float]) -> list[tuple[float, float, str]]:
        return [(*segment, label) for segment in segments for label in ("CliffDiving", "Diving")]

    assert [(i.start, i.end, i.label) for i in video.evaluated] == both(*CLIFF_DIVES)
    assert [(i.start, i.end, i.label) for i in video.instances] == both((1, 2), (9, 10))


@pytest.mark.parametrize("there", [(), (0,), (1, 3), (0, 1, 2, 3)], ids=len)
def test_a_file_without_some_twins_is_read_as_one_with_all(
    there: tuple[int, ...], tmp_path: Path
) -> None:
    dives = [(start, end, "CliffDiving") for start, end in CLIFF_DIVES]
    twins = [(start, end, "Diving") for start, end in CLIFF_DIVES]
    (lacking := tmp_path / "lacking").mkdir()
    video = load(lacking, THUMOS14, *dives, *(twins[number] for number in there))
    assert video == load(tmp_path, THUMOS14, *dives, *twins)
    repairs = load_annotations(lacking / "annotations.json", dataset=THUMOS14).repairs
    added = [(r.instance.start, r.instance.end) for r in repairs if r.action == "added"]
    assert added == [s for number, s in enumerate(CLIFF_DIVES) if number not in there]


def test_without_repairs_nothing_is_kept_twice(tmp_path: Path) -> None:
    video = load(tmp_path, ANY_OTHER, (1, 2, "run"), (4, 5, "jump"))
    assert video.published is None
    assert video.evaluated == video.instances
