"""Small files in the layouts in which EPIC-Kitchens-100, Ego4D and the THUMOS family come."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from re2tal.annotations import AnnotationError, Exclusion, Instance
from re2tal.datasets import EGO4D_MQ, load_annotations
from re2tal.datasets.forms import _seconds
from tests.videos.published_layouts import COLUMNS, clip, ego4d, epic, moment, row


def problems_of(path: Path, **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(AnnotationError) as caught:
        load_annotations(path, **arguments)
    return caught.value.problems


@pytest.mark.parametrize(
    ("form", "classes", "labels"),
    [
        ("epic-verb", ("open", "take"), ["open", "take", "take"]),
        ("epic-noun", ("egg", "plate", "spoon"), ["spoon", "spoon", "plate"]),
        (
            "epic-action",
            ("open spoon", "take plate", "take spoon"),
            ["open spoon", "take spoon", "take plate"],
        ),
    ],
)
def test_epic_kitchens(
    tmp_path: Path, form: str, classes: tuple[str, ...], labels: list[str]
) -> None:
    annotations = load_annotations(epic(tmp_path), form=form)
    assert annotations.classes == classes
    assert [(v.video_id, v.subset, v.duration) for v in annotations.videos] == [
        ("P01_01", "train", 3725.15),
        ("P02_11", "validation", 1.88),
        ("P03_1", "test", 9.5),
    ]
    first, second, third = annotations.videos
    assert first.instances == tuple(
        Instance(start=start, end=end, label=label)
        for (start, end), label in zip(
            [(0.14, 3.37), (0.14, 3.37), (3723.05, 3724.3)], labels, strict=True
        )
    )
    assert [i.end for i in second.instances] == [1.88]  # it ends 10 ms late, as one of theirs does
    assert third.instances == ()  # its times are the answer
    assert load_annotations(tmp_path / "EPIC_100_validation.csv", form=form) == annotations


def test_epic_kitchens_must_be_told_what_a_class_is(tmp_path: Path) -> None:
    (problem,) = problems_of(epic(tmp_path))
    assert "form epic-verb, epic-noun or epic-action" in problem


def test_epic_kitchens_rows_are_named_by_their_narration(tmp_path: Path) -> None:
    rows = (
        COLUMNS,
        row("P01_01", 0, "00:00:03.37", "00:00:00.14", 3, 1),
        row("P01_01", 1, "0:61:00", "later", 3, 1),
        row("P01_01", 2, "00:00:01.00", "00:00:02.00", 77, 1),
        row("P09_09", 0, "00:00:01.00", "00:00:02.00", 3, 1),
        row("P02_11", 5, "00:00:00.10", "00:00:00.20", 3, 1),
        "P01_01_7,P01,P01_01,00:00:00.560,00:00:01.00,00:00:02.00",  # cut short
    )
    path = epic(tmp_path, **{"EPIC_100_train.csv": "\n".join(rows)})
    found = problems_of(path, form="epic-verb")
    expected = [
        "video 'P02_11': is in train and in validation",
        "video 'P01_01': annotation 'P01_01_0'.segment: is reversed",
        "video 'P01_01': annotation 'P01_01_1'.segment[0]: input should be a valid number",
        "video 'P01_01': annotation 'P01_01_1'.segment[1]: input should be a valid number",
        "video 'P01_01': annotation 'P01_01_2'.label: is not a known class (found '(class 77)')",
        "video 'P01_01': annotation 'P01_01_7'.label: is not a known class (found '(class )')",
        "video 'P09_09': duration: is missing",
    ]
    assert len(found) == len(expected)
    for start, problem in zip(expected, found, strict=True):
        assert problem.startswith(start)


def test_epic_kitchens_files_that_lack_something(tmp_path: Path) -> None:
    epic(tmp_path, **{"EPIC_100_validation.csv": "video_id,start_timestamp\n"})
    assert problems_of(tmp_path, form="epic-noun") == tuple(
        f"the column {name!r} is missing"
        for name in ("narration_id", "stop_timestamp", "noun_class")
    )
    (tmp_path / "EPIC_100_noun_classes.csv").unlink()
    assert problems_of(tmp_path, form="epic-noun") == ("there is no such file",)
    (folder := tmp_path / "empty").mkdir()
    assert "EPIC_100_train.csv" in problems_of(folder, form="epic-noun")[0]


@given(st.integers(0, 99 * 360_000))
def test_timestamps(hundredths: int) -> None:
    seconds, rest = divmod(hundredths, 100)
    text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{rest:02}"
    assert _seconds(text) == hundredths / 100
    for wrong in (text.replace(":", "-"), f"{text}:00", f"-{text}", text[3:]):
        assert _seconds(wrong) == wrong


def test_ego4d_moments(tmp_path: Path) -> None:
    training = ego4d(
        tmp_path,
        "moments_train.json",
        "train",
        clip(
            "c1",
            [moment(116.1, 123.6), moment(1, 2, "hidden", primary=False)],
            [moment(117.0, 124.0), moment(0, 349, "walk")],
        ),
        clip("c0", [moment(1, 2, primary=False)], []),
    )
    unannotated = clip("c3", length=60.5)
    del unannotated["annotations"]
    ego4d(tmp_path, "moments_val.json", "val", clip("c2", [moment(1, 2, "walk")], length=3.0))
    ego4d(tmp_path, "moments_test_unannotated.json", "test", unannotated)
    annotations = load_annotations(tmp_path)
    assert annotations == load_annotations(tmp_path, form="ego4d-mq", dataset=EGO4D_MQ)
    assert annotations.classes == ("use_phone", "walk")
    assert [(v.video_id, v.subset, v.duration) for v in annotations.videos] == [
        ("c1", "train", 479.0),
        ("c2", "val", 3.0),
        ("c3", "test", 60.5),
    ]
    assert annotations.videos[0].instances == (
        Instance(start=0.0, end=349.0, label="walk"),
        Instance(start=116.1, end=123.6, label="use_phone"),
        Instance(start=117.0, end=124.0, label="use_phone"),
    )
    assert annotations.excluded == (
        Exclusion(video_id="c0", reason="none of its labels is primary"),
    )
    renamed = training.rename(tmp_path / "renamed.json")  # what it holds tells the form as well
    assert [v.video_id for v in load_annotations(renamed).videos] == ["c1"]


def test_ego4d_problems(tmp_path: Path) -> None:
    timeless = clip("t", [moment(1, 2)])
    timeless["clip_end_sec"] = "soon"
    path = ego4d(
        tmp_path,
        "moments_val.json",
        "val",
        clip("a", [moment(500, 520), moment(4, 3)]),
        clip("a", [moment(1, 2)]),
        {"no": "uid"},
        timeless,
    )
    assert [problem.partition(" (found")[0] for problem in problems_of(path)] == [
        "video 'a': is there more than once",
        "moments_val.json, videos[0].clips[2]: must be an object with a clip_uid",
        "video 'a': annotations[0].segment: reaches past the video's duration of 479 s",
        "video 'a': annotations[1].segment: is reversed: it ends before it starts",
        "video 't': duration: input should be a valid number, unable to parse string as a number",
    ]
    path.write_text('{"videos": [{"clips": []}], "videos": [{"clips": {}}]}')
    repeated, shape = problems_of(path)
    assert repeated == "moments_val.json, key 'videos' is there more than once"
    assert "videos[0] must be an object" in shape
    whole = json.dumps({"videos": [{"split": "val", "clips": [clip("a", [moment(1, 2)])]}]})
    path.write_text(whole.replace('"start_time"', '"start_time": 0, "start_time"'))
    (problem,) = problems_of(path)
    place = "moments_val.json, videos[0].clips[0].annotations[0].labels[0]"
    assert problem == f"{place}: key 'start_time' is there more than once"
    path.write_text('{"videos": [{"clips": {}}]}')
    assert "videos[0] must be an object" in problems_of(path)[0]
    path.write_text("[]")
    assert '"videos"' in problems_of(path)[0]
    path.unlink()
    assert "moments_train.json" in problems_of(tmp_path, form="ego4d-mq")[0]


def test_class_files_of_the_thumos_family(tmp_path: Path) -> None:
    for part, name, content in (
        ("val", "Diving_val.txt", "video_validation_0000051  67.5 75.9\n\n"),
        ("val", "readme.txt", "This folder contains the temporal annotations.\n"),
        ("test", "Diving_test.txt", "video_test_0000004 1.0 2.0\nvideo_test_0000004 0.2 1.1\n"),
        ("test", "Shotput_test.txt", "video_test_0000004  0.5 1.5  \n"),
        ("test", "TwoHandedCatch.txt", "video_test_0000006 0.5 1.5\n"),
    ):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / name).write_text(content)
    durations = {
        "video_validation_0000051": 80.0,
        "video_test_0000004": 3.0,
        "video_test_0000006": 3.0,
    }
    annotations = load_annotations(tmp_path, durations=durations)
    assert annotations.classes == ("Diving", "Shotput", "TwoHandedCatch")
    assert [(v.video_id, v.subset) for v in annotations.videos] == [
        ("video_test_0000004", "test"),
        ("video_test_0000006", "test"),
        ("video_validation_0000051", "validation"),
    ]
    assert [(i.start, i.label) for i in annotations.videos[0].instances] == [
        (0.2, "Diving"),
        (0.5, "Shotput"),
        (1.0, "Diving"),
    ]
    assert len(problems_of(tmp_path)) == 3  # no durations
    (tmp_path / "val" / "Diving_val.txt").write_text("video_validation_0000051 9 8\nv_a 1 2\none\n")
    *lines, reversed_one = problems_of(tmp_path, durations=durations)
    assert lines == [
        "Diving_val.txt:2: must be a THUMOS video, a start and an end: v_a 1 2",
        "Diving_val.txt:3: must be a THUMOS video, a start and an end: one",
    ]
    assert "annotation 'Diving_val.txt:1'.segment: is reversed" in reversed_one


def test_folders_that_hold_no_annotations(tmp_path: Path) -> None:
    assert "no known data set" in problems_of(tmp_path)[0]
    assert "no text file of a class" in problems_of(tmp_path, form="class-files")[0]
    with pytest.raises(ValueError, match=r"no form 'epic'.*epic-verb"):
        load_annotations(tmp_path, form="epic")
