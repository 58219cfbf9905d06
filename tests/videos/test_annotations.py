import json
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from re2tal.annotations import AnnotationError, Annotations, Instance, VideoAnnotation
from re2tal.datasets import DURATION_TOLERANCE, load_annotations, read_durations, read_ids
from re2tal.detection import read_detections, read_raw
from re2tal.detection.video_scores import load_video_scores
from re2tal.json_files import FileError
from re2tal.weights import read_tensors


def action(start: Any, end: Any, label: str = "run") -> dict[str, Any]:
    return {"segment": [start, end], "label": label}


def video(*actions: Any, duration: Any = 10.0, subset: str = "training") -> dict[str, Any]:
    return {"subset": subset, "duration": duration, "annotations": list(actions)}


def write(folder: Path, content: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"database": content}))
    return path


def problems_of(path: Path, classes: list[str] | None = None) -> tuple[str, ...]:
    with pytest.raises(AnnotationError) as caught:
        load_annotations(path, classes=classes)
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_reads_what_the_file_says(tmp_path: Path) -> None:
    document = {
        "version": "VERSION 1.3",
        "taxonomy": [{"nodeName": "Root"}],
        "database": {
            "b": {**video(action(4, 5.5, "jump"), action(1, 3)), "url": "https://example.org/b"},
            "a": {"subset": "testing", "duration": 7.25},
            "c": video(action("0.5", " 2 ", "jump"), duration="12.5", subset="validation"),
        },
    }
    annotations = load_annotations(write(tmp_path, json.dumps(document)))
    assert annotations.classes == ("jump", "run")
    assert annotations.videos == (
        VideoAnnotation(video_id="a", subset="testing", duration=7.25),
        VideoAnnotation(
            video_id="b",
            subset="training",
            duration=10.0,
            instances=(
                Instance(start=1.0, end=3.0, label="run"),
                Instance(start=4.0, end=5.5, label="jump"),
            ),
        ),
        VideoAnnotation(
            video_id="c",
            subset="validation",
            duration=12.5,
            instances=(Instance(start=0.5, end=2.0, label="jump"),),
        ),
    )


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + json.dumps({"database": {"a": video(action(1, 2))}}))
    assert load_annotations(path).videos[0].video_id == "a"


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "fine": video(action(1, 2)),
            "not finite": video(action(float("nan"), 2), action(1, float("inf"))),
            "negative": video(action(-1, 2)),
            "reversed": video(action(3, 2)),
            "empty": video(action(2, 2)),
            "late": video(action(1, 2), action(9, 10.01 + DURATION_TOLERANCE)),
            "after": video(action(10.0, 10.5)),
            "unknown": video(action(1, 2, "fly")),
            "duration": video(action(3, 2), duration=0),
            "duration too": video(duration=-4.0),
            "words": video(action("one", 2), action(True, 2)),
            "shape": video(
                {"segment": [1], "label": "run"}, {"segment": [1, 2, 3], "label": "run"}
            ),
            "label": video({"segment": [1, 2]}, {"segment": [1, 2], "label": ""}),
            "no object": 7,
            "bare": {},
            "list": {"subset": "training", "duration": 3.0, "annotations": {"segment": [1, 2]}},
        },
    )
    found = problems_of(path, classes=["run"])
    expected = [
        ("not finite", "annotations[0].segment[0]", "finite"),
        ("not finite", "annotations[1].segment[1]", "finite"),
        ("negative", "annotations[0].segment", "starts before"),
        ("reversed", "annotations[0].segment", "reversed"),
        ("empty", "annotations[0].segment", "no length"),
        ("late", "annotations[1].segment", "past the video's duration of 10 s"),
        ("after", "annotations[0].segment", "past the video's duration"),
        ("unknown", "annotations[0].label", "not a known class (found 'fly')"),
        ("duration", "duration", "greater than or equal to 0.001"),
        ("duration", "annotations[0].segment", "reversed"),
        ("duration too", "duration", "greater than or equal to 0.001"),
        ("words", "annotations[0].segment[0]", "number"),
        ("words", "annotations[1].segment[0]", "number"),
        ("shape", "annotations[0].segment", "missing"),
        ("shape", "annotations[1].segment", "at most 2"),
        ("label", "annotations[0].label", "missing"),
        ("label", "annotations[1].label", "at least 1 character"),
        ("no object", "entry", "must be an object"),
        ("bare", "subset", "missing"),
        ("bare", "duration", "missing"),
        ("list", "annotations", "list"),
    ]
    for (video_id, place, reason), problem in zip(expected, found, strict=True):
        assert problem.startswith(f"video {video_id!r}: ")
        assert place in problem
        assert reason in problem


