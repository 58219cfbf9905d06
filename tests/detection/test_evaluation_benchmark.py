"""The code of the benchmark, at toy size; what it measures is in its results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from re2tal.detection import mean_average_precision
from re2tal.detection.benchmarks import evaluation as benchmark
from re2tal.detection.benchmarks.__main__ import main

TOY = replace(benchmark.THUMOS, title="toy", videos=6, instances=40, classes=3, found=20)


def test_all_ways_agree() -> None:
    rows = benchmark.compare(TOY, rounds=1)
    assert [row["way"] for row in rows] == ["a prediction at a time", "all videos in one pass"]
    assert rows[0]["times as fast"] == 1
    assert all(row["largest difference"] < 1e-9 for row in rows)
    # What is measured is no other thing than what is tested elsewhere.
    truth, found = TOY.build()
    assert all(len(part) == TOY.found for part in found.values())
    ours = mean_average_precision(truth, found, num_classes=3, thresholds=TOY.thresholds)
    slow = benchmark.sequential(truth, found, num_classes=3, thresholds=TOY.thresholds)
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


def test_the_command_writes_and_prints_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "THUMOS", TOY)
    monkeypatch.setattr(benchmark, "ACTIVITYNET", replace(TOY, title="second"))
    output = tmp_path / "evaluation.json"
    main(["evaluation", "--threads", str(torch.get_num_threads()), "--output", str(output)])
    text = capsys.readouterr().out
    tables = json.loads(output.read_text())["tables"]
    assert [*tables] == ["mAP, second", "Recall, second", "mAP, toy", "Recall, toy"]
    assert all(f"**{title}**" in text for title in tables)
    assert all(row["seconds"] > 0 for rows in tables.values() for row in rows)
