from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.experiments.detections import THUMOS
from re2tal.detection import Detections, mean_average_precision
from re2tal.detection.evaluation import matching
from tests.detection.rows import Videos, by_video

THRESHOLDS = (0.3, 0.5, 0.7, 1.0)
Truth = dict[str, list[tuple[float, float, int]]]
Spans = dict[str, list[tuple[float, float]]]


def truth_of(videos: Truth) -> dict[str, Detections]:
    return by_video({v: [(s, e, 1.0, c) for s, e, c in rows] for v, rows in videos.items()})


def slow_overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    shared = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    union = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return shared / union if union else math.inf


def slow_average_precision(
    truth: Truth, found: Videos, label: int, threshold: float, ambiguous: Spans
) -> float:
    """One prediction at a time, and the curve as lists of points."""
    total = sum(row[2] == label for rows in truth.values() for row in rows)
    if total == 0:
        return math.nan
    guesses = [
        (score, video, (start, end))
        for video, rows in found.items()
        for start, end, score, of in rows
        if of == label
    ]
    guesses.sort(key=lambda guess: -guess[0])  # stable
    taken: set[tuple[str, int]] = set()
    recalls, precisions, right, wrong = [0.0], [0.0], 0, 0
    for _, video, guess in guesses:
        options = [
            (slow_overlap(guess, (start, end)), -index)
            for index, (start, end, of) in enumerate(truth.get(video, []))
            if of == label and (video, index) not in taken
        ]
        options = [option for option in options if option[0] >= threshold]
        if options:
            taken.add((video, -max(options)[1]))
            right += 1
        elif any(min(guess[1], e) > max(guess[0], s) for s, e in ambiguous.get(video, [])):
            continue
        else:
            wrong += 1
        recalls.append(right / total)
        precisions.append(right / (right + wrong))
    recalls.append(1.0)
    precisions.append(0.0)
    area = 0.0
    for i in range(1, len(recalls)):
        area += (recalls[i] - recalls[i - 1]) * max(precisions[i:])
    return area


# Coarse values, so that equal scores, equal overlaps, duplicates and instants are common.
times = st.tuples(st.integers(0, 6), st.integers(0, 4)).map(lambda t: (t[0] / 2, (t[0] + t[1]) / 2))
actual = st.tuples(times, st.integers(0, 2)).map(lambda t: (*t[0], t[1]))
guessed = st.tuples(times, st.integers(0, 5), st.integers(0, 2)).map(
    lambda t: (*t[0], t[1] / 5, t[2])
)
names = st.sampled_from(["a", "b", "c"])
any_name = st.sampled_from(["a", "b", "c", "unknown"])


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(names, st.lists(actual, max_size=5)),
    st.dictionaries(any_name, st.lists(guessed, max_size=8)),
    st.dictionaries(any_name, st.lists(times, max_size=2)),
    st.sets(st.sampled_from(["b", "c", "unknown", "never seen"])),
)
def test_equals_one_prediction_at_a_time(
    truth: Truth, found: Videos, ambiguous: Spans, exclude: set[str]
) -> None:
    if not truth.get("a"):
        truth["a"] = [(0.0, 1.0, 0)]
    result = mean_average_precision(
        truth_of(truth),
        by_video(found),
        num_classes=4,
        thresholds=THRESHOLDS,
        ambiguous={v: torch.tensor(rows).reshape(-1, 2) for v, rows in ambiguous.items()},
        exclude=exclude,
    )
    truth = {video: instances for video, instances in truth.items() if video not in exclude}
    found = {video: guesses for video, guesses in found.items() if video not in exclude}
    slow = np.array(
        [
            [slow_average_precision(truth, found, c, t, ambiguous) for c in range(4)]
            for t in THRESHOLDS
        ]
    )
    np.testing.assert_allclose(result.per_class, slow, atol=1e-12)
    np.testing.assert_allclose(result.mAP, np.nanmean(slow, axis=1), atol=1e-12)
    assert result.average == pytest.approx(np.nanmean(slow))


def test_the_chunks_of_pairs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = replace(THUMOS, videos=3, instances=40, classes=2).build()
    whole = mean_average_precision(truth, found, num_classes=2, thresholds=THRESHOLDS)
    for chunk in (2, 19, 1000):
        monkeypatch.setattr(matching, "_CHUNK", chunk)
        parts = mean_average_precision(truth, found, num_classes=2, thresholds=THRESHOLDS)
        assert np.array_equal(parts.per_class, whole.per_class)


def score(truth: Truth, found: Videos, threshold: float = 0.5) -> float:
    return mean_average_precision(
        truth_of(truth), by_video(found), num_classes=3, thresholds=[threshold]
    ).average


def test_infinite_scores_come_first_and_last() -> None:
    truth: Truth = {"a": [(0, 10, 0), (20, 30, 0)]}
    found: Videos = {
        "a": [(0, 10, -math.inf, 0), (20, 30, math.inf, 0), (50, 60, 1e30, 0), (60, 70, -1e30, 0)]
    }
    assert score(truth, found) == pytest.approx(0.5 + 0.5 * 2 / 4)


def test_reversed_segments_are_instants() -> None:
    truth: Truth = {"a": [(0, 10, 0)], "b": [(7, 3, 1)]}
    assert score(truth, {"a": [(10, 0, 0.9, 0)]}) == 0.0
    assert score(truth, {"b": [(1, 1, 0.9, 1)]}) == 0.5


def test_tensors_that_do_not_fit_are_refused() -> None:
    class Odd:
        segments, labels = torch.zeros(2, 2), torch.zeros(1, dtype=torch.int64)

    with pytest.raises(ValueError, match="ground truth of video 'a' have 2 segments but 1 labels"):
        mean_average_precision({"a": Odd()}, {}, num_classes=1, thresholds=[0.5])


@pytest.mark.parametrize(
    ("truth", "found", "message"),
    [
        ({"a": []}, {}, "no ground truth"),
        ({"a": [(0, 1, 3)]}, {}, "ground truth of video 'a' have labels"),
        ({"a": [(0, 1, 0)]}, {"b": [(0, 1, 0.5, -1)]}, "predictions of video 'b' have labels"),
        ({"a": [(0, 1, 0)]}, {"b": [(0, 1, math.nan, 0)]}, "video 'b' have a score that is not"),
        ({"a": [(0, math.inf, 0)]}, {}, "ground truth of video 'a' have a segment that is not"),
        (
            {"a": [(0, 1, 0)]},
            {"a": [(0, 1, 0.5, 0)], "b": [(0, 1, 0.5, 0), (math.nan, 1, 0.5, 0)]},
            "predictions of video 'b' have a segment that is not finite",
        ),
    ],
)
def test_input_that_cannot_be_evaluated_is_refused(
    truth: Truth, found: Videos, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(truth, found)


def test_settings_that_cannot_be_are_refused() -> None:
    truth: Truth = {"a": [(0, 1, 0)]}
    with pytest.raises(ValueError, match="Thresholds"):
        score(truth, {}, threshold=0.0)
    precision = partial(mean_average_precision, num_classes=1, thresholds=[0.5])
    wrong = {"a": torch.tensor([[0.0, math.nan]])}
    with pytest.raises(ValueError, match="ambiguous segments of video 'a' have a segment that is"):
        precision(truth_of(truth), {}, ambiguous=wrong)
    with pytest.raises(ValueError, match="no ground truth in any of the 0 videos"):
        precision(truth_of(truth), {}, exclude="a")