@pytest.mark.parametrize(
    "video_id",
    ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "nul\0", "line\nfeed", "\ud800"],
)
def test_ids_that_could_leave_the_folder_are_refused(tmp_path: Path, video_id: str) -> None:
    (problem,) = problems_of(write(tmp_path, {video_id: video(action(1, 2))}))
    assert problem.startswith(f"video {video_id!r}: the id ")


@pytest.mark.parametrize("video_id", ["v_QOlSCBRmfWY", "-x", "a..b", "…", "with space", "x.mp4"])
def test_odd_but_harmless_ids_are_taken(tmp_path: Path, video_id: str) -> None:
    annotations = load_annotations(write(tmp_path, {video_id: video(action(1, 2))}))
    assert annotations.videos[0].video_id == video_id


def test_repeated_keys_are_found(tmp_path: Path) -> None:
    entry = json.dumps(video(action(1, 2)))
    twice = entry.replace('"duration"', '"duration": 3, "duration"')
    path = write(tmp_path, f'{{"database": {{"a": {entry}, "b": {twice}, "a": {entry}}}}}')
    assert problems_of(path) == (
        "video 'a': is there more than once",
        "video 'b': key 'duration' is there more than once",
    )


def test_repeated_keys_are_found_at_every_depth_and_told_with_their_place(tmp_path: Path) -> None:
    video = '"subset": "training", "duration": 9'
    path = write(
        tmp_path,
        '{"version": "1", "taxonomy": [{"nodeId": 1}, {"nodeId": 2, "nodeId": 3}],'
        f' "database": {{"a": {{{video}}}}},'
        f' "database": {{"b": {{{video}, "annotations": ['
        '{"segment": [1, 2], "label": "run"},'
        '{"segment": [1, 2], "segment": [3, 4], "label": "run", "more": {"x": 1, "x": 1}}]}}}',
    )
    of_the_video = (
        "video 'b': annotations[1]: key 'segment' is there more than once",
        "video 'b': annotations[1].more: key 'x' is there more than once",
    )
    of_the_file = (
        "key 'database' is there more than once",
        "taxonomy[1]: key 'nodeId' is there more than once",
    )
    assert problems_of(path) == (*of_the_file, *of_the_video)
    with pytest.raises(AnnotationError) as caught:  # what is not used is not judged
        load_annotations(path, exclude=["b"])
    assert caught.value.problems == of_the_file


def test_repeated_keys_are_told_even_where_the_shape_is_wrong(tmp_path: Path) -> None:
    repeated, shape = problems_of(write(tmp_path, '{"database": {"a": 1}, "database": []}'))
    assert repeated == "key 'database' is there more than once"
    assert 'the object "database"' in shape
    repeated, shape = problems_of(write(tmp_path, '{"database": {"a": 1}, "database": {}}'))
    assert repeated == "key 'database' is there more than once"
    assert shape == '"database" is empty'
    database = '{"a": {"subset": "training", "duration": 3}}'
    path = write(tmp_path, f'{{"database": {database}, "database": {database[:-1]}, "a": 1}}}}')
    first, second, shape = problems_of(path)
    assert first == "key 'database' is there more than once"
    assert second == "video 'a': is there more than once"
    assert "must be an object" in shape


