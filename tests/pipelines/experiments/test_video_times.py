"""Experiments on videos, at toy size: their results hold what they measure."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.experiments import decoding, shards, throughput
from pipelines.experiments.augmentation import compare
from pipelines.experiments.decoding import Access, Request, available, difference
from pipelines.experiments.footage import HEIGHT, WIDTH, Footage, pictures
from re2tal.backbones.swin import swin_toy
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.transcoding import TranscodeConfig

COLUMNS = [
    "video",
    "frames",
    "decoder",
    "frames/s",
    "times as long as re2tal",
    "lower quartile",
    "upper quartile",
    "computes times as long",
    "difference",
    "rounds",
    "all seconds",
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FOOTAGE", (Footage(title="toy", gop=10, fps=10),))
    monkeypatch.setattr(decoding, "SETTINGS", ((1, (114, 64)), (2, None)))
    accesses = (
        Access(title="even", frames=8, requests=1, evenly=True),
        Access(title="window", frames=4, requests=2, evenly=False),
    )
    monkeypatch.setattr(decoding, "ACCESSES", accesses)
    monkeypatch.setattr(decoding, "_PEERS", {"no_such_decoder": lambda: __import__("no_such")})


def test_ours_is_measured_without_the_others(small: None) -> None:
    tables = decoding.measure_decoding(seconds=2, rounds=2)
    versions, videos = tables.pop("What is compared"), tables.pop("Videos")
    assert versions[1]["decoder"] == "no_such_decoder"
    assert versions[1]["version"] == "left out: No module named 'no_such'"
    assert videos[0]["seconds"] == pytest.approx(2)
    assert list(tables) == ["Frames of 114x64, threads: 1", "Frames of 640x360, threads: 2"]
    for rows in tables.values():
        assert [row["frames"] for row in rows] == ["even", "window"]
        for row in rows:
            assert list(row) == COLUMNS
            assert (row["decoder"], row["times as long as re2tal"]) == ("re2tal", 1)
            assert row["difference"] == 0
            assert row["frames/s"] > 0
            assert len(row["all seconds"]) == row["rounds"] == 2


def test_decoders_are_asked_for_the_same_frames(small: None, tmp_path: Path) -> None:
    Footage(title="toy", gop=10, fps=10).write(tmp_path / "a.mp4", 20)
    request = Request(
        path=tmp_path / "a.mp4", fps=10, indices=np.arange(3, 9), size=(114, 64), threads=1
    )
    ours = available()[0]["re2tal"](request)
    assert ours.shape == (6, 64, 114, 3)
    expected = np.stack(list(pictures(20)))[3:9]
    # the average of every block of pixels, roughly the same as a scaled picture
    assert np.abs(ours.mean(axis=(1, 2)) - expected.mean(axis=(1, 2))).max() < 3
    assert difference(ours, ours) == 0
    with pytest.raises(ValueError, match="different frames"):
        difference(ours, np.roll(ours, -1, axis=0))
    with pytest.raises(ValueError, match="shapes"):
        difference(ours, ours[:, :32])


@pytest.mark.parametrize("evenly", [True, False])
def test_requests_lie_in_the_video(evenly: bool) -> None:
    access = Access(title="", frames=7, requests=50, evenly=evenly)
    requests = list(access.indices(10, np.random.default_rng(0)))
    assert len(requests) == 50
    for indices in requests:
        assert (np.diff(indices) > 0).all()
        assert indices[0] >= 0
        assert indices[-1] < 10
    if not evenly:
        assert {indices[0] for indices in requests} == {0, 1, 2, 3}


def test_pictures_move() -> None:
    shown = np.stack(list(pictures(4))).astype(int)
    assert shown.shape == (4, HEIGHT, WIDTH, 3)
    assert (np.abs(np.diff(shown, axis=0)).mean(axis=(1, 2, 3)) > 1).all()
    assert shown.std() > 20


def test_each_augmentation_is_compared_with_the_step() -> None:
    configs = {
        "nothing": AugmentationConfig(),
        "much": AugmentationConfig(source_size=48, crop_area=(0.5, 1.0), hue=0.1),
    }
    rows = compare(swin_toy(), configs, 16, 32, torch.device("cpu"), rounds=1)
    assert [row["what changes"] for row in rows] == ["nothing", "much"]
    nothing, much = ((row["ms a frame"], row["% of the step"]) for row in rows)
    assert 0 <= nothing[0] < much[0]
    assert 0 <= nothing[1] < much[1]


def test_shards_are_read_beside_the_raw_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARDS", {"small": TranscodeConfig(size=64, gop=8)})
    monkeypatch.setattr(shards, "SAMPLINGS", {"window": (8, 30.0), "whole": (16, None)})
    sizes, speeds = shards.measure_shards(seconds=1, rounds=1, windows=2, size=32).values()
    assert [row["shards"] for row in sizes] == ["small"]
    assert 0 < sizes[0]["of raw"] < 1
    assert [(row["windows"], row["shards"]) for row in speeds] == [
        ("window", "small"),
        ("whole", "small"),
    ]
    assert all(row["ratio"] == row["ratios"][0] > 0 for row in speeds)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_executions_are_measured_beside_workers_and_as_one_for_all() -> None:
    (rows,) = throughput.measure_executions(
        workers=(2,), windows=4, frames=4, decoders=2, step=0.1
    ).values()
    assert [row["executions"] for row in rows] == ["beside each", "one for all"]
    assert all(row["windows"] == 8 for row in rows)
    apart, together = (row["memory of executions, MB"] for row in rows)
    assert apart > together > 30, "two processes, against one"
    found = throughput._usage()
    assert all(found[part][1] for part in ("GCS", "raylet", "dashboard"))
