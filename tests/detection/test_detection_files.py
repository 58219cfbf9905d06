"""Detections in files: results, raw predictions, and subtitles that players take."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from re2tal.detection import (
    Detections,
    read_detections,
    read_raw,
    rows,
    write_detections,
    write_raw,
)
from re2tal.detection.files import srt, webvtt
from re2tal.json_files import FileError
from tests.detection.rows import same

CLASSES = ("Long jump", "Diving", "Ünïcode")


def found(count: int, seed: int) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(count, generator=generator) * 1000
    return Detections(
        segments=torch.stack([start, start + torch.rand(count, generator=generator)], dim=1),
        scores=torch.rand(count, generator=generator) ** 20,
        labels=torch.randint(0, 3, (count,), generator=generator),
    )


VIDEOS = {"v_b": found(500, 0), "a": Detections.empty(), "c": found(3, 1)}


def single(detections: Detections) -> Detections:
    return replace(
        detections, segments=detections.segments.float(), scores=detections.scores.float()
    )


def test_results_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    write_detections(path, VIDEOS, CLASSES)
    again = read_detections(path, CLASSES)
    assert list(again) == sorted(VIDEOS)
    assert all(same(single(again[video_id]), VIDEOS[video_id]) for video_id in VIDEOS)
    assert all(x.segments.dtype == x.scores.dtype == torch.float64 for x in again.values())
    # In float64 the decimals of a file are what they look like, and come back as well.
    write_detections(path, again, CLASSES)
    assert all(same(x, again[v]) for v, x in read_detections(path, CLASSES).items())
    thirds = replace(again["c"], segments=again["c"].segments / 3, scores=again["c"].scores / 3)
    write_detections(path, {"c": thirds}, CLASSES)
    assert same(read_detections(path, CLASSES)["c"], thirds)
    path.write_text(
        '{"results": {"a": [{"segment": [0.1, 0.7], "score": 0.3, "label": "Diving"}]}}'
    )
    assert read_detections(path, CLASSES)["a"].segments.tolist() == [[0.1, 0.7]]
    write_detections(path, VIDEOS, CLASSES)
    # Labels follow the names, not the order of whoever wrote the file.
    turned = read_detections(path, ("new", *CLASSES[::-1]))
    assert torch.equal(turned["c"].labels, 3 - VIDEOS["c"].labels)
    document = json.loads(path.read_text())
    assert {*document} == {"version", "external_data", "results"}  # all that the server asks for
    assert document["results"]["c"] == rows(VIDEOS["c"], CLASSES)
    assert list(tmp_path.iterdir()) == [path]


def test_rows_are_plain_numbers_and_names() -> None:
    one = Detections(
        segments=torch.tensor([[0.1, 2.5]]), scores=torch.tensor([0.3]), labels=torch.tensor([1])
    )
    assert rows(one, CLASSES) == [{"segment": [0.100000001, 2.5], "score": 0.300000012,
                                   "label": "Diving"}]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": torch.tensor([3])}, r"'x'.*labels \[3\], but there are 3 classes"),
        ({"labels": torch.tensor([-1])}, r"'x'.*labels \[-1\]"),
        (
            {"scores": torch.tensor([torch.nan])},
            "'x'.*Detection 0 is not finite.*0 to 1, score nan",
        ),
        ({"segments": torch.tensor([[0.0, torch.inf]])}, "'x'.*not finite: segment 0 to inf"),
        ({"segments": torch.tensor([[2.5, 1.0]])}, "'x'.*reversed: .* 2.5 to 1, score 1. 1 of 1"),
    ],
)
def test_a_refused_result_leaves_the_old_file(
    change: dict[str, torch.Tensor], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "detections.json"
    path.write_text("old")
    good = {"segments": torch.tensor([[0.0, 1.0]]), "scores": torch.ones(1)}
    bad = Detections(**{**good, "labels": torch.tensor([0]), **change})
    with pytest.raises(ValueError, match=reason):
        write_detections(path, {"x": bad}, CLASSES)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("detections.json", "old")]


def test_a_broken_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(b"half")
        raise OSError("no space left")

    path = tmp_path / "detections.json"
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_detections(path, VIDEOS, CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_all_problems_of_a_file_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(
        """{"results": {
        "a": [{"segment": [2, 1], "score": NaN, "label": "Surfing"},
              {"score": true, "label": 3},
              5,
              {"segment": [0, 0], "score": 0.5, "label": "Diving", "extra": 1}],
        "d": 3,
        "b": [{"segment": [0, 1], "score": 0.5, "label": "Diving", "label": "Diving"}],
        "c": [],
        "c": [{"segment": [1, "2", 3], "score": "0.3", "label": "Diving"}]}}"""
    )
    with pytest.raises(FileError) as error:
        read_detections(path, CLASSES)
    expected = [
        ("results", "key 'c' is there more than once"),
        ("results.b[0]", "key 'label' is there more than once"),
        ("video 'a'[0].segment", "reversed"),
        ("video 'a'[0].score", "finite"),
        ("video 'a'[0].label", "not a known class (found 'Surfing')"),
        ("video 'a'[1].segment", "is missing"),
        ("video 'a'[1].score", "number"),
        ("video 'a'[1].label", "string"),
        ("video 'a'[2]", "must be an object (found 5)"),
        ("video 'd'", "list"),
        ("video 'c'[0].segment", "2 items"),
        ("video 'c'[0].score", "number"),
    ]
    problems = error.value.problems
    assert len(problems) == len(expected)
    for problem, (place, reason) in zip(problems, expected, strict=True):
        assert problem.startswith(place + ": ")
        assert reason in problem
    assert str(error.value).startswith(f"{path}: 12 problems.\n  - results: key 'c'")
    assert pickle.loads(pickle.dumps(error.value)).problems == problems


def test_a_message_shows_a_few_problems_of_a_kind_and_a_hundred_of_all(tmp_path: Path) -> None:
    path = tmp_path / "theirs.json"
    row = {"segment": [0, 1], "score": 1, "label": "?"}
    path.write_text(json.dumps({"results": {"a": [row] * 250}}))
    with pytest.raises(FileError) as error:
        read_detections(path, CLASSES)
    assert len(error.value.problems) == 250
    first, *rest = str(error.value).splitlines()
    assert first == f"{path}: 250 problems."
    place = "  - video 'a'[{}].label: is not a known class (found '?')"
    assert rest == [*map(place.format, range(3)), "  - ... and 247 more like these"]
    others = FileError("f", ["a" * number for number in range(1, 251)])
    assert str(others).endswith("... and 150 more")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no such file"),
        ("{", "is not a JSON text"),
        ("[]", "must be an object with the key"),
        ('{"database": {}}', "must be an object with the key"),
        ('{"results": []}', '"results": .*dictionary'),
    ],
)
def test_files_of_another_kind(text: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FileError, match=reason):
        read_detections(path, CLASSES)


def test_raw_predictions_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "raw.safetensors"
    write_raw(path, VIDEOS, CLASSES)
    again, classes = read_raw(path)
    assert classes == CLASSES
    assert list(again) == list(VIDEOS)
    assert all(same(again[video_id], VIDEOS[video_id]) for video_id in VIDEOS)
    write_raw(path, {}, ())
    assert read_raw(path) == ({}, ())
    assert list(tmp_path.iterdir()) == [path]


def test_raw_predictions_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "raw.safetensors"
    with pytest.raises(ValueError, match="labels outside 0 to 1"):
        write_raw(path, VIDEOS, CLASSES[:2])
    with pytest.raises(FileError, match="no such file"):
        read_raw(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(FileError, match="cannot be read"):
        read_raw(path)
    save_file({"segments": torch.zeros(1, 2)}, path)
    with pytest.raises(FileError, match="no scores, labels, counts, videos, classes"):
        read_raw(path)


@pytest.mark.parametrize(
    ("change", "names", "reasons"),
    [
        ({"counts": torch.tensor([2])}, {}, ["counts must be 2 integers"]),
        ({"counts": torch.tensor([2, -1])}, {}, ["counts must be 0 or more"]),
        ({"counts": torch.tensor([1, 1])}, {}, ["add up to 1 detections"]),
        ({"segments": torch.zeros(1, 3)}, {}, ["segments must be of shape (1, 2)"]),
        ({"segments": torch.zeros(1, 2).int()}, {}, ["segments must be floating point"]),
        (
            {"segments": torch.tensor([[0, math.inf]])},
            {},
            ["segments must be finite numbers, but 1"],
        ),
        (
            {"scores": torch.tensor([math.nan])},
            {},
            ["scores must be finite numbers, but 1 are nan"],
        ),
        ({"scores": torch.tensor([-2.0])}, {}, ["scores must not be negative: are they logits"]),
        ({"scores": torch.tensor(0.5)}, {}, ["scores must be of shape (N,)"]),
        ({"labels": torch.tensor([7])}, {}, ["labels are 7 to 7, but there are 1 classes"]),
        ({"labels": torch.tensor([0.5])}, {}, ["labels must be integers"]),
        ({}, {"videos": '{"a": 1, "b": 2}'}, ['"videos" must be a JSON list']),
        ({}, {"videos": '["a", "a"]'}, ['"videos" has names more than once: a']),
        ({}, {"classes": '["x", 3]'}, ['"classes" must be a JSON list of names']),
        ({}, {"classes": '"x"'}, ['"classes" must be a JSON list of names']),
        (
            {"labels": torch.tensor([0, 0]), "segments": torch.zeros(2, 2)},
            {"videos": '["a"]'},
            ["segments must be", "labels must be", "counts must be 1 integers"],
        ),
    ],
)
def test_raw_predictions_that_do_not_fit_together(
    change: dict[str, torch.Tensor], names: dict[str, str], reasons: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "raw.safetensors"
    tensors = {"segments": torch.zeros(1, 2), "scores": torch.zeros(1)}
    tensors |= {"labels": torch.tensor([0]), "counts": torch.tensor([1, 0])}
    metadata = {"videos": '["a", "b"]', "classes": '["Diving"]'}
    save_file(tensors, path, metadata=metadata)
    assert [len(part) for part in read_raw(path)[0].values()] == [1, 0]
    save_file(tensors | change, path, metadata=metadata | names)
    with pytest.raises(FileError) as error:
        read_raw(path)
    assert len(error.value.problems) == len(reasons)
    for problem, reason in zip(error.value.problems, reasons, strict=True):
        assert reason in problem


# Subtitles

CLOCK = r"(\d{2,}):([0-5]\d):([0-5]\d)[.,](\d{3})"


def cues(text: str) -> list[tuple[float, float, list[str]]]:
    """Blocks with a line of times, by the two formats' common rules."""
    found = []
    for block in re.split(r"\n\n+", text.strip()):
        lines = block.splitlines()
        at = next((i for i, line in enumerate(lines) if "-->" in line), None)
        if at is None:
            assert block in ("", "WEBVTT")
            continue
        match = re.fullmatch(f"{CLOCK} --> {CLOCK}", lines[at])
        assert match is not None, lines[at]
        numbers = [int(part) for part in match.groups()]
        start, end = (
            3600 * h + 60 * m + s + ms / 1000 for h, m, s, ms in (numbers[:4], numbers[4:])
        )
        found.append((start, end, lines[at + 1 :]))
    return found


