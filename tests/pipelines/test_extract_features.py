"""Script that extracts features: killed and restarted, with failures, against the backbone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

from pipelines.config.recipe import PoolConfig
from pipelines.core.resources import pool_for
from pipelines.data.decoding import VideoJob, decode_video
from pipelines.data.feature_extraction import extract_features, load_backbone, unit_features
from pipelines.data.feature_options import ExtractConfig, FrozenBackboneConfig
from pipelines.data.feature_writing import FilesConfig
from pipelines.data.features import NAME, Features, read_description, write_npy
from pipelines.data.sampling import Sampling, SamplingConfig
from pipelines.extract_features import parse
from re2tal.annotations import Annotations
from re2tal.backbones.swin import TOY_WEIGHTS, swin_toy
from re2tal.backbones.table import IMAGENET_MEAN, IMAGENET_STD
from re2tal.backbones.weights import load_backbone_weights
from re2tal.datasets import load_annotations
from re2tal.detector import grey_levels
from re2tal.errors import UserError
from re2tal.reversible import rewire
from re2tal.videos.decoding import decode
from re2tal.videos.windows import WindowConfig, sliding_windows, window_frames

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "pipelines" / "extract_features.py")
BACKBONE = FrozenBackboneConfig(backbone="swin_toy", weights=TOY_WEIGHTS, size=32, batch_size=3)
CLIPS = SamplingConfig(fps=12.0, frames=8, stride=2)


@pytest.fixture(scope="module")
def annotations(tiny_set: Path) -> Annotations:
    return load_annotations(tiny_set / "annotations.json")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an MLflow store that is created once."""
    return str(tmp_path_factory.mktemp("runs"))


def config_for(tiny_set: Path, folder: Path, **changes: object) -> ExtractConfig:
    config = ExtractConfig(
        videos=str(tiny_set / "videos"),
        annotations=str(tiny_set / "annotations.json"),
        output=str(folder / "out"),
        backbone=BACKBONE,
        sampling=CLIPS,
        runs=str(folder / "runs"),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def arguments(config: ExtractConfig) -> list[str]:
    return [
        *(sys.executable, SCRIPT, "--videos", str(config.videos)),
        *("--annotations", str(config.annotations), "--output", str(config.output)),
        *("--backbone", "swin_toy", "--weights", TOY_WEIGHTS, "--size", "32", "--batch-size", "3"),
        *("--fps", "12", "--frames", "8", "--stride", "2", "--runs", config.runs),
    ]


def undisturbed(config: ExtractConfig, annotations: Annotations, folder: Path) -> None:
    """Write the expected files, computed in this process one after the other."""
    folder.mkdir()
    backbone = load_backbone(config.backbone, stride=None)
    sampling = resolved(config.sampling)
    extractor = backbone.build(torch.device("cpu"))
    for video in annotations.videos:
        sampled = sampling.of(duration=video.duration, own_fps=1.0)
        uri = f"{config.videos}/{video.video_id}.mp4"
        job = VideoJob(video_id=video.video_id, uri=uri, sampled=sampled)
        units = [
            unit_features(
                extractor, row["frames"], row["starts"], valid=row["valid"], frames=8, clips=True,
                batch_size=3,
            )
            for row in decode_video(
                {"video": job}, size=32, batch_size=3, threads=1, notes=str(folder / "notes")
            )
        ]  # fmt: skip
        write_npy(f"{folder}/{video.video_id}.npy", sampled.joined(np.concatenate(units)))
    (folder / "notes").rmdir()


def resolved(config: SamplingConfig) -> Sampling:
    return config.resolved(temporal_stride=2, multiple=2)


def slowly(config: ExtractConfig, video_id: str, clip: int) -> np.ndarray:
    """Compute the feature of one clip without the code under test."""
    times = (2 * clip + np.arange(8) + 0.5) / 12
    frames = decode(f"{config.videos}/{video_id}.mp4", times, size=32)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2).float()
    backbone = swin_toy().build().eval()
    load_backbone_weights(backbone, TOY_WEIGHTS)
    with torch.no_grad():
        seen = (video - grey_levels(IMAGENET_MEAN)) / grey_levels(IMAGENET_STD)
        return backbone(seen[None])[0].mean(dim=1).numpy()


