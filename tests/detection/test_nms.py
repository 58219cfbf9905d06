from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.detection import Detections, NmsConfig, nms

Row = tuple[float, float, float, int]


def detections(rows: list[Row]) -> Detections:
    table = torch.tensor([row[:3] for row in rows], dtype=torch.float64).reshape(-1, 3)
    return Detections(
        segments=table[:, :2],
        scores=table[:, 2],
        labels=torch.tensor([row[3] for row in rows], dtype=torch.int64),
    )


def overlap(a: Row, b: Row) -> float:
    if a[0] == a[1] and b[0] == b[1]:
        return float(a[0] == b[0])
    shared = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    return shared / (a[1] - a[0] + b[1] - b[0] - shared)


def slow_nms(rows: list[Row], config: NmsConfig) -> list[Row]:
    """One detection at a time, one class after the other."""
    rows = [row for row in rows if row[1] - row[0] >= config.min_duration]
    kept: list[tuple[float, int, Row]] = []
    for label in sorted({row[3] for row in rows}) if config.per_class else [None]:
        waiting = [(row[2], i) for i, row in enumerate(rows) if label is None or row[3] == label]
        members = [rows[i] for _, i in waiting]
        while waiting:
            best = max(range(len(waiting)), key=lambda k: (waiting[k][0], -waiting[k][1]))
            score, index = waiting.pop(best)
            if score < config.min_score:
                break
            kept.append((score, index, voted(rows[index], members, config)))
            if config.method == "hard":
                waiting = [w for w in waiting if overlap(rows[index], rows[w[1]]) < config.iou]
            elif config.method == "soft":
                waiting = [
                    (s * math.exp(-(overlap(rows[index], rows[i]) ** 2) / config.sigma), i)
                    for s, i in waiting
                ]
    kept.sort(key=lambda item: (-item[0], item[1]))
    return [(row[0], row[1], score, row[3]) for score, _, row in kept[: config.top_k]]


def voted(row: Row, members: list[Row], config: NmsConfig) -> Row:
    voters = [m for m in members if overlap(row, m) >= config.voting_iou]
    if config.voting == "none":
        return row
    weights = [m[2] * (overlap(row, m) if config.voting == "score_tiou" else 1) for m in voters]
    if sum(weights) == 0:
        return row
    start = sum(w * m[0] for w, m in zip(weights, voters, strict=True)) / sum(weights)
    end = sum(w * m[1] for w, m in zip(weights, voters, strict=True)) / sum(weights)
    return (start, end, row[2], row[3])


# Coarse values, so that equal scores, equal segments and instants are common.
rows = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.integers(0, 6),
        st.sampled_from([0, 1, 2, 4, 4, 7, 8]),
        st.integers(0, 2),
    ).map(lambda r: (r[0] / 2, (r[0] + r[1]) / 2, r[2] / 8, r[3])),
    max_size=24,
)
configs = st.builds(
    NmsConfig,
    method=st.sampled_from(["soft", "hard", "none"]),
    sigma=st.sampled_from([0.0005, 0.3, 0.9]),
    iou=st.sampled_from([0.2, 0.5, 1.0]),
    per_class=st.booleans(),
    min_score=st.sampled_from([0.0, 0.01, 0.25]),
    min_duration=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([1, 3, 100]),
    voting=st.sampled_from(["none", "score_tiou", "score"]),
    voting_iou=st.sampled_from([0.3, 0.9]),
)


@settings(deadline=None, max_examples=300)
@given(rows, configs)
def test_equals_one_detection_at_a_time(rows: list[Row], config: NmsConfig) -> None:
    result = nms(detections(rows), config)
    expected = slow_nms(rows, config)
    assert result.labels.tolist() == [row[3] for row in expected]
    assert result.scores.tolist() == pytest.approx([row[2] for row in expected])
    starts_ends = [list(row[:2]) for row in expected]
    assert result.segments.tolist() == [pytest.approx(pair) for pair in starts_ends]


def test_gaussian_weakens_by_overlap() -> None:
    result = nms(detections([(0, 4, 0.9, 0), (2, 6, 0.8, 0), (0, 4, 0.7, 1)]), NmsConfig(sigma=0.5))
    assert result.labels.tolist() == [0, 1, 0]
    weakened = 0.8 * math.exp(-((2 / 6) ** 2) / 0.5)
    assert result.scores.tolist() == pytest.approx([0.9, 0.7, weakened])


def test_the_best_of_all_classes_are_kept() -> None:
    many = [(10.0 * i, 10.0 * i + 1, i / 10, i % 3) for i in range(10)]
    result = nms(detections(many), NmsConfig(top_k=4))
    assert result.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])


def test_without_detections_there_is_nothing_to_keep() -> None:
    for config in (NmsConfig(), NmsConfig(voting="score"), NmsConfig(method="none")):
        assert len(nms(Detections.empty(), config)) == 0
    assert len(nms(detections([(0, 1, 0.5, 0)]), NmsConfig(min_duration=2.0))) == 0


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        nms(detections([(0, 1, math.nan, 0)]), NmsConfig())
    with pytest.raises(ValueError, match="top_k"):
        NmsConfig(top_k=0)
