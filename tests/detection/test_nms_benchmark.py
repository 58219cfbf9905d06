"""The code of the benchmark, at toy size; what it measures is in its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from re2tal.detection import NmsConfig, nms
from re2tal.detection.benchmarks import nms as benchmark
from re2tal.detection.benchmarks.__main__ import main


@pytest.mark.parametrize("per_class", [True, False])
def test_all_ways_agree(per_class: bool) -> None:
    config = NmsConfig(per_class=per_class, top_k=15)
    load = benchmark.Workload(title="toy", videos=4, raw=60, classes=3, config=config)
    rows = benchmark.compare(load, rounds=1)
    assert rows[0]["times as fast"] == 1
    assert all(row["largest difference"] < 1e-6 for row in rows)
    # What is measured is no other thing than what is tested elsewhere.
    for video_id, found in benchmark.sequential(load.build(), config).items():
        expected = nms(load.build()[video_id], config)
        assert torch.equal(found.labels, expected.labels)
        assert len(found) == 15


def test_the_command_writes_and_prints_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    load = benchmark.Workload(title="toy", videos=2, raw=9, classes=2, config=NmsConfig())
    monkeypatch.setattr(benchmark, "WORKLOADS", (load,))
    output = tmp_path / "nms.json"
    main(["nms", "--threads", str(torch.get_num_threads()), "--output", str(output)])
    assert [*json.loads(output.read_text())["tables"]] == ["Soft-NMS, toy"]
    text = capsys.readouterr().out
    assert "**Soft-NMS, toy**" in text
    assert text.count("\n| ") == 5