def row(start: float, end: float, label: str, score: float) -> dict[str, object]:
    return {"segment": [start, end], "label": label, "score": score}


def test_webvtt_has_a_cue_for_each_detection_by_start() -> None:
    text = webvtt([row(3725.0, 3726.5, "b", 0.9), row(0.5, 4000.25, "a", 0.123)])
    assert text.startswith("WEBVTT\n\n")
    assert cues(text) == [(0.5, 4000.25, ["a 0.12"]), (3725.0, 3726.5, ["b 0.90"])]
    assert "01:02:05.000 --> 01:02:06.500" in text


def test_srt_is_numbered_and_never_shows_two_at_once() -> None:
    text = srt([row(1.0, 4.0, "a", 0.5), row(2.0, 3.0, "b", 0.9), row(6.0, 7.0, "c", 0.4)])
    assert cues(text) == [
        (1.0, 2.0, ["a 0.50"]),
        (2.0, 3.0, ["b 0.90", "a 0.50"]),
        (3.0, 4.0, ["a 0.50"]),
        (6.0, 7.0, ["c 0.40"]),
    ]
    assert re.findall(r"^\d+$", text, flags=re.MULTILINE) == ["1", "2", "3", "4"]
    assert "00:00:01,000 --> 00:00:02,000" in text


@pytest.mark.parametrize("write", [webvtt, srt])
def test_a_label_cannot_break_out_of_its_line(write: Callable[[Any], str]) -> None:
    label = "a\n\n00:00:00.000 --> 00:00:09.000\n<b>&amp; \u2028x"
    ((start, end, lines),) = cues(write([row(1.0, 2.0, label, 0.5)]))
    assert (start, end, len(lines)) == (1.0, 2.0, 1)
    assert not set(lines[0]) & set("<>")
    if write is webvtt:
        assert "--&gt; 00:00:09.000 &lt;b&gt;&amp;amp; x 0.50" in lines[0]


@pytest.mark.parametrize("write", [webvtt, srt])
def test_an_instant_is_shown_and_nothing_is_no_cue(write: Callable[[Any], str]) -> None:
    assert cues(write([row(2.0, 2.0001, "a", 1.0)])) == [(2.0, 2.001, ["a 1.00"])]
    assert cues(write([])) == []
