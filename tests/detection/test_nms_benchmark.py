"""The code of the benchmark, at toy size; what it measures is printed by its command."""

from __future__ import annotations

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


def test_the_command_prints_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = benchmark.Workload(title="toy", videos=2, raw=9, classes=2, config=NmsConfig())
    monkeypatch.setattr(benchmark, "WORKLOADS", (load,))
    main(["nms", "--threads", str(torch.get_num_threads())])
    text = capsys.readouterr().out
    assert "**Soft-NMS, toy**" in text
    assert text.count("\n| ") == 5
