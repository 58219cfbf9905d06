"""Suppression within a video, over many at once, and of the joined runs of an ensemble."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.detection import (
    Detections,
    NmsConfig,
    ensemble,
    nms,
    nms_videos,
    suppression,
)
from tests.detection.rows import Row, detections, overlap, same


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
    check(nms(detections(rows), config), rows, config)


@settings(deadline=None, max_examples=60)
@given(st.lists(rows, max_size=5), configs, st.sampled_from([1, 9, 40]))
def test_many_videos_are_as_each_alone(
    videos: list[list[Row]], config: NmsConfig, table: int
) -> None:
    alone = [nms(detections(rows), config) for rows in videos]
    # Small tables, so that groups are spread over several of them.
    with mock.patch.object(suppression, "_TABLE", table):
        together = nms_videos([detections(rows) for rows in videos], config)
        by_name = nms_videos({f"v{i}": detections(r) for i, r in enumerate(videos)}, config)
    assert list(by_name) == [f"v{i}" for i in range(len(videos))]
    for rows, result, named, expected in zip(
        videos, together, by_name.values(), alone, strict=True
    ):
        assert same(result, expected)
        assert same(named, expected)
        check(result, rows, config)


def check(result: Detections, rows: list[Row], config: NmsConfig) -> None:
    expected = slow_nms(rows, config)
    assert result.labels.tolist() == [row[3] for row in expected]
    assert result.scores.tolist() == pytest.approx([row[2] for row in expected])
    starts_ends = [list(row[:2]) for row in expected]
    assert result.segments.tolist() == [pytest.approx(pair) for pair in starts_ends]


def scattered(count: int, generator: torch.Generator) -> Detections:
    """Detections in float32 with nothing round about them."""
    start = torch.rand(count, generator=generator) * 60
    length = torch.rand(count, generator=generator) ** 2 * 20
    return Detections(
        segments=torch.stack([start, start + length], dim=1),
        scores=torch.rand(count, generator=generator) ** 4,
        labels=torch.randint(0, 7, (count,), generator=generator),
    )


@pytest.mark.parametrize("method", ["soft", "hard", "none"])
@pytest.mark.parametrize("how", ["none", "score_tiou", "score"])
@pytest.mark.parametrize("per_class", [True, False])
def test_no_bit_depends_on_the_other_videos(method: str, how: str, per_class: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    videos = [scattered(count, generator) for count in (17, 0, 301, 1, 64, 33, 250, 7)]
    config = NmsConfig(method=method, voting=how, per_class=per_class, top_k=61)  # type: ignore[arg-type]
    together = nms_videos(videos, config)
    assert all(same(a, nms(v, config)) for a, v in zip(together, videos, strict=True))
    backwards = nms_videos(videos[::-1], config)[::-1]
    assert all(same(a, b) for a, b in zip(together, backwards, strict=True))
    # Voting in small parts is the same sum for each segment.
    with mock.patch.object(suppression, "_PAIRS", 700):
        assert all(same(a, nms(v, config)) for a, v in zip(together, videos, strict=True))


def test_tables_are_bounded_and_hold_every_member_once_in_order() -> None:
    generator = torch.Generator().manual_seed(4)
    groups = (torch.rand(3000, generator=generator) ** 3 * 90).long() * 5 - 100
    seen = []
    padding = 0
    with mock.patch.object(suppression, "_TABLE", 512):
        for index, filled in suppression._tables(groups):
            assert index.numel() <= 512 or len(index) == 1
            padding += int((~filled).sum())
            for row, there in zip(index, filled, strict=True):
                members = row[there].tolist()
                assert members == sorted(members)
                assert len(set(groups[members].tolist())) == 1
                seen += members
    assert sorted(seen) == list(range(3000))
    assert padding < 1000  # one table of 90 groups would have 50,000


def test_precision_stays_and_half_precision_is_computed_in_float32() -> None:
    rows: list[Row] = [(0, 4, 0.9, 0), (2, 6, 0.8, 0), (0, 4, 0.7, 1)]
    wide = detections(rows)
    half = Detections(
        segments=wide.segments.half(), scores=wide.scores.bfloat16(), labels=wide.labels
    )
    assert nms(wide, NmsConfig()).scores.dtype == torch.float64
    for how in ("none", "score"):
        result = nms(half, NmsConfig(voting=how))
        assert (result.segments.dtype, result.scores.dtype) == (torch.float16, torch.bfloat16)
    expected = nms(
        Detections(segments=half.segments.float(), scores=half.scores.float(), labels=half.labels),
        NmsConfig(),
    ).scores
    assert torch.equal(result.scores, expected.bfloat16())
    with pytest.raises(ValueError, match=r"one precision, but got .*bfloat16.*float64"):
        nms_videos([half, wide], NmsConfig())
    # A video without detections has no precision to disagree about.
    kept = nms_videos([wide, Detections.empty()], NmsConfig())
    assert [len(video) for video in kept] == [3, 0]


def test_votes_weigh_by_share_however_small_the_scores() -> None:
    config = NmsConfig(method="hard", voting="score", voting_iou=0.5, min_score=0.0)
    segments = nms(detections([(0, 4, 3e-20, 0), (1, 5, 1e-20, 0)]), config).segments
    assert segments.tolist() == [pytest.approx([0.25, 4.25])]


def test_without_detections_there_is_nothing_to_keep() -> None:
    for config in (NmsConfig(), NmsConfig(voting="score"), NmsConfig(method="none")):
        assert len(nms(Detections.empty(), config)) == 0
        assert nms_videos([], config) == []
        assert nms_videos({}, config) == {}
    assert len(nms(detections([(0, 1, 0.5, 0)]), NmsConfig(min_duration=2.0))) == 0


@pytest.mark.parametrize(
    "row", [(0, 1, math.nan, 0), (0, 1, -0.1, 0), (0, math.inf, 0.5, 0), (math.nan, 1, 0.5, 0)]
)
def test_values_that_cannot_be_ranked_are_refused(row: Row) -> None:
    with pytest.raises(ValueError, match=r"ranked: segment .*, score .*not logits"):
        nms(detections([(0, 1, 0.5, 0), row]), NmsConfig())


def test_the_video_that_is_wrong_is_named() -> None:
    good, bad = detections([(0, 1, 0.5, 0)]), detections([(0, 1, math.nan, 0)])
    with pytest.raises(ValueError, match="in video 'x2': "):
        nms_videos({"x1": good, "empty": Detections.empty(), "x2": bad}, NmsConfig())
    with pytest.raises(ValueError, match="in video number 1: "):
        nms_videos([good, bad], NmsConfig())


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("method", ["gaussian", "Hard"], "one of soft, hard, none"),
        ("voting", ["tiou", ""], "one of none, score_tiou, score"),
        ("sigma", [0.0, -1.0, math.nan], "above 0"),
        ("iou", [0.0, 7.0, math.nan], "above 0 and at most 1"),
        ("voting_iou", [0.0, -1.0, 1.5, math.nan], "above 0 and at most 1"),
        ("min_score", [-0.1, math.nan, math.inf], "at least 0 and finite"),
        ("min_duration", [-1.0, math.nan, math.inf], "at least 0 and finite"),
        ("top_k", [0, -3], "at least 1"),
    ],
)
def test_a_configuration_without_sense_is_refused(
    field: str, values: list[Any], allowed: str
) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{field} must be {allowed}, not {value!r}"):
            NmsConfig(**{field: value})


def test_all_that_is_wrong_with_a_configuration_is_listed() -> None:
    with pytest.raises(ValueError, match=r"iou must be .* not 2\.0; top_k must be .* not 0\."):
        NmsConfig(iou=2.0, top_k=0)
    NmsConfig(iou=1.0, voting_iou=1.0, min_score=0.0, min_duration=0.0, top_k=1)


# Ensembles


def test_scores_are_shared_by_weight() -> None:
    first = {"a": detections([(0, 1, 0.9, 0), (2, 3, 0.6, 1)]), "b": detections([])}
    second = {"b": detections([(5, 6, 0.8, 2)]), "a": detections([(0, 2, 0.4, 0)])}
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
    first, second = {"a": detections([(0, 10, 0.9, 0)])}, {"a": detections([(2, 12, 0.3, 0)])}
    config = NmsConfig(method="hard", iou=0.6, voting="score", voting_iou=0.6)
    merged = nms_videos(ensemble([first, second], [1, 1]), config)["a"]
    assert merged.segments.tolist() == [pytest.approx([0.5, 10.5])]


def test_weights_that_do_not_fit_the_runs_are_refused() -> None:
    run = {"a": detections([]), "b": detections([])}
    for runs, weights in (([], []), ([run], []), ([run], [1.0, 1.0])):
        with pytest.raises(ValueError, match="runs and one weight for each"):
            ensemble(runs, weights)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            ensemble([run, run], [1.0, weight])


def test_missing_videos_are_listed() -> None:
    runs = [
        {"a": detections([]), "b": detections([])},
        {"b": detections([]), "c": detections([])},
        dict.fromkeys("abc", detections([])),
    ]
    with pytest.raises(ValueError, match="but run 0 lacks c; run 1 lacks a"):
        ensemble(runs, [1, 1, 1])
    many = {f"v{i}": detections([]) for i in range(25)}
    with pytest.raises(ValueError, match=r"run 1 lacks v0, .*, v9, \.\.\. and 15 more"):
        ensemble([many, {}], [1, 1])
