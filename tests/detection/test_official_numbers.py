"""On whole test sets, ours are the numbers of the official evaluators, which were run once.

`official_numbers.py` says how.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pipelines.experiments.detections import THUMOS, RandomTestSet
from re2tal.detection import average_recall, mean_average_precision
from tests.detection.official_numbers import NUMBERS, WORKLOADS

# The official code saw all videos and predictions of a class, but not all classes: it takes long.
CLASSES = {"thumos": THUMOS.classes, "activitynet": 90}
OFFICIAL: dict[str, dict[str, Any]] = json.loads(NUMBERS.read_text())["workloads"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_numbers_are_of_these_test_sets(name: str) -> None:
    assert WORKLOADS[name].checksum() == OFFICIAL[name]["checksum"], (
        "The test set is another than the official evaluators saw: its generator has changed, "
        "not an evaluator."
    )


@pytest.mark.parametrize(("name", "load"), WORKLOADS.items(), ids=[*WORKLOADS])
def test_average_precision_is_the_official_one(name: str, load: RandomTestSet) -> None:
    truth, found = load.build()
    ours = mean_average_precision(
        truth, found, num_classes=load.classes, thresholds=load.thresholds
    )
    official = OFFICIAL[name]["average_precision"]
    labels = [int(label) for label in official]
    theirs = np.array([*official.values()]).T
    assert len(labels) >= CLASSES[name]
    assert 0.05 < theirs.mean() < 0.95
    np.testing.assert_allclose(ours.per_class[:, labels], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "load"), WORKLOADS.items(), ids=[*WORKLOADS])
def test_average_recall_of_proposals_is_the_official_one(name: str, load: RandomTestSet) -> None:
    ours = average_recall(*load.build())
    theirs = OFFICIAL[name]
    np.testing.assert_allclose(ours.recall, theirs["recall"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.average_recall, theirs["average_recall"], rtol=0, atol=1e-6)
    assert ours.auc == pytest.approx(theirs["auc"], abs=1e-6)
