from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from re2tal.detection import (
    DetectionFileError,
    Detections,
    read_detections,
    read_raw,
    rows,
    write_detections,
    write_raw,
)

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


def equal(a: Detections, b: Detections) -> bool:
    pairs = ((a.segments, b.segments), (a.scores, b.scores), (a.labels, b.labels))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_results_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    write_detections(path, VIDEOS, CLASSES)
    again = read_detections(path, CLASSES)
    assert list(again) == sorted(VIDEOS)
    assert all(equal(again[video_id], VIDEOS[video_id]) for video_id in VIDEOS)
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
        ({"scores": torch.tensor([torch.nan])}, "'x'.*not finite"),
        ({"segments": torch.tensor([[0.0, torch.inf]])}, "'x'.*not finite"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(
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
        "b": 3,
        "c": [],
        "c": [{"segment": [1, "2", 3], "score": "0.3", "label": "Diving"}]}}"""
    )
    with pytest.raises(DetectionFileError) as error:
        read_detections(path, CLASSES)
    expected = [
        ("key 'c'", "more than once"),
        ("video 'a'[0].segment", "reversed"),
        ("video 'a'[0].score", "finite"),
        ("video 'a'[0].label", "not a known class (found 'Surfing')"),
        ("video 'a'[1].segment", "is missing"),
        ("video 'a'[1].score", "number"),
        ("video 'a'[1].label", "string"),
        ("video 'a'[2]", "must be an object (found 5)"),
        ("video 'b'", "list"),
        ("video 'c'[0].segment", "2 items"),
        ("video 'c'[0].score", "number"),
    ]
    problems = error.value.problems
    assert len(problems) == len(expected)
    for problem, (place, reason) in zip(problems, expected, strict=True):
        assert problem.startswith(place + ": ")
        assert reason in problem
    assert str(error.value).startswith(f"{path}: 11 problems.\n  - key 'c'")
    assert pickle.loads(pickle.dumps(error.value)).problems == problems


def test_a_message_shows_only_the_first_hundred_problems(tmp_path: Path) -> None:
    path = tmp_path / "theirs.json"
    row = {"segment": [0, 1], "score": 1, "label": "?"}
    path.write_text(json.dumps({"results": {"a": [row] * 250}}))
    with pytest.raises(DetectionFileError) as error:
        read_detections(path, CLASSES)
    assert len(error.value.problems) == 250
    assert str(error.value).endswith("... and 150 more")


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
    with pytest.raises(DetectionFileError, match=reason):
        read_detections(path, CLASSES)


def test_raw_predictions_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "raw.safetensors"
    write_raw(path, VIDEOS, CLASSES)
    again, classes = read_raw(path)
    assert classes == CLASSES
    assert list(again) == list(VIDEOS)
    assert all(equal(again[video_id], VIDEOS[video_id]) for video_id in VIDEOS)
    write_raw(path, {}, ())
    assert read_raw(path) == ({}, ())
    assert list(tmp_path.iterdir()) == [path]


def test_raw_predictions_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "raw.safetensors"
    with pytest.raises(ValueError, match="labels outside 0 to 1"):
        write_raw(path, VIDEOS, CLASSES[:2])
    with pytest.raises(DetectionFileError, match="no such file"):
        read_raw(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(DetectionFileError, match="cannot be read"):
        read_raw(path)
    save_file({"segments": torch.zeros(1, 2)}, path)
    with pytest.raises(DetectionFileError, match="no scores, labels, counts, videos, classes"):
        read_raw(path)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": torch.tensor([2])},
        {"counts": torch.tensor([2, -1])},
        {"segments": torch.zeros(1, 3)},
        {"labels": torch.tensor([7])},
        {"labels": torch.tensor([0, 0])},
    ],
)
def test_raw_predictions_that_do_not_fit_together(
    change: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "raw.safetensors"
    tensors = {"segments": torch.zeros(1, 2), "scores": torch.zeros(1)}
    tensors |= {"labels": torch.tensor([0]), "counts": torch.tensor([1, 0])}
    names = {"videos": '["a", "b"]', "classes": '["Diving"]'}
    save_file(tensors, path, metadata=names)
    assert [len(part) for part in read_raw(path)[0].values()] == [1, 0]
    save_file(tensors | change, path, metadata=names)
    with pytest.raises(DetectionFileError, match="do not fit"):
        read_raw(path)
