from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.detection.evaluation import average_recall, recall_at
from re2tal.detection.segments import Detections
from tests.detection.rows import Row, Videos, by_video, overlap

LEVELS = (0.3, 0.5, 1.0)


def covers(guess: Row, actual: Row, level: float) -> bool:
    return guess[0] < guess[1] and overlap(guess, actual) >= level


def best_first(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row[2])  # stable


def slow_average_recall(truth: Videos, found: Videos, most: int) -> np.ndarray:
    """`(K, A)` recall, with the official numbers of proposals."""
    truth = {video: rows for video, rows in truth.items() if rows}
    total = sum(len(rows) for rows in found.values())
    recall = np.zeros((len(LEVELS), most))
    if total == 0:
        return recall
    share = most * float(len(truth)) / total
    cut = {v: best_first(found.get(v, []))[: int(len(found.get(v, [])) * share)] for v in truth}
    left = sum(len(rows) for rows in cut.values())
    if left == 0:
        return recall
    instances = [(video, row) for video, rows in truth.items() for row in rows]
    for a in range(most):
        share = (a + 1) / most * (most * float(len(truth)) / left)
        for k, level in enumerate(LEVELS):
            hits = [
                any(covers(guess, row, level) for guess in cut[v][: int(len(cut[v]) * share)])
                for v, row in instances
            ]
            recall[k, a] = sum(hits) / len(instances)
    return recall


def slow_recall_at(truth: Videos, found: Videos, label: int, level: float, k: int) -> float:
    hits = []
    for video, rows in truth.items():
        mine = [row for row in rows if row[3] == label]
        guesses = best_first([row for row in found.get(video, []) if row[3] == label])
        budget = guesses[: k * len(mine)]
        hits += [any(covers(guess, row, level) for guess in budget) for row in mine]
    return sum(hits) / len(hits) if hits else math.nan


# Coarse values, so that equal scores, equal overlaps, duplicates and instants are common.
times = st.tuples(st.integers(0, 6), st.integers(0, 4)).map(lambda t: (t[0] / 2, (t[0] + t[1]) / 2))
rows = st.tuples(times, st.integers(0, 4), st.integers(0, 1)).map(lambda t: (*t[0], t[1] / 4, t[2]))
truths = st.dictionaries(st.sampled_from("abc"), st.lists(rows, max_size=4))
founds = st.dictionaries(st.sampled_from("abcx"), st.lists(rows, max_size=9))


@settings(deadline=None, max_examples=150)
@given(truths, founds, st.integers(1, 12))
def test_average_recall_equals_its_slow_definition(truth: Videos, found: Videos, most: int) -> None:
    if not any(truth.values()):
        truth["a"] = [(0.0, 1.0, 1.0, 0)]
    result = average_recall(by_video(truth), by_video(found), max_average=most, thresholds=LEVELS)
    slow = slow_average_recall(truth, found, most)
    np.testing.assert_allclose(result.recall, slow, atol=1e-12)
    np.testing.assert_allclose(result.average_recall, slow.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(result.proposals_per_video, np.arange(1, most + 1), rtol=1e-12)
    steps = slow.mean(axis=0)
    area = sum((steps[i] + steps[i + 1]) / 2 for i in range(most - 1))
    assert result.auc == pytest.approx(100 * area / most)


@settings(deadline=None, max_examples=100)
@given(truths, founds, st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_recall_at_equals_its_slow_definition(truth: Videos, found: Videos, ks: list[int]) -> None:
    if not any(truth.values()):
        truth["a"] = [(0.0, 1.0, 1.0, 0)]
    result = recall_at(by_video(truth), by_video(found), num_classes=3, ks=ks, thresholds=LEVELS)
    slow = np.array(
        [
            [[slow_recall_at(truth, found, c, level, k) for c in range(3)] for k in ks]
            for level in LEVELS
        ]
    )
    np.testing.assert_allclose(result.per_class, slow, atol=1e-12)
    np.testing.assert_allclose(result.recall, np.nanmean(slow, axis=2), atol=1e-12)
    assert result.ks == tuple(ks)


def test_29_of_100_proposals_are_28() -> None:
    """The official evaluator's product of 100 and 0.29 falls short of 29."""
    found: Videos = {"a": [(50 + i, 51 + i, -i, 0) for i in range(100)]}
    found["a"][28] = (0, 1, -28, 0)  # the 29th best is the right one
    result = average_recall(by_video({"a": [(0, 1, 1, 0)]}), by_video(found))
    assert result.average_recall[27:30].tolist() == [0, 0, 1]


def test_excluded_videos_count_nowhere() -> None:
    truth = by_video({"a": [(0, 1, 1, 0)], "b": [(0, 1, 1, 0)]})
    found = by_video({"a": [(0, 1, 1, 0)], "x": [(0, 1, 1, 0)] * 9})
    assert average_recall(truth, found, exclude=["b", "x"]).auc == pytest.approx(99)
    for exclude, expected in (([], 0.5), (["b"], 1.0)):
        result = recall_at(truth, found, num_classes=1, thresholds=[0.5], exclude=exclude)
        assert result.recall.tolist() == [[expected, expected]]


def test_input_that_cannot_be_evaluated_is_refused() -> None:
    truth = by_video({"a": [(0, 1, 1, 0)]})
    with pytest.raises(ValueError, match="every k to be at least 1"):
        recall_at(truth, {}, num_classes=1, thresholds=[0.5], ks=(0, 1))
    with pytest.raises(ValueError, match="predictions of video 'a' have labels outside 0 to 0"):
        recall_at(truth, by_video({"a": [(0, 1, 1, 1)]}), num_classes=1, thresholds=[0.5])
    with pytest.raises(ValueError, match="max_average must be at least 1"):
        average_recall(truth, {}, max_average=0)
    with pytest.raises(ValueError, match="no ground truth"):
        average_recall({"a": Detections.empty()}, truth)
    with pytest.raises(ValueError, match="score that is not a number"):
        average_recall(truth, by_video({"a": [(0, 1, math.nan, 0)]}))
    with pytest.raises(ValueError, match="Thresholds"):
        average_recall(truth, truth, thresholds=[1.5])
