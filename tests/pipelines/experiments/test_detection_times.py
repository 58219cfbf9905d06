"""Experiments on NMS and evaluation, at toy size: their results hold what they measure."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.experiments import detections
from re2tal.detection import NmsConfig, mean_average_precision, nms

TOY = replace(detections.THUMOS, title="toy", videos=6, instances=40, classes=3, found=20)


def test_all_ways_to_evaluate_agree() -> None:
    rows = detections.compare_evaluation(TOY, rounds=1)
    assert [row["way"] for row in rows] == ["a prediction at a time", "all videos in one pass"]
    assert rows[0]["times as fast"] == 1
    assert all(row["largest difference"] < 1e-9 for row in rows)
    # What is measured is no other thing than what is tested elsewhere.
    truth, found = TOY.build()
    assert all(len(part) == TOY.found for part in found.values())
    ours = mean_average_precision(truth, found, num_classes=3, thresholds=TOY.thresholds)
    slow = detections.sequential(truth, found, num_classes=3, thresholds=TOY.thresholds)
    np.testing.assert_allclose(ours.per_class, slow, atol=1e-9)
    assert 0 < ours.average < 1


def test_the_checksum_is_of_the_whole_test_set() -> None:
    assert TOY.checksum() == replace(TOY, title="other").checksum()
    others = (
        replace(TOY, found=21),
        replace(TOY, instances=41),
        replace(TOY, classes=4),
        replace(TOY, videos=5),
    )
    assert TOY.checksum() not in {other.checksum() for other in others}


def test_all_test_sets_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detections, "THUMOS", TOY)
    monkeypatch.setattr(detections, "ACTIVITYNET", replace(TOY, title="second"))
    tables = detections.measure_evaluation(rounds=1)
    assert [*tables] == ["mAP, second", "Recall, second", "mAP, toy", "Recall, toy"]
    assert all(row["seconds"] > 0 for rows in tables.values() for row in rows)


@pytest.mark.parametrize("per_class", [True, False])
def test_all_ways_to_suppress_agree(per_class: bool) -> None:
    config = NmsConfig(per_class=per_class, top_k=15)
    load = detections.RawDetections(title="toy", videos=4, raw=60, classes=3, config=config)
    rows = detections.compare_nms(load, rounds=1)
    assert rows[0]["times as fast"] == 1
    assert all(row["largest difference"] < 1e-6 for row in rows)
    # What is measured is no other thing than what is tested elsewhere.
    for video_id, found in detections.sequential_nms(load.build(), config).items():
        expected = nms(load.build()[video_id], config)
        assert torch.equal(found.labels, expected.labels)
        assert len(found) == 15
