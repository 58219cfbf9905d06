"""The code of the benchmarks of videos, at toy size; what they measure is in their results."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.experiments.benchmarking import markdown
from re2tal.videos.benchmarks import __main__, decoders, decoding
from pipelines.experiments.decoders import Request
from pipelines.experiments.decoding import Access, difference
from pipelines.experiments.footage import HEIGHT, WIDTH, Footage, pictures

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
    monkeypatch.setattr(decoders, "_PEERS", {"no_such_decoder": lambda: __import__("no_such")})


def test_ours_is_measured_without_the_others(small: None) -> None:
    tables = decoding.measure(seconds=2, rounds=2)
    compared, videos = tables.pop("What is compared"), tables.pop("Videos")
    assert compared[1]["decoder"] == "no_such_decoder"
    assert compared[1]["version"] == "left out: No module named 'no_such'"
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


def test_the_command_writes_what_it_prints(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "decoding.json"
    arguments = ["decoding", "--seconds", "1", "--rounds", "1"]
    arguments += ["--threads", str(torch.get_num_threads())]
    __main__.main([*arguments, "--output", str(path)])
    printed = capsys.readouterr().out
    assert printed == markdown(path) + "\n"
    assert "| toy | window | re2tal |" in printed


def test_decoders_are_asked_for_the_same_frames(small: None, tmp_path: Path) -> None:
    Footage(title="toy", gop=10, fps=10).write(tmp_path / "a.mp4", 20)
    request = Request(
        path=tmp_path / "a.mp4", fps=10, indices=np.arange(3, 9), size=(114, 64), threads=1
    )
    ours = decoders.available()[0]["re2tal"](request)
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
