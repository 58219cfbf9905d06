from __future__ import annotations

import itertools
import json
import math
import re
from functools import partial

import numpy as np
import pytest

from re2tal.annotations import Bins
from re2tal.datasets import ACTIVITYNET_BINS, THUMOS_BINS
from re2tal.detection import Detections, mean_average_precision
from re2tal.detection.diagnosis import (
    ERRORS,
    Diagnosis,
    Kind,
    diagnose,
    metrics,
    tables,
)
from tests.detection.rows import Videos, by_video, overlap

Instance = tuple[str, float, float, int]  # video, start, end, label
Guess = tuple[str, float, float, int, float]  # video, start, end, label, score
THRESHOLDS = (0.5, 0.6, 0.75)
# So many wrong guesses that precision ends below 0.05.
FLOOD: list[Guess] = [("a", 0.01 * i, 0.5 + 0.01 * i, 0, 0.501) for i in range(300)]
BIN_NAMES = {
    name: getattr(ACTIVITYNET_BINS, name).names for name in ("coverage", "length", "instances")
}
LIMITS = {"coverage": (0.2, 0.4, 0.6, 0.8), "length": (30, 60, 120, 180), "instances": (1, 4, 8)}


diagnosed = partial(diagnose, characteristics=ACTIVITYNET_BINS)


def grouped(rows: list[Instance] | list[Guess]) -> dict[str, Detections]:
    videos: Videos = {}
    for video, start, end, label, *score in rows:
        videos.setdefault(video, []).append((start, end, score[0] if score else 1.0, label))
    return by_video(videos)


def run(
    truth: list[Instance], guesses: list[Guess], thresholds: tuple[float, ...] = (0.5,)
) -> Diagnosis:
    durations = {row[0]: 200.0 for row in truth}
    return diagnosed(
        grouped(truth), grouped(guesses), durations, num_classes=4, thresholds=thresholds
    )


# --- cases by hand ---------------------------------------------------------------------------


def test_an_overlap_of_exactly_the_threshold_counts() -> None:
    truth = [("a", 0.0, 10.0, 0), *[("c", 20.0 * i, 20.0 * i + 9, 1) for i in range(9)]]
    guesses = [("a", 0.0, 5.0, 1, 0.5), ("a", 0.0, 4.99, 1, 0.5), ("a", 0.0, 1.0, 1, 0.5)]
    guesses += [("a", 0.0, 0.99, 1, 0.5), ("a", 0.0, 5.0, 0, 0.5)]
    counts = run(truth, guesses).false_positives.counts[0, 0]
    np.testing.assert_array_equal(counts, [1, 0, 1, 0, 2, 1])


