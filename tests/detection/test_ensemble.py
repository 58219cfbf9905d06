from __future__ import annotations

import pytest
import torch

from re2tal.detection import Detections, NmsConfig, ensemble, nms_videos


def found(*rows: tuple[float, float, float, int]) -> Detections:
    table = torch.tensor([row[:3] for row in rows]).reshape(-1, 3)
    return Detections(
        segments=table[:, :2],
        scores=table[:, 2],
        labels=torch.tensor([row[3] for row in rows], dtype=torch.int64),
    )


def test_scores_are_shared_by_weight() -> None:
    first = {"a": found((0, 1, 0.9, 0), (2, 3, 0.6, 1)), "b": found()}
    second = {"b": found((5, 6, 0.8, 2)), "a": found((0, 2, 0.4, 0))}
    both = ensemble([first, second], [3, 1])
    assert list(both) == ["a", "b"]
    assert both["a"].segments.tolist() == [[0, 1], [2, 3], [0, 2]]
    assert both["a"].scores.tolist() == pytest.approx([0.675, 0.45, 0.1])
    assert both["a"].labels.tolist() == [0, 1, 0]
    assert both["b"].scores.tolist() == pytest.approx([0.2])
    assert first["a"].scores.tolist() == pytest.approx([0.9, 0.6])  # the runs stay as they were
    assert ensemble([first, second], [30.0, 10.0])["a"].scores.tolist() == pytest.approx(
        both["a"].scores.tolist()
    )
    alone = ensemble([first], [0.3])
    assert torch.equal(alone["a"].scores, first["a"].scores)


def test_suppression_and_voting_merge_the_runs() -> None:
    first, second = {"a": found((0, 10, 0.9, 0))}, {"a": found((2, 12, 0.3, 0))}
    config = NmsConfig(method="hard", iou=0.6, voting="score", voting_iou=0.6)
    merged = nms_videos(ensemble([first, second], [1, 1]), config)["a"]
    assert merged.segments.tolist() == [pytest.approx([0.5, 10.5])]


def test_what_is_no_ensemble() -> None:
    run = {"a": found(), "b": found()}
    for runs, weights in (([], []), ([run], []), ([run], [1.0, 1.0])):
        with pytest.raises(ValueError, match="as many weights"):
            ensemble(runs, weights)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            ensemble([run, run], [1.0, weight])


def test_missing_videos_are_listed() -> None:
    runs = [
        {"a": found(), "b": found()},
        {"b": found(), "c": found()},
        dict.fromkeys("abc", found()),
    ]
    with pytest.raises(ValueError, match="but run 0 lacks c; run 1 lacks a"):
        ensemble(runs, [1, 1, 1])
    many = {f"v{i}": found() for i in range(25)}
    with pytest.raises(ValueError, match=r"run 1 lacks v0, .*, v9, \.\.\. and 15 more"):
        ensemble([many, {}], [1, 1])
