from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from re2tal.detection import Detections, VideoScores, fuse, fuse_videos, load_video_scores
from re2tal.json_files import FileError
from tests.detection.rows import detections

CLASSES = ("Diving", "Long jump", "Surfing")


def proposals(*rows: tuple[float, float, float]) -> Detections:
    return detections([(*row, 0) for row in rows], torch.float32)


def written(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_scores_follow_the_names(tmp_path: Path) -> None:
    names = ["Surfing", "Ballet", "Diving", "Long jump"]
    document = {"results": {"x": [0.1, 0.2, 0.3, 0.4]}, "class": names}
    found = load_video_scores(written(tmp_path / "scores.json", document), CLASSES)
    assert found.classes == CLASSES
    assert found.scores["x"].tolist() == pytest.approx([0.3, 0.4, 0.1])
    assert found.scores["x"].dtype == torch.float32


def test_logits_become_shares_of_all_classes_of_the_file(tmp_path: Path) -> None:
    names = ["Surfing", "Ballet", "Diving", "Long jump"]
    document = {"results": {"x": [[-1.0, 2.0, 0.5, 0.0]]}, "classes": names}
    path = written(tmp_path / "scores.json", document)
    found = load_video_scores(path, CLASSES, logits=True).scores["x"]
    total = sum(math.exp(value) for value in (-1.0, 2.0, 0.5, 0.0))
    expected = [math.exp(value) / total for value in (0.5, 0.0, -1.0)]
    assert found.tolist() == pytest.approx(expected)
    with pytest.raises(FileError, match=r"video 'x': has a negative score; .*logits"):
        load_video_scores(path, CLASSES)


def test_all_problems_of_a_file_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    shape = '{"results": {"a": [1, NaN], "b": [[0.1, "x"]], "c": 4, "d": [[1], [2]]}, "class": [3]}'
    path.write_text(shape)
    with pytest.raises(FileError) as error:
        load_video_scores(path, CLASSES)
    places = [problem.split(":")[0] for problem in error.value.problems]
    expected = ["a[1]", "b[1]", "c", "d[0]", "d[1]"]
    assert places == [f"results.{place}" for place in expected] + ["class[0]"]

    content = '{"results": {"a": [1, 2], "a": [1, 2, 3], "b": [1, -2, 3]},'
    path.write_text(content + ' "class": ["Diving", "Diving", "Long jump"]}')
    with pytest.raises(FileError) as error:
        load_video_scores(path, CLASSES)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "results",
        "class 'Surfing'",
        "class 'Diving'",
        "video 'b'",
    ]
    written(path, {"results": {"a": [1.0]}, "class": list(CLASSES)})
    with pytest.raises(FileError, match="video 'a': has 1 scores for 3 classes"):
        load_video_scores(path, CLASSES)
    others: list[Any] = [[], {"results": {}}]
    for other in others:
        with pytest.raises(FileError):
            load_video_scores(written(path, other), CLASSES)


def test_the_best_classes_of_a_video_are_given_to_each_proposal() -> None:
    found = fuse(
        proposals((0, 1, 0.5), (4, 9, 0.9), (2, 3, 0.5)), torch.tensor([0.1, 0.8, 0.4]), top=2
    )
    expected = [
        (0.72, 1, [4, 9]),
        (0.4, 1, [0, 1]),  # of equals the earlier proposal
        (0.4, 1, [2, 3]),
        (0.36, 2, [4, 9]),
        (0.2, 2, [0, 1]),
        (0.2, 2, [2, 3]),
    ]
    assert found.scores.tolist() == pytest.approx([row[0] for row in expected])
    assert found.labels.tolist() == [row[1] for row in expected]
    assert found.segments.tolist() == [row[2] for row in expected]
    nothing = fuse(proposals(), torch.tensor([0.1, 0.8]), top=2)
    assert (len(nothing), nothing.labels.dtype) == (0, torch.int64)
    for top in (0, 3):
        with pytest.raises(ValueError, match=f"1 to 2 classes each, not {top}"):
            fuse(proposals(), torch.tensor([0.1, 0.8]), top=top)


def test_videos_are_found_by_either_form_of_their_id() -> None:
    scores = VideoScores(
        classes=("a",),
        scores={"x": torch.tensor([0.1]), "v_y": torch.tensor([0.2]), "v_v_z": torch.tensor([0.3]),
                "v_x": torch.tensor([0.4])},
    )  # fmt: skip
    given = {name: proposals((0, 1, 1.0)) for name in ("x", "v_x", "y", "v_y", "v_z")}
    fused = fuse_videos(given, scores, top=1)
    assert [round(float(v.scores[0]), 1) for v in fused.values()] == [0.1, 0.4, 0.2, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"2 of 7 videos have no video-level scores: z, q\. Leave"):
        fuse_videos({**given, "z": proposals(), "q": proposals()}, scores, top=1)


def test_videos_are_found_in_every_normal_form_of_their_id(tmp_path: Path) -> None:
    results = {"caf\u00e9": [0.1], "v_cafe\u0301s": [0.2]}
    path = written(tmp_path / "scores.json", {"results": results, "class": ["a"]})
    scores = load_video_scores(path, ("a",))
    for video_id, expected in (("cafe\u0301", 0.1), ("caf\u00e9s", 0.2), ("v_caf\u00e9", 0.1)):
        found = scores.get(video_id)
        assert found is not None
        assert found.tolist() == pytest.approx([expected])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.1])
def test_scores_that_are_none_are_refused(wrong: float) -> None:
    scores = torch.tensor([wrong, 0.3])
    with pytest.raises(ValueError, match="cannot be fused: they must be finite and not negative"):
        fuse(proposals((0, 1, 0.5)), scores, top=1)
    with pytest.raises(ValueError, match=r"needs 2 scores, .* this is not so for 'b', 'd'"):
        VideoScores(
            classes=("x", "y"),
            scores={"a": scores.new_tensor([0.0, 1.0]), "b": scores, "c": torch.zeros(2),
                    "d": torch.zeros(3)},
        )  # fmt: skip