def test_the_gain_of_removing_an_error_by_hand() -> None:
    """One class of two instances; by score: background, hit, double detection, hit.

    P_N = R N / (R N + F) with N = 2 is the plain precision here: 1/2 at the first hit and
    2/4 at the second, so AP = (1/2 + 1/2) / 2. Without the background 1 and 2/3; without the
    double detection 1/2 (interpolated: 2/3) and 2/3.
    """
    truth = [("a", 0.0, 10.0, 0), ("a", 20.0, 30.0, 0)]
    guesses = [
        ("a", 50.0, 60.0, 0, 0.9),
        ("a", 0.0, 10.0, 0, 0.8),
        ("a", 0.0, 9.0, 0, 0.7),
        ("a", 20.0, 30.0, 0, 0.6),
    ]
    profile = run(truth, guesses).false_positives
    assert profile.base[0] == pytest.approx(0.5)
    gains = dict(zip(ERRORS, profile.gains[0], strict=True))
    assert gains[Kind.BACKGROUND] == pytest.approx((1 + 2 / 3) / 2 - 0.5)
    assert gains[Kind.DOUBLE_DETECTION] == pytest.approx(2 / 3 - 0.5)
    assert gains[Kind.WRONG_LABEL] == gains[Kind.CONFUSION] == gains[Kind.LOCALIZATION] == 0
    # Two instances: the first two predictions are the top 1G, the next two the second group.
    np.testing.assert_array_equal(profile.counts[0, 0], [1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(profile.counts[0, 1], [1, 1, 0, 0, 0, 0])
    assert np.isnan(profile.shares[0, 2:]).all()


def test_the_normalised_map_of_one_class_is_the_plain_one() -> None:
    truth, guesses = random_set(3, classes=1)
    expected = mean_average_precision(
        grouped(truth), grouped(guesses), num_classes=4, thresholds=THRESHOLDS
    )
    np.testing.assert_allclose(run(truth, guesses, THRESHOLDS).mAP, expected.mAP)


# --- the whole against a slow definition ----------------------------------------------------


def random_set(seed: int, classes: int = 3) -> tuple[list[Instance], list[Guess]]:
    draw = np.random.default_rng(seed)
    truth: list[Instance] = []
    guesses: list[Guess] = []
    for video in "abcdef":
        for _ in range(draw.integers(1, 10)):
            start = draw.uniform(0, 150)
            end = start + 200 * draw.uniform(0.02, 1) ** 2
            truth.append((video, start, end, int(draw.integers(classes))))
        for row in [*truth, *truth]:
            if row[0] == video and draw.random() < 0.8:
                jitter = draw.normal(0, 0.2, 2) * (row[2] - row[1])
                start, end = row[1] + jitter[0], max(row[1] + 1, row[2] + jitter[1])
                label = row[3] if draw.random() < 0.7 else int(draw.integers(4))
                # Few distinct scores, so that many are equal.
                guesses.append((video, start, end, label, float(draw.integers(1, 20)) / 20))
        for _ in range(8):
            start = draw.uniform(0, 180)
            guesses.append((video, start, start + 20, int(draw.integers(4)), draw.random()))
    guesses.append(("unknown", 0.0, 5.0, 0, 0.95))
    guesses.append(("unknown", 1.0, 5.0, 0, 0.96))
    return truth, guesses


class Slow:
    """One prediction, one threshold, one class at a time, as the paper tells it."""

    def __init__(self, truth: list[Instance], guesses: list[Guess]) -> None:
        self.truth = truth
        self.classes = sorted({row[3] for row in truth})
        self.typical = len(truth) / len(self.classes)
        self.guesses = sorted(guesses, key=lambda row: -row[4])  # stable
        self.taken = {t: self.match(t) for t in THRESHOLDS}

    def match(self, threshold: float) -> list[int | None]:
        free = set(range(len(self.truth)))
        result: list[int | None] = []
        for video, start, end, label, _ in self.guesses:
            best = None
            for i in sorted(free):
                row = self.truth[i]
                if row[0] == video and row[3] == label:
                    o = overlap((start, end), row[1:3])
                    if o >= threshold and (best is None or o > best[0]):
                        best = (o, i)
            result.append(best[1] if best else None)
            free -= {best[1]} if best else set()
        return result

    def kind(self, index: int, threshold: float) -> Kind:
        if self.taken[threshold][index] is not None:
            return Kind.TRUE_POSITIVE
        video, start, end, label, _ = self.guesses[index]
        nearest, of = 0.0, None
        for row in self.truth:
            if row[0] == video and (o := overlap((start, end), row[1:3])) > nearest:
                nearest, of = o, row[3]
        if nearest >= threshold:
            return Kind.DOUBLE_DETECTION if of == label else Kind.WRONG_LABEL
        if nearest >= 0.1:
            return Kind.LOCALIZATION if of == label else Kind.CONFUSION
        return Kind.BACKGROUND

    def of_class(self, label: int) -> list[int]:
        return [i for i, row in enumerate(self.guesses) if row[3] == label]

    def precisions(self, hits: list[bool], count: int) -> list[float]:
        recalls = [sum(hits[: i + 1]) / count for i in range(len(hits))]
        false = [i + 1 - sum(hits[: i + 1]) for i in range(len(hits))]
        return [
            r * self.typical / (r * self.typical + f) for r, f in zip(recalls, false, strict=True)
        ]

    def ap(self, hits: list[bool], count: int) -> float:
        curve = self.precisions(hits, count)
        return sum(max(curve[i:]) for i, hit in enumerate(hits) if hit) / count

    def count(self, label: int) -> int:
        return sum(row[3] == label for row in self.truth)

    def top(self, label: int) -> list[int]:
        return self.of_class(label)[: 10 * self.count(label)]

    def map_without(self, error: Kind | None, threshold: float) -> float:
        values = []
        for label in self.classes:
            kept = [i for i in self.top(label) if self.kind(i, threshold) != error]
            hits = [self.taken[threshold][i] is not None for i in kept]
            values.append(self.ap(hits, self.count(label)))
        return float(np.mean(values))

    def map_of(self, inside: set[int], threshold: float) -> float:
        values = []
        for label in self.classes:
            count = sum(self.truth[i][3] == label for i in inside)
            finds = {
                i: {self.taken[t][i] for t in THRESHOLDS} - {None} for i in self.of_class(label)
            }
            kept = [i for i, found in finds.items() if found <= inside]
            if count:
                hits = [self.taken[threshold][i] is not None for i in kept]
                values.append(self.ap(hits, count))
        return float(np.mean(values)) if values else math.nan

    def bins(self, name: str) -> list[int]:
        result = []
        for video, start, end, _ in self.truth:
            value = {
                "coverage": (end - start) / 200,
                "length": end - start,
                "instances": sum(row[0] == video for row in self.truth),
            }[name]
            result.append(sum(value > limit for limit in LIMITS[name]))
        return result

    def missed(self, threshold: float) -> set[int]:
        found = set()
        for label in self.classes:
            rows = self.of_class(label)
            taken = [self.taken[threshold][i] for i in rows]
            curve = self.precisions([t is not None for t in taken], self.count(label))
            found |= {t for t, p in zip(taken, curve, strict=True) if t is not None and p > 0.05}
        return set(range(len(self.truth))) - found


@pytest.mark.parametrize("seed", range(6))
def test_everything_equals_a_slow_definition(seed: int) -> None:
    truth, guesses = random_set(seed)
    guesses += FLOOD if seed == 0 else []
    ours, slow = run(truth, guesses, THRESHOLDS), Slow(truth, guesses)
    profile = ours.false_positives
    for level, t in enumerate(THRESHOLDS):
        counts = np.zeros((10, 6), dtype=int)
        for label in slow.classes:
            for rank, i in enumerate(slow.top(label)):
                counts[rank // slow.count(label), slow.kind(i, t)] += 1
        np.testing.assert_array_equal(profile.counts[level], counts)
        base = slow.map_without(None, t)
        assert profile.base[level] == pytest.approx(base)
        expected = [slow.map_without(error, t) - base for error in ERRORS]
        np.testing.assert_allclose(profile.gains[level], expected, atol=1e-12)

        assert ours.mAP[level] == pytest.approx(slow.map_of(set(range(len(truth))), t))
        missed = slow.missed(t)
        assert ours.false_negatives.overall[level] == pytest.approx(len(missed) / len(truth))
        for name, names in BIN_NAMES.items():
            where = slow.bins(name)
            for number in range(len(names)):
                inside = {i for i, place in enumerate(where) if place == number}
                share = len(missed & inside) / len(inside) if inside else math.nan
                of_bin = ours.false_negatives.by[name]
                assert of_bin.counts[number] == ours.placed[name].counts[number] == len(inside)
                np.testing.assert_allclose(of_bin.shares[level, number], share)
                np.testing.assert_allclose(
                    ours.sensitivity[name].mAP[level, number], slow.map_of(inside, t), atol=1e-12
                )
        for (first, second), pair in ours.false_negatives.by_pair.items():
            places = list(zip(slow.bins(first), slow.bins(second), strict=True))
            for cell in np.ndindex(pair.counts.shape):
                inside = {i for i, place in enumerate(places) if place == cell}
                share = len(missed & inside) / len(inside) if inside else math.nan
                np.testing.assert_allclose(pair.shares[(level, *cell)], share)
    assert list(ours.false_negatives.by_pair) == list(itertools.combinations(BIN_NAMES, 2))
    if seed == 0:  # it holds every case: otherwise the comparison would prove less than it says
        assert (profile.counts.sum(axis=(0, 1)) > 0).all()
        assert (profile.gains > 0).any(axis=0).all()
        found = {i for i in slow.taken[0.5] if i is not None}
        assert found & slow.missed(0.5), "some instance is found where precision is too low"


# --- limits of bins, odd inputs, reports ----------------------------------------------------


def test_bins_are_closed_above_and_open_at_the_ends() -> None:
    lengths = ACTIVITYNET_BINS.length.place(np.array([0.1, 30.0, 30.1, 60.0, 180.0, 180.1, 1e9]))
    assert lengths.tolist() == [0, 0, 1, 1, 3, 4, 4]
    assert THUMOS_BINS.instances.place(np.array([1.0, 2.0, 40.0, 80.0, 81.0])).tolist() == [
        *(0, 1, 1, 2, 3)
    ]
    with pytest.raises(ValueError, match="one name more"):
        Bins(edges=(1, 2), names=("S", "L"))
    with pytest.raises(ValueError, match="rising"):
        Bins(edges=(2, 1), names=("S", "M", "L"))


def test_sensitivity_is_the_spread_and_impact_the_way_to_the_best() -> None:
    """Short instances are all found, long ones never: two classes, all of one length each."""
    truth = [("a", 0.0, 10.0, 0), ("b", 0.0, 150.0, 1)]
    one = run(truth, [("a", 0.0, 10.0, 0, 0.5)]).sensitivity["length"]
    np.testing.assert_array_equal(one.average, [1, np.nan, np.nan, 0, np.nan])
    np.testing.assert_array_equal(one.relative, [2, np.nan, np.nan, 0, np.nan])
    assert (one.sensitivity, one.impact) == (1.0, 0.5)
    nothing = run(truth, []).sensitivity["length"]
    assert np.isnan(nothing.relative).all()
    assert (nothing.sensitivity, nothing.impact) == (0.0, 0.0)


def test_an_instance_without_length_is_left_out_and_one_beyond_its_video_is_not() -> None:
    truth = [("a", 5.0, 5.0, 0), ("a", 0.0, 201.0, 0)]
    result = run(truth, [("a", 5.0, 5.0, 0, 0.9), ("a", 0.0, 200.0, 0, 0.8)])
    assert result.left_out == 1
    assert result.placed["coverage"].counts.tolist() == [0, 0, 0, 0, 1]
    assert result.false_negatives.overall[0] == 0
    assert result.false_positives.counts[0, :2].sum(axis=0).tolist() == [1, 0, 0, 0, 0, 1]


def test_without_predictions_everything_is_missed() -> None:
    result = run([("a", 0.0, 10.0, 0)], [])
    assert result.mAP.tolist() == [0.0]
    assert result.false_negatives.overall.tolist() == [1.0]
    assert np.isnan(result.false_positives.shares).all()
    assert not result.false_positives.gains.any()


def test_input_that_cannot_be_diagnosed_is_refused() -> None:
    guess: list[Guess] = [("a", 0.0, 1.0, 0, 0.5)]
    for durations in ({}, {"a": 0.0}):
        with pytest.raises(ValueError, match="'a' has instances but no positive duration"):
            diagnosed(grouped([("a", 0.0, 1.0, 0)]), {}, durations, num_classes=1, thresholds=[0.5])
    with pytest.raises(ValueError, match="nothing to diagnose"):
        run([("a", 3.0, 3.0, 0)], guess)
    with pytest.raises(ValueError, match=r"lie in \(0, 1\]"):
        run([("a", 0.0, 1.0, 0)], guess, (0.5, 1.5))
    with pytest.raises(ValueError, match="ground truth of video 'a' have labels outside 0 to 3"):
        run([("a", 0.0, 1.0, 4)], guess)
    with pytest.raises(ValueError, match="'b' have a segment that is not finite"):
        run([("a", 0.0, 1.0, 0)], [("b", 0.0, math.inf, 0, 0.5)])
    with pytest.raises(ValueError, match="video 'b' have a score that is not a number"):
        run([("a", 0.0, 1.0, 0)], [("b", 0.0, 1.0, 0, math.nan)])


def test_tables_and_metrics_say_what_the_diagnosis_says() -> None:
    result = run(*random_set(1), THRESHOLDS)
    rows = json.loads(json.dumps(tables(result), allow_nan=False))
    assert {name: len(part) for name, part in rows.items()} == {
        "false_positives": 3 * 10 * 6,
        "effects": 3 * 5,
        "sensitivity": 3 * 14,
        "false_negatives": 3 * 14,
        "false_negative_pairs": 3 * (25 + 20 + 20),
    }
    assert rows["effects"][6] == {
        "threshold": 0.6,
        "kind": "wrong_label",
        "gain": result.false_positives.gains[1, 1],
    }
    assert rows["false_positives"][9]["top"] == "2G"
    assert rows["false_positives"][9]["share"] == result.false_positives.shares[0, 1, 3]
    empty = [row for row in rows["sensitivity"] if row["instances"] == 0]
    assert empty
    assert all(row["mAP_N"] is None for row in empty)

    values = metrics(result)
    assert all(re.fullmatch(r"[\w\-./ :]+", name, re.ASCII) for name in values)
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values())
    assert values["diagnosis/effect/background"] == result.false_positives.gains[:, 4].mean()
    assert sum(v for n, v in values.items() if "/top_1G/" in n) == pytest.approx(1)
    assert values["diagnosis/impact/length"] == result.sensitivity["length"].impact
    assert values["diagnosis/missed/coverage/XS"] == pytest.approx(
        result.false_negatives.by["coverage"].average[0]
    )
    assert "diagnosis/mAP_N/instances/XS" not in values or (
        result.placed["instances"].counts[0] > 0
    )