def test_a_segment_a_little_past_the_end_is_clipped(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": video(action(8, 10 + DURATION_TOLERANCE))})
    assert load_annotations(path).videos[0].instances[0].end == 10.0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json {", "not a JSON text"),
        ("", "not a JSON text"),
        ("[" * 100_000, "not a JSON text"),
        ("[]", '"database"'),
        ('{"videos": {}}', '"database"'),
        ('{"database": []}', '"database"'),
        ('{"database": {}}', '"database" is empty'),
        ('{"database": {"a": {"subset": "testing", "duration": 3}}}', "nothing to learn"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: str, reason: str) -> None:
    (problem,) = problems_of(write(tmp_path, content))
    assert reason in problem


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "none.json") == ("there is no such file",)
    (problem,) = problems_of(tmp_path)
    assert "cannot be read" in problem
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    (problem,) = problems_of(binary)
    assert "not a text in UTF-8" in problem


def test_given_classes_stand_even_where_nothing_is_annotated(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": video(subset="testing")})
    assert load_annotations(path, classes=["walk", "run", "walk"]).classes == ("run", "walk")


def test_subset_keeps_the_classes(tmp_path: Path) -> None:
    content = {"a": video(action(1, 2)), "b": video(action(1, 2, "jump"), subset="validation")}
    annotations = load_annotations(write(tmp_path, content))
    part = annotations.subset("validation")
    assert part.classes == ("jump", "run")
    assert [v.video_id for v in part.videos] == ["b"]
    with pytest.raises(AnnotationError, match=r"'test'.*'training', 'validation'"):
        annotations.subset("test")


def test_the_fingerprint_follows_what_is_used_and_nothing_else(tmp_path: Path) -> None:
    content = {"a": video(action(1, 2), action(3, 4)), "b": video(action(1, 2, "jump"))}

    def fingerprint(database: dict[str, Any], **extra: Any) -> str:
        text = json.dumps({"database": database, **extra}, indent=len(extra))
        return load_annotations(write(tmp_path, text)).fingerprint

    reference = fingerprint(content)
    assert len(reference) == 64
    reordered = {"b": {**content["b"], "url": "u"}, "a": video(action(3, 4), action("1", 2.0))}
    assert fingerprint(reordered, version="2") == reference
    for change in (
        {"a": video(action(1, 2.001), action(3, 4))},
        {"a": video(action(1, 2), action(3, 4, "jump"))},
        {"a": video(action(1, 2), action(3, 4), duration=11)},
        {"a": video(action(1, 2), action(3, 4), subset="validation")},
        {"c": video()},
    ):
        assert fingerprint(content | change) != reference


def test_the_error_travels_between_processes() -> None:
    error = AnnotationError("a.json", ["one", "two"])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.source, copy.problems, str(copy)) == (error.source, error.problems, str(error))


def test_annotations_are_plain_values() -> None:
    annotations = Annotations(
        classes=("run",), videos=(VideoAnnotation(video_id="a", subset="t", duration=1.0),)
    )
    assert pickle.loads(pickle.dumps(annotations)) == annotations


@pytest.fixture(params=["pipe", "socket", "device"])
def irregular(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """What a read of might never return from."""
    path = tmp_path / "file.json"
    with socket.socket(socket.AF_UNIX) as server:
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        else:
            with pytest.MonkeyPatch.context() as patch:  # names of sockets are short
                patch.chdir(tmp_path)
                server.bind(path.name)
        yield path


@pytest.mark.parametrize(
    "read",
    [
        load_annotations,
        read_durations,
        read_ids,
        read_raw,
        partial(read_detections, classes=["a"]),
        partial(load_video_scores, classes=["a"]),
    ],
)
def test_what_is_no_regular_file_is_refused(irregular: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(FileError, match=r"file\.json.*(?s:.*)is no regular file, but a pipe, a"):
        read(irregular)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_no_regular_file_are_refused(irregular: Path, suffix: str) -> None:
    path = irregular.rename(irregular.with_suffix(suffix))
    with pytest.raises(ValueError, match=r"file\.\w+ cannot be read: it is no regular file"):
        read_tensors(path)
