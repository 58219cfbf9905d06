import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data.toy import toy_clips, toy_videos
from re2tal.datasets import load_annotations
from re2tal.datasets.toy import (
    ACTIONS,
    FPS,
    FRAME_SIZE,
    UNSEEN_ACTIONS,
    ToyConfig,
    TrimmedToyConfig,
    make_clip,
    make_toy,
    unseen_toy,
)
from re2tal.datasets.toy.looks import DETECTION_GALLERY, PRETRAINING_GALLERY
from re2tal.datasets.toy.scene import ACTION_SECONDS, GAP_SECONDS
from re2tal.videos.decoding import decode, probe
from re2tal.videos.files import find_videos

DIGEST = "8fac0a6d7ff62fd2ca2cdbe539f43d6e7c3ba875d21982351e8d4452ed87b9d3"

SMALL = ToyConfig(training=2, validation=1, seconds=(13.0, 15.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy_set")
    make_toy(path, SMALL)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def refuse(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
    raise AssertionError("there was nothing to make")


def test_the_set_is_valid_and_whole(folder: Path) -> None:
    annotations = load_annotations(folder / "annotations.json")
    files, missing = find_videos(annotations, folder / "videos")
    assert not missing
    assert [v.subset for v in annotations.videos].count("training") == 2
    assert [v.subset for v in annotations.videos].count("validation") == 1
    assert set(annotations.classes) <= set(ACTIONS)
    for video in annotations.videos:
        info = probe(files[video.video_id])
        assert info.duration == pytest.approx(video.duration, abs=1e-3)
        assert (info.fps, info.width, info.height) == (FPS, FRAME_SIZE, FRAME_SIZE)
        assert 13.0 <= video.duration <= 15.1
        assert video.instances
        # only between actions, at the start and at the end is there something else
        edges = [0.0]
        for instance in video.instances:
            length = instance.end - instance.start
            assert ACTION_SECONDS[0] - 0.01 <= length <= ACTION_SECONDS[1] + 0.01
            edges += [instance.start, instance.end]
        gaps = np.diff([*edges, video.duration])[::2]
        assert np.all(gaps >= GAP_SECONDS[0] - 0.1)


def test_the_same_settings_give_the_same_bytes_on_every_processor(folder: Path) -> None:
    """Else its detectors could not be compared; x264 must be told to round alike everywhere."""
    digest = hashlib.sha256((folder / "videos" / "toy_002.mp4").read_bytes()).hexdigest()
    assert digest == DIGEST, "encoded anew, the toy data set is another one: count its version up"


def test_the_same_settings_give_the_same_bytes_in_any_order(folder: Path, tmp_path: Path) -> None:
    def backwards(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        return map(function, reversed(list(items)))

    make_toy(tmp_path, SMALL, parallel_map=backwards)
    assert contents(tmp_path) == contents(folder)


def test_the_command_makes_the_same(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    toy_videos(tmp_path / "set", SMALL)
    assert contents(tmp_path / "set") == contents(folder)
    assert "3 of 3 videos" in capfd.readouterr().out
    toy_clips(tmp_path / "clips", TrimmedToyConfig(training=7, validation=0, seconds=1.5, seed=3))
    settings = json.loads((tmp_path / "clips" / "settings.json").read_text())
    assert (settings["training"], settings["seconds"], settings["seed"]) == (7, 1.5, 3)
    assert len(list((tmp_path / "clips" / "training").glob("*/*.mp4"))) == 7


def test_the_second_set_shows_motions_that_the_first_has_not(tmp_path: Path) -> None:
    small = replace(unseen_toy(), training=3, validation=0, seconds=(14.0, 15.0))
    path = make_toy(tmp_path, small)
    found = json.loads(path.read_text())
    labels = {one["label"] for v in found["database"].values() for one in v["annotations"]}
    assert labels <= set(UNSEEN_ACTIONS)
    assert len(labels) > 3
    assert not set(UNSEEN_ACTIONS) & set(ACTIONS)
    assert len(UNSEEN_ACTIONS) == 13
    assert make_toy(tmp_path, small, parallel_map=refuse) == path
    # the settings of the first set are written as they were before there was a second
    assert make_toy(tmp_path, replace(small, unseen=False)) == path
    assert "unseen" not in json.loads(path.read_text())["settings"]


def test_making_it_again_does_nothing(folder: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert make_toy(folder, SMALL, parallel_map=refuse) == folder / "annotations.json"
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_other_settings_and_lost_videos_make_it_again(folder: Path, tmp_path: Path) -> None:
    made: list[int] = []

    def count(done: int, total: int) -> None:
        made.append(total)

    tiny = ToyConfig(training=1, validation=0, seconds=(6.0, 6.0))
    path = make_toy(tmp_path, tiny, progress=count)
    assert made == [1]
    next((tmp_path / "videos").iterdir()).unlink()
    make_toy(tmp_path, tiny, progress=count)
    assert made == [1, 1]
    make_toy(tmp_path, ToyConfig(training=1, validation=1, seconds=(6.0, 6.0)), progress=count)
    assert made == [1, 1, 2, 2]
    assert len(json.loads(path.read_text())["database"]) == 2


def test_a_half_made_set_has_no_annotations(tmp_path: Path) -> None:
    def broken(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        yield function(next(iter(items)))
        raise KeyboardInterrupt

    config = ToyConfig(training=2, validation=0, seconds=(6.0, 6.0))
    with pytest.raises(KeyboardInterrupt):
        make_toy(tmp_path, config, parallel_map=broken)
    assert not (tmp_path / "annotations.json").exists()
    make_toy(tmp_path, config)
    whole = contents(tmp_path)
    assert sorted(whole) == ["annotations.json", "videos/toy_000.mp4", "videos/toy_001.mp4"]


def test_seeds_make_other_videos(folder: Path, tmp_path: Path) -> None:
    seconds = (6.0, 6.0)
    for seed in (0, 1):
        make_toy(
            tmp_path / str(seed), ToyConfig(training=1, validation=0, seconds=seconds, seed=seed)
        )
    first, second = (contents(tmp_path / str(seed)) for seed in (0, 1))
    assert first["videos/toy_000.mp4"] != second["videos/toy_000.mp4"]


def test_pretraining_shares_no_look_with_detection() -> None:
    for of in ("palettes", "shapes", "patterns"):
        assert not set(getattr(DETECTION_GALLERY, of)) & set(getattr(PRETRAINING_GALLERY, of))
    colours = [
        {c for p in gallery.palettes for c in (p.deep, p.ground, *p.bright)}
        for gallery in (DETECTION_GALLERY, PRETRAINING_GALLERY)
    ]
    assert not colours[0] & colours[1]


@pytest.mark.parametrize("held_out", [False, True])
def test_clips_repeat_and_follow_their_seed(held_out: bool) -> None:
    clip = make_clip("spin", 1.0, 3, held_out=held_out)
    assert clip.content == make_clip("spin", 1.0, 3, held_out=held_out).content
    assert clip.content != make_clip("spin", 1.0, 4, held_out=held_out).content
    assert clip.content != make_clip("spin", 1.0, 3, held_out=not held_out).content
    assert probe(clip.content).frames == FPS == len(clip.pose.x)


def test_the_pose_of_a_clip_is_where_its_actor_is() -> None:
    # A sprite's outline is dark and its shadow darker, so the picture varies most around the actor.
    for seed in range(3):
        clip = make_clip("shake", 1.5, seed)
        times = (np.arange(18) + 0.5) / FPS
        frames = decode(clip.content, times, size=None).astype(float)
        moved = np.abs(np.diff(frames, axis=0)).sum(axis=(0, 3))
        weight = np.where(moved > np.quantile(moved, 0.97), moved, 0)
        y, x = np.indices(moved.shape)
        assert np.average(x, weights=weight) == pytest.approx(clip.pose.x.mean(), abs=14)
        assert np.average(y, weights=weight) == pytest.approx(clip.pose.y.mean(), abs=14)


def test_a_clip_without_an_action_moves_all_the_same() -> None:
    clip = make_clip(None, 2.0, 0)
    assert np.ptp(clip.pose.x) + np.ptp(clip.pose.y) > 0
