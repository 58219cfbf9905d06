"""Files from outside, with any value put anywhere: each is read, or refused in words."""

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data.features import Features
from re2tal.datasets import EGO4D_MQ, load_annotations, read_durations, read_ids, summarize
from re2tal.detection import read_detections
from re2tal.detection.video_scores import load_video_scores
from re2tal.errors import UserError
from re2tal.json_files import Place, places

NUMBERS = (0, -1, 1e308, -1e308, 10**400, 10**20, -0.0, 5e-324, np.nan, np.inf, -np.inf)
TEXTS = ("", " ", "x", "\0", "\ud800", "../..", "/etc", "a" * 10_000, "NaN", "1e999", "\uff11")
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [1, 2],
    [2, 1],
    [1, 2, 3],
    ["1", "2"],
    [{}],
)
VALUES = (*NUMBERS, *TEXTS, *OTHERS, {"segment": [1, 2]}, {"segment": None, "label": None})

ACTIONS = [{"segment": [1, 2], "label": "x"}, {"segment": [3, 4], "label": "y"}]
ACTIVITYNET = {
    "database": {
        "a": {"subset": "training", "duration": 10.0, "annotations": ACTIONS},
        "b": {"subset": "validation", "duration": "9.5", "annotations": []},
    }
}
MOMENT = {"start_time": 1.0, "end_time": 2.0, "label": "x", "primary": True}
CLIP = {
    "clip_uid": "c",
    "clip_start_sec": 0.0,
    "clip_end_sec": 10.0,
    "annotations": [{"annotator_uid": "u", "labels": [MOMENT]}],
}
DETECTIONS = {"results": {"a": [{"segment": [1, 2], "score": 0.5, "label": "x"}]}}
ENTRY = {"file": "a.npy", "length": 5, "fps": 1.0, "stride": 1, "offset": 0.0, "duration": 5.0}
FEATURES = {
    "format": "re2tal features 1",
    "layout": "npy",
    "channels": 4,
    "clips": {"fps": 30.0, "stride": 4, "frames": 16},
    "videos": {"a": ENTRY},
    "failures": {"b": "why"},
}


def changed(document: Any) -> Iterator[tuple[Place, Any, Any]]:
    """The document with each value in each place; and with each text as key there."""
    for place, _ in [*places(document)][1:]:
        *parents, last = place
        for value in VALUES:
            for rename in (False, isinstance(value, str) and isinstance(last, str)):
                other = copy.deepcopy(document)
                inner = other
                for parent in parents:
                    inner = inner[parent]
                if rename:
                    inner[value] = inner.pop(last)
                else:
                    inner[last] = value
                yield place, value, other


def summary_of(path: Path) -> str:
    return summarize(load_annotations(path))


def examined(path: Path) -> Any:
    np.save(path.parent / "a.npy", np.zeros((5, 4), np.float32))
    return Features(str(path.parent)).examine({"a": 5.0})


@pytest.mark.parametrize(
    ("name", "document", "read"),
    [
        ("a.json", ACTIVITYNET, summary_of),
        (
            "moments_train.json",
            {"videos": [{"video_uid": "v", "split": "train", "clips": [CLIP]}]},
            partial(load_annotations, dataset=EGO4D_MQ),
        ),
        ("detections.json", DETECTIONS, partial(read_detections, classes=["x"])),
        (
            "scores.json",
            {"class": ["x", "y"], "results": {"a": [0.5, 0.5]}},
            partial(load_video_scores, classes=["x", "y"]),
        ),
        ("durations.json", {"a": 1.0}, read_durations),
        ("ids.json", ["a"], read_ids),
        ("features.json", FEATURES, examined),
    ],
)
def test_any_value_anywhere_is_read_or_refused(
    tmp_path: Path, name: str, document: Any, read: Callable[[Path], Any]
) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(document))
    read(path)
    refused = total = 0
    for place, value, other in changed(document):
        path.write_text(json.dumps(other))
        total += 1
        try:
            read(path)
        except UserError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{place} = {value!r:.60}") from error
    assert total / 2 < refused < total


IMPOSSIBLE: tuple[Any, ...] = (
    -1.0,
    0.0,
    1e-300,
    1e300,
    10**400,
    np.nan,
    np.inf,
    None,
    "",
    "x",
    True,
    [],
    {},
    [1],
)


@pytest.mark.parametrize("value", IMPOSSIBLE, ids=repr)
def test_a_length_that_no_video_has_is_refused(tmp_path: Path, value: Any) -> None:
    entry = {"subset": "training", "duration": value, "annotations": ACTIONS}
    (path := tmp_path / "a.json").write_text(json.dumps({"database": {"a": entry}}))
    with pytest.raises(UserError, match="duration"):
        load_annotations(path)
    (path := tmp_path / "durations.json").write_text(json.dumps({"a": value}))
    with pytest.raises(UserError, match=r"'a'|JSON"):
        read_durations(path)
    # Ego4D's are differences: a start that is a number is one of the end as well
    ends = {"clip_start_sec": 0.0, "clip_end_sec": value}
    starts = {"clip_start_sec": "x" if isinstance(value, float) else value, "clip_end_sec": 10.0}
    for times in (ends, starts):
        videos = [{"video_uid": "v", "split": "train", "clips": [CLIP | times]}]
        (path := tmp_path / "moments_train.json").write_text(json.dumps({"videos": videos}))
        with pytest.raises(UserError, match=r"duration|JSON"):
            load_annotations(path)