def run_until_killed(config: ExtractConfig, log: Path) -> None:
    """Start the script, and kill it once the first file is there."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as stream:
        run = subprocess.Popen(
            arguments(config),
            env=env,
            stdout=stream,
            stderr=stream,
            cwd=log.parent,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 400
            while not list(Path(str(config.output)).glob("*.npy")) and run.poll() is None:
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.005)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    tiny_set: Path,
    tmp_path: Path,
    annotations: Annotations,
    runs: str,
    ray_instance: None,
) -> None:
    config = config_for(tiny_set, tmp_path, runs=runs)
    out = tmp_path / "out"
    run_until_killed(config, tmp_path / "log")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    assert 1 <= len(before) < 5, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().splitlines()[0] == "0 of 5 videos are done"
    assert read_description(str(out)).state == "incomplete"
    assert extract_features(config) == read_description(str(out))
    check_features(config, annotations, tmp_path)
    for name, written in before.items():  # what was there is not made again
        assert (out / name).stat().st_mtime_ns == written


def check_features(config: ExtractConfig, annotations: Annotations, folder: Path) -> None:
    """Check that the files hold the features computed in this process, and nothing else."""
    out = Path(str(config.output))
    undisturbed(config, annotations, folder / "undisturbed")
    for path in (folder / "undisturbed").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in out.iterdir()} - {"being_decoded", NAME} == {
        f"{video.video_id}.npy" for video in annotations.videos
    }


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_features_of_clips_are_those_of_the_frozen_backbone(
    tiny_set: Path,
    tmp_path: Path,
    annotations: Annotations,
    runs: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_for(tiny_set, tmp_path, runs=runs)
    description = extract_features(config)
    assert "complete: 5 videos, " in capsys.readouterr().out
    check_features(config, annotations, tmp_path)
    out = Path(str(config.output))
    features, video = Features(str(out)), annotations.videos[1]
    found, grid = features.read(video.video_id, duration=video.duration)
    assert len(found) == len(grid.to_seconds(np.arange(grid.num_features)))
    for clip in (0, 7, len(found) - 1):
        assert np.allclose(found[clip], slowly(config, video.video_id, clip), atol=1e-5)
        assert grid.to_seconds(clip) == pytest.approx((2 * clip + 4) / 12)
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name("re2tal")
    assert experiment is not None
    (ended,) = client.search_runs([experiment.experiment_id], f"tags.features = '{out}'")
    assert ended.info.status == "FINISHED"
    assert ended.data.metrics["features/videos"] == 5
    number = sum(entry.length for entry in description.videos.values())
    assert ended.data.metrics["features/number"] == number


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_features_of_windows_are_those_of_the_frozen_backbone(
    tiny_set: Path,
    tmp_path: Path,
    annotations: Annotations,
    runs: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(tiny_set / "videos", videos)
    first, second, *others = [video.video_id for video in annotations.videos]
    (videos / f"{first}.mp4").write_text("this is no video")
    (videos / f"{second}.mp4").unlink()
    asked = config_for(
        tiny_set,
        tmp_path,
        videos=f"file://{videos}",
        output=f"file://{tmp_path}/out",
        backbone=replace(BACKBONE, reversible=True),
        sampling=SamplingConfig(way="windows", fps=12.0, frames=64, stride=4, overlap=0.5),
        files=FilesConfig(layout="parquet", videos_per_file=3),
        runs=runs,
    )
    with pytest.raises(UserError, match=r"2 of 5 videos .* allowed 5% \(--max-failed\)"):
        extract_features(asked)
    printed = capsys.readouterr().out
    assert re.search(f"failed: {first}: .* cannot be opened as a video", printed)
    assert f"failed: {second}: there is no file" in printed
    features = Features(f"file://{tmp_path}/out")
    assert features.video_ids == tuple(sorted(others))
    assert features.missing([first, second]).keys() == {first, second}
    backbone = replace(swin_toy(), pooling=2).build()
    load_backbone_weights(backbone, TOY_WEIGHTS)
    rewire(backbone)
    for video in annotations.videos[2:]:
        config = WindowConfig(frames=64, fps=12.0)
        window, *_ = sliding_windows(video, annotations.classes, config, stride=4)
        path = tiny_set / "videos" / f"{video.video_id}.mp4"
        frames = torch.from_numpy(window_frames(path, window, size=32)).permute(3, 0, 1, 2).float()
        with torch.no_grad():
            seen = (frames - grey_levels(IMAGENET_MEAN)) / grey_levels(IMAGENET_STD)
            expected = backbone.eval()(seen[None])[0].T.numpy()
        found = features.window(window, duration=video.duration)
        # the next window's middle is nearer to the features of the last quarter
        assert np.allclose(found[:12], expected[:12], atol=1e-5)
        assert not np.allclose(found[13:], expected[13:], atol=1e-3)


def test_a_video_shorter_than_a_clip_repeats_its_last_frame() -> None:
    seen = []

    def look(frames: torch.Tensor) -> torch.Tensor:
        seen.append(frames[:, :, 0, 0, 0])
        return frames[:, :, 0, 0, :1].transpose(1, 2).float()

    stretch = np.zeros((8, 1, 1, 3), np.uint8)
    stretch[:5, ..., 0] = np.arange(5)[:, None, None] + 1
    starts = np.array([0])
    for clips, expected in ((True, [1, 2, 3, 4, 5, 5, 5, 5]), (False, [1, 2, 3, 4, 5, 0, 0, 0])):
        made = unit_features(
            look, stretch, starts, valid=5, frames=8, clips=clips, batch_size=2,
        )  # fmt: skip
        assert seen[-1].tolist() == [expected]
        assert made.shape == (1, 1 if clips else 8, 1)
    assert made[0, :, 0].tolist() == expected


def test_a_video_that_ends_its_process_is_given_up(tiny_set: Path, tmp_path: Path) -> None:
    sampled = resolved(CLIPS).of(duration=1.0, own_fps=12.0)
    path = next((tiny_set / "videos").iterdir())
    row = {"video": VideoJob(video_id="v", uri=str(path), sampled=sampled)}
    settings = {"size": 8, "batch_size": 2, "threads": 1, "notes": str(tmp_path / "notes")}
    for _ in range(2):
        rows = decode_video(row, **settings)  # type: ignore[arg-type]
        assert next(rows)["error"] == ""
        del rows  # the process is gone
    (given_up,) = decode_video(row, **settings)  # type: ignore[arg-type]
    assert "ended the process that read it, 2 times" in given_up["error"]
    assert not list((tmp_path / "notes").iterdir())
    assert [row["error"] for row in decode_video(row, **settings)] == [""]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"annotations": "/nowhere.json"}, "nothing at /nowhere.json. Correct --annotations"),
        ({"videos": "/nowhere"}, "nothing at /nowhere. Correct --videos"),
        ({"videos": str(ROOT / "tests"), "annotations": None}, "holds none of them. Correct --vi"),
        ({"output": None}, "no path given. Say where with --output"),
        ({"backbone": replace(BACKBONE, weights=None)}, "no path given. Say where with --weights"),
        ({"annotations": None, "subsets": ("a",)}, "--subsets names subsets of annotations"),
    ],
)
def test_what_is_missing_is_one_sentence(
    tiny_set: Path, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        extract_features(config_for(tiny_set, tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("way", "stride", "frames", "expected"),
    [
        ("windows", 3, 48, "stride must be a multiple of 2"),
        ("windows", 4, 62, "--frames must be a multiple of 4, .*not 62"),
        ("clips", 4, 15, "--frames must be a multiple of 2, .*not 15"),
    ],
)
def test_what_the_backbone_cannot_take_is_refused(
    tiny_set: Path, tmp_path: Path, way: str, stride: int, frames: int, expected: str
) -> None:
    sampling = SamplingConfig(way=way, stride=stride, frames=frames)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=expected):
        extract_features(config_for(tiny_set, tmp_path, sampling=sampling))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_a_cluster_that_is_too_small_is_refused() -> None:
    assert pool_for(PoolConfig()).actors == 1
    with pytest.raises(UserError, match=r"too small: 4 actors .* 4.5 CPUs .* Lower --actors"):
        pool_for(PoolConfig(actors=4))
    with pytest.raises(UserError, match=r"1 GPUs \(it has 0\)"):
        pool_for(PoolConfig(gpu=True))


def test_the_command_line_explains_itself_and_refuses_nonsense(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--way", "--layout", "--actors", "--retry-failed"))
    with pytest.raises(SystemExit) as ended:
        parse(["--overlap", "1"])
    assert ended.value.code != 0
    assert "--overlap must be in [0, 1), not 1.0" in capsys.readouterr().err
    windows = ["--way", "windows", "--fps", "squeeze"]
    config = parse([*windows, "--layout", "parquet", "--gpu", "False"])
    assert config.sampling == SamplingConfig(way="windows", fps="squeeze")
    assert config.files == FilesConfig(layout="parquet")
    assert config.pool == PoolConfig(gpu=False)
    assert parse(["--fps", "12"]).sampling.fps == 12.0
