"""Script that makes shards: killed and restarted, with failures, and used for training."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.config.recipe import Recipe
from pipelines.data.batches import decode_batches
from pipelines.data.plan import make_plan, read_annotations
from pipelines.data.shard_writing import ShardTask, write_shard
from pipelines.data.shards import FOLDER, NAME, ShardSettings, pack, read_manifest
from pipelines.prepare import PrepareConfig, parse, prepare
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.trainer import Trainer
from re2tal.annotations import AnnotationError
from re2tal.datasets import load_annotations
from re2tal.errors import UserError
from re2tal.videos.transcoding import TranscodeConfig
from re2tal.videos.windows import training_windows
from tests.videos.made_videos import make_video

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "pipelines" / "prepare.py")
TRANSCODE = TranscodeConfig(size=64, piece_seconds=4.0)


def annotate(folder: Path, **duration: float) -> Path:
    """Write annotations of videos with one action each."""
    database = {
        video_id: {
            "subset": "training" if number % 2 else "validation",
            "duration": seconds,
            "annotations": [{"segment": [0.5, seconds / 2], "label": "spin"}],
        }
        for number, (video_id, seconds) in enumerate(duration.items())
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps({"database": database}))
    return path


def config_for(folder: Path, **changes: object) -> PrepareConfig:
    """Return options that put each video of a folder into a shard of its own."""
    config = PrepareConfig(
        annotations=str(folder / "annotations.json"),
        videos=str(folder / "videos"),
        output=str(folder / "out"),
        transcode=TRANSCODE,
        shard_seconds=1.0,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def undisturbed(config: PrepareConfig, folder: Path) -> dict[str, bytes]:
    """Return the expected content of the shards, made in this process one after the other."""
    annotations = load_annotations(Path(str(config.annotations)))
    settings = ShardSettings(
        fingerprint=annotations.fingerprint,
        subsets=tuple(sorted({video.subset for video in annotations.videos})),
        transcode=config.transcode,
        shard_seconds=config.shard_seconds,
    )
    for name, videos in pack(annotations.videos, config.shard_seconds).items():
        sources = {v.video_id: f"{config.videos}/{v.video_id}.mp4" for v in videos}
        uri = str(folder / name)
        write_shard(
            ShardTask(uri=uri, settings=settings, videos=videos, sources=sources, missing={})
        )
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def arguments(config: PrepareConfig) -> list[str]:
    return [
        *(sys.executable, SCRIPT, "--annotations", str(config.annotations)),
        *("--videos", str(config.videos), "--output", str(config.output)),
        *("--size", str(config.transcode.size)),
        *("--piece-seconds", str(config.transcode.piece_seconds)),
        *("--shard-seconds", str(config.shard_seconds)),
    ]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ray_instance: None,
) -> None:
    (tmp_path / "videos").mkdir()
    names = [f"video{number}" for number in range(8)]
    make_video(tmp_path / "videos" / f"{names[0]}.mp4", 300, width=320, height=240)
    for name in names[1:]:
        shutil.copy(tmp_path / "videos" / f"{names[0]}.mp4", tmp_path / "videos" / f"{name}.mp4")
    annotate(tmp_path, **dict.fromkeys(names, 12.0))
    config = config_for(tmp_path)
    shards = tmp_path / "out" / FOLDER
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            arguments(config), env=env, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
        )
        deadline = time.monotonic() + 200
        while len(list(shards.glob("*.parquet"))) < 1 and run.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    before = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.parquet")}
    assert 1 <= len(before) < len(names), (tmp_path / "log").read_text()
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest is not None
    assert manifest.state == "incomplete"
    # the same command; in this process, which has Ray and has imported everything
    monkeypatch.setattr(sys, "argv", arguments(config)[1:])
    capsys.readouterr()
    runpy.run_path(SCRIPT, run_name="__main__")
    printed = capsys.readouterr().out
    assert f"of {len(names)} shards are there" in printed
    assert "s of video per second" in printed
    assert "complete: 8 shards, 8 videos, 24 pieces, 1:36 of video" in printed
    assert contents(shards) == undisturbed(config, tmp_path / "undisturbed")
    for name, written in before.items():  # what was whole is not made again
        assert (shards / name).stat().st_mtime_ns == written
    assert sorted(pq.read_table(shards)["video_id"].to_pylist()) == sorted(names * 3)
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest is not None
    assert manifest.state == "complete"
    assert manifest.totals.videos == 8


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Folder of three videos, of which one is missing and one is unreadable."""
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "a.mp4", 100)
    (tmp_path / "videos" / "b.mp4").write_text("this is no video")
    annotate(tmp_path, a=4.0, b=2.0, c=3.0)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_failed_videos_are_listed_and_only_they_are_made_again(
    three: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(three, shard_seconds=6.5)  # a and b together, c alone
    with pytest.raises(UserError, match=r"2 of 3 videos .* allowed 5% \(--max-failed\)") as caught:
        prepare(config)
    assert "b: cannot be opened as a video" in str(caught.value)
    assert "c: there is no file" in str(caught.value)
    printed = capsys.readouterr().out
    assert "failed: b: cannot be opened" in printed
    assert "complete: 2 shards, 1 videos" in printed
    shards = three / "out" / FOLDER
    assert pq.read_table(shards / "part-00000.parquet")["video_id"].to_pylist() == ["a"]
    manifest = json.loads((three / "out" / NAME).read_text())
    assert manifest["failures"].keys() == {"b", "c"}
    assert (manifest["state"], manifest["totals"]["failed"]) == ("complete", 2)
    # the same command again does nothing, and says the same
    first = contents(shards)
    assert prepare(replace(config, max_failed=0.7)).totals.failed == 2
    assert contents(shards) == first
    # b is mended; a is gone, so that it could not be made again
    make_video(three / "videos" / "b.mp4", 50)
    (three / "videos" / "a.mp4").rename(three / "kept.mp4")
    retry = replace(config, max_failed=0.7, retry_failed=True)
    assert prepare(retry).failures.keys() == {"c"}
    (three / "kept.mp4").rename(three / "videos" / "a.mp4")
    make_video(three / "videos" / "c.mp4", 75)
    assert prepare(retry).failures == {}
    assert contents(shards) == undisturbed(config, three / "undisturbed")
    other = replace(config, transcode=replace(TRANSCODE, quality=30))
    with pytest.raises(UserError, match=r"holds shards of other settings \(quality: 23 there, 30"):
        prepare(other)
    annotate(three, a=4.0, b=2.0, c=3.5)
    with pytest.raises(UserError, match=r"other settings \(annotations: "):
        prepare(config)
    (shards / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-00001.parquet does not have the format"):
        prepare(config)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_training_on_shards_is_training_on_files(
    tiny_recipe: Recipe, tiny_set: Path, tmp_path: Path
) -> None:
    output = f"file://{tmp_path}/shards"
    prepare(
        PrepareConfig(
            annotations=tiny_recipe.data.annotations,
            videos=f"file://{tiny_set}/videos",
            output=output,
            transcode=TranscodeConfig(quality=18, piece_seconds=5.0),
            shard_seconds=40.0,
        )
    )
    annotations = read_annotations(tiny_recipe.data)
    recipe = replace(tiny_recipe, data=replace(tiny_recipe.data, videos=output))
    raw, sharded = (make_plan(r.data, annotations) for r in (tiny_recipe, recipe))
    assert sharded.remarks == ()
    assert replace(sharded, training=(), validation=()) == replace(raw, training=(), validation=())
    assert [v.annotation for v in sharded.training] == [v.annotation for v in raw.training]
    assert len(sharded.validation) == len(raw.validation)
    windows = [
        window
        for video in raw.training
        for window in training_windows(
            video.annotation,
            raw.classes,
            recipe.data.window,
            stride=2,
            random=np.random.default_rng(0),
        )
    ]
    batches = [
        list(decode_batches(windows, plan.uris, size=64, batch_size=4)) for plan in (raw, sharded)
    ]
    for one, other in zip(*batches, strict=True):
        assert one.failures == other.failures == {}
        error = (one.frames.float() - other.frames.float()).square().mean(dim=(2, 3, 4))
        assert float(error.max()) < 255**2 / 10**3.6  # 36 dB
        assert (one.mask == other.mask).all()
    runtime = LocalRuntime(recipe, sharded, tmp_path)
    final = Trainer(
        DetectionTask(recipe=recipe, plan=sharded),
        runtime,
        weights=None,
        output=str(tmp_path / "output"),
    ).run()
    assert 0 <= final["val/mAP"] <= 1
    (tmp_path / "shards" / FOLDER / "part-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards .* part-00001\.parquet"):
        make_plan(recipe.data, annotations)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"annotations": None}, "no path given. Say where with --annotations"),
        ({"annotations": "/nowhere.json"}, "nothing at /nowhere.json. Correct --annotations"),
        ({"videos": "/nowhere"}, "nothing at /nowhere. Correct --videos"),
        ({"output": None}, "no path given. Say where with --output"),
    ],
)
def test_what_is_missing_is_one_sentence(
    tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    (tmp_path / "videos").mkdir()
    annotate(tmp_path, a=4.0)
    with pytest.raises(UserError, match=expected) as caught:
        prepare(config_for(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_subset_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    annotate(tmp_path, a=4.0)
    with pytest.raises(AnnotationError, match="'test'; subsets there are: 'validation'"):
        prepare(config_for(tmp_path, subsets=("test",)))


def test_the_command_line_explains_itself_and_refuses_nonsense(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--piece-seconds", "--retry-failed", "--gop"))
    with pytest.raises(SystemExit) as ended:
        parse(["--quality", "99"])
    assert ended.value.code != 0
    assert "quality must be from 0 to 51, not 99" in capsys.readouterr().err
    config = parse(["--subsets", "a", "b", "--size", "128", "--fps", "10", "--no-retry-failed"])
    assert config.subsets == ("a", "b")
    assert config.transcode == TranscodeConfig(size=128, fps=10.0)


def test_an_error_is_one_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--annotations", "/nowhere.json", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(SCRIPT, run_name="__main__")
    # a text as exit code goes to the standard error, and the code is 1
    assert ended.value.code == (
        "error: The annotations: nothing at /nowhere.json. Correct --annotations."
    )
