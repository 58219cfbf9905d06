"""Files of features: their content is read back, by this project and as others read it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.data.feature_writing import FeatureFolder, FilesConfig
from pipelines.data.features import FOLDER, NAME, ExtractedVideo, Features, VideoEntry
from pipelines.data.sampling import Sampling, SamplingConfig
from pipelines.data.videos import FoundVideos
from re2tal.annotations import VideoAnnotation
from re2tal.errors import UserError
from re2tal.videos.windows import WindowConfig, sliding_windows

CLIPS = SamplingConfig(fps=10.0).resolved(temporal_stride=2, multiple=2)
IDS = ("a", "b", "c", "d", "e")
PARQUET = FilesConfig(layout="parquet", videos_per_file=2)


def folder_at(
    path: Path,
    config: FilesConfig,
    ids: tuple[str, ...] = IDS,
    *,
    sampling: Sampling = CLIPS,
    **settings: object,
) -> FeatureFolder:
    settings = {**sampling.described(), "backbone": "b", **settings}
    return FeatureFolder(str(path), config, ids, settings=settings, sampling=sampling, channels=3)


def made(video_id: str, sampling: Sampling = CLIPS) -> ExtractedVideo:
    """Make features whose values tell video and position, of videos of different durations."""
    duration = 4.0 + IDS.index(video_id)
    grid = sampling.of(duration=duration, own_fps=10.0).grid
    features = np.arange(grid.num_features * 3, dtype=np.float32).reshape(-1, 3)
    entry = VideoEntry(
        file="", length=len(features), fps=grid.fps, stride=grid.stride, offset=grid.offset,
        duration=duration,
    )  # fmt: skip
    return ExtractedVideo(
        entry=entry, subset="training", source=f"/{video_id}.mp4",
        features=features + 100 * IDS.index(video_id),
    )  # fmt: skip


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name != NAME)
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(files)}


def fill(folder: FeatureFolder, ids: tuple[str, ...] = IDS) -> None:
    assert folder.begin(retry_failed=False) == list(ids)
    for video_id in reversed(ids):  # they come in any order
        folder.add(video_id, made(video_id))
    folder.write_description()


@pytest.mark.parametrize("config", [FilesConfig(prefix="v_"), PARQUET], ids=["npy", "parquet"])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_what_is_written_is_read_again(tmp_path: Path, config: FilesConfig, kind: Any) -> None:
    fill(folder_at(tmp_path, replace(config, feature_type=kind)))
    features = Features(str(tmp_path))
    assert (features.video_ids, features.channels) == (IDS, 3)
    for video_id in IDS:
        expected = made(video_id)
        found, grid = features.read(video_id, duration=expected.entry.duration)
        assert found.dtype == kind
        assert np.array_equal(found, expected.features)
        assert grid == expected.entry.grid
    assert features.missing(["a", "x"]) == {"x": f"{tmp_path} has no features of it"}
    with pytest.raises(UserError, match=r"x: .* has no features of it"):
        features.read("x", duration=1.0)


@pytest.mark.parametrize("config", [FilesConfig(), PARQUET], ids=["npy", "parquet"])
def test_names_are_the_same_in_every_normal_form(tmp_path: Path, config: FilesConfig) -> None:
    one, several = normalize("NFC", "caf\u00e9"), normalize("NFD", "caf\u00e9")
    for written, asked in ((one, several), (several, one)):
        folder = folder_at(tmp_path / written, config, (written,))
        folder.begin(retry_failed=False)
        folder.add(written, made("a"))
        folder.write_description()
        features = Features(str(tmp_path / written))
        assert features.missing([asked, written, "x"]).keys() == {"x"}
        found, grid = features.read(asked, duration=4.0)
        assert np.array_equal(found, made("a").features)
        assert grid == made("a").entry.grid
        assert features.uri(asked) == features.uri(written)
        assert features.examine({asked: 4.0, "other": 1.0}) == ({}, [])
        assert features.examine({asked: 400.0}) != ({}, [])


def test_npy_files_are_what_actionformer_reads(tmp_path: Path) -> None:
    fill(folder_at(tmp_path, FilesConfig(prefix="v_")))
    said = json.loads((tmp_path / NAME).read_text())
    theirs = said["actionformer"]
    assert theirs == {"input_dim": 3, "feat_stride": 4, "num_frames": 16, "default_fps": 10.0}
    array = np.load(tmp_path / f"{said['prefix']}b{said['ending']}")
    assert (array.dtype, array.shape) == (np.float32, (9, 3))
    # where ActionFormer looks for feature 2 of a video
    seconds = (2 * theirs["feat_stride"] + 0.5 * theirs["num_frames"]) / theirs["default_fps"]
    assert Features(str(tmp_path)).read("b", duration=5.0)[1].to_seconds(2) == pytest.approx(
        seconds
    )


def test_features_of_whole_windows_are_described_too(tmp_path: Path) -> None:
    squeeze = SamplingConfig(way="windows", fps="squeeze", frames=32)
    sampling = squeeze.resolved(temporal_stride=4, multiple=4)
    folder = folder_at(tmp_path, FilesConfig(), ("a",), sampling=sampling)
    folder.begin(retry_failed=False)
    folder.add("a", made("a", sampling))
    folder.write_description()
    theirs = json.loads((tmp_path / NAME).read_text())["actionformer"]
    assert theirs == {"input_dim": 3, "feat_stride": -1, "num_frames": 1, "default_fps": None}
    assert Features(str(tmp_path)).read("a", duration=4.0)[1].to_seconds(0) == 0.25


def test_parquet_files_are_tables_that_say_all(tmp_path: Path) -> None:
    fill(folder_at(tmp_path, PARQUET))
    names = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert names == [f"part-0000{number}.parquet" for number in range(3)]
    rows = pq.read_table(tmp_path / FOLDER).to_pylist()
    assert [row["video_id"] for row in rows] == list(IDS)
    row = rows[1]
    assert (row["length"], row["channels"], row["duration"]) == (9, 3, 5.0)
    assert (row["subset"], row["source"]) == ("training", "/b.mp4")
    assert np.array_equal(np.reshape(row["features"], (9, 3)), made("b").features)
    middle = row["offset"] + (2 + 0.5) * row["stride"] / row["fps"]
    assert middle == pytest.approx((2 * 4 + 0.5 * 16) / 10.0)


@pytest.mark.parametrize("config", [FilesConfig(), PARQUET], ids=["npy", "parquet"])
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, config: FilesConfig
) -> None:
    fill(folder_at(tmp_path / "whole", config))
    killed = folder_at(tmp_path / "killed", config)
    killed.begin(retry_failed=False)
    for video_id in ("d", "c", "a"):  # a's file is not whole, if b belongs into it
        killed.add(video_id, made(video_id))
    (tmp_path / "killed" / f"e.npy.partial-{'0' * 32}").write_bytes(b"half")
    with pytest.raises(UserError, match="is not complete"):
        Features(str(tmp_path / "killed"))
    again = folder_at(tmp_path / "killed", config)
    left = again.begin(retry_failed=False)
    if config.layout == "npy":  # features.json was not up to date, the files are
        assert left == list(IDS)
        assert [v for v in left if again.holds(v)] == ["a", "c", "d"]
        for video_id in ("a", "c", "d"):
            again.adopt(video_id, made(video_id).entry)
        left = ["b", "e"]
    else:
        assert left == ["a", "b", "e"]
    for video_id in left:
        again.add(video_id, made(video_id))
    again.write_description()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert again.description == folder_at(tmp_path / "whole", config).description


@pytest.mark.parametrize("config", [FilesConfig(), PARQUET], ids=["npy", "parquet"])
def test_failed_videos_are_known_and_made_when_asked_for(
    tmp_path: Path, config: FilesConfig
) -> None:
    fill(folder_at(tmp_path / "whole", config))
    first = folder_at(tmp_path / "out", config)
    first.begin(retry_failed=False)
    first.fail("b", "no video")
    for video_id in ("a", "c", "d", "e"):
        first.add(video_id, made(video_id))
    first.write_description()
    assert Features(str(tmp_path / "out")).missing(IDS) == {"b": "no video"}
    assert folder_at(tmp_path / "out", config).begin(retry_failed=False) == []
    retried = folder_at(tmp_path / "out", config)
    assert retried.begin(retry_failed=True) == ["b"]
    retried.add("b", made("b"))
    retried.write_description()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert Features(str(tmp_path / "out")).video_ids == IDS


@pytest.mark.parametrize("config", [FilesConfig(), PARQUET], ids=["npy", "parquet"])
def test_features_of_a_video_that_was_replaced_are_made_anew(
    tmp_path: Path, config: FilesConfig
) -> None:
    videos = {video_id: str(tmp_path / f"{video_id}.mp4") for video_id in IDS}
    for place in videos.values():
        Path(place).write_bytes(b"a video")
    found = FoundVideos(uris=videos, failures={}, durations={}, rates={})

    def stamped(video_id: str) -> ExtractedVideo:
        video, stamp = made(video_id), found.stamped([video_id])[video_id]
        return replace(video, entry=replace(video.entry, source=stamp))

    first = folder_at(tmp_path / "out", config)
    first.begin(retry_failed=False)
    for video_id in IDS:
        first.add(video_id, stamped(video_id))
    first.write_description()
    assert found.replaced(folder_at(tmp_path / "out", config).stamps) == []
    Path(videos["b"]).write_bytes(b"another one")
    for _ in range(2):  # the first of them is killed at once
        folder = folder_at(tmp_path / "out", config)
        replaced = found.replaced(folder.stamps)
        folder.forget(replaced)
        assert folder.begin(retry_failed=False) == ["b"]
        assert not folder.holds("b")
    new = stamped("b")
    folder.add("b", replace(new, features=new.features + 1))
    folder.write_description()
    assert found.replaced(folder_at(tmp_path / "out", config).stamps) == []
    features = Features(str(tmp_path / "out"))
    for video_id in IDS:
        got, _ = features.read(video_id, duration=made(video_id).entry.duration)
        assert np.array_equal(got, made(video_id).features + (video_id == "b"))


@pytest.mark.parametrize("config", [FilesConfig(), PARQUET], ids=["npy", "parquet"])
def test_features_that_are_not_finite_are_failures(tmp_path: Path, config: FilesConfig) -> None:
    folder = folder_at(tmp_path, replace(config, feature_type="float16"))
    folder.begin(retry_failed=False)
    for video_id, factor in zip(IDS, (1.0, 1e5, np.nan, 1.0, 1.0), strict=True):
        video = made(video_id)
        folder.add(video_id, replace(video, features=video.features * np.float32(factor)))
    folder.write_description()
    features = Features(str(tmp_path))
    assert features.video_ids == ("a", "d", "e")
    assert set(features.missing(IDS)) == {"b", "c"}
    assert "not finite (nan or inf) as float16 numbers: write float32" in features.missing("b")["b"]


def test_features_of_other_settings_are_refused(tmp_path: Path) -> None:
    fill(folder_at(tmp_path / "npy", FilesConfig()))
    with pytest.raises(UserError, match=r"other settings \(size: None there, 224 asked for\)"):
        folder_at(tmp_path / "npy", FilesConfig(), size=224)
    with pytest.raises(UserError, match=r"as npy files with the prefix ''"):
        folder_at(tmp_path / "npy", FilesConfig(prefix="v_"))
    fill(folder_at(tmp_path / "parquet", PARQUET))
    with pytest.raises(UserError, match=r"other settings \(videos: "):
        folder_at(tmp_path / "parquet", PARQUET, IDS[:3])
    (tmp_path / "npy" / NAME).unlink()
    with pytest.raises(UserError, match=r"holds .npy files, and no features.json"):
        folder_at(tmp_path / "npy", FilesConfig())


def test_more_videos_may_come_to_npy_files(tmp_path: Path) -> None:
    fill(folder_at(tmp_path, FilesConfig(), IDS[:2]), IDS[:2])
    more = folder_at(tmp_path, FilesConfig())
    assert more.begin(retry_failed=False) == ["c", "d", "e"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    fill(folder_at(tmp_path, PARQUET))
    (tmp_path / FOLDER / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-00001.parquet does not have the format"):
        folder_at(tmp_path, PARQUET)
    with pytest.raises(UserError, match=r"part-00001.parquet does not have the format"):
        Features(str(tmp_path)).read("c", duration=6.0)


def describe(folder: Path, **said: object) -> Features:
    """Describe another program's features by hand, and open them."""
    (folder / NAME).write_text(json.dumps({"format": "re2tal features 1", "layout": "npy", **said}))
    return Features(str(folder))


def test_features_of_others_need_one_file_that_says_where_they_lie(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(72, 4)).astype(np.float32)
    np.save(tmp_path / "v_one.npy", array)
    with pytest.raises(UserError, match=r'has no features.json.*"clips": {"fps": 30.0'):
        Features(str(tmp_path))
    clips = {"fps": 30.0, "stride": 4, "frames": 16}
    features = describe(tmp_path, prefix="v_", clips=clips)
    assert (features.video_ids, features.channels) == (("one",), 4)
    found, grid = features.read("one", duration=10.0)
    assert np.array_equal(found, array)
    assert grid.to_seconds(3) == pytest.approx((3 * 4 + 8) / 30)
    with pytest.raises(UserError, match=r"up to second 9.8 of a video of 20.0 s"):
        features.read("one", duration=20.0)
    features = describe(tmp_path, prefix="v_", resampled=True)
    assert features.read("one", duration=20.0)[1].to_seconds(71.5) == pytest.approx(20.0)
    with pytest.raises(UserError, match=r"features.json does not say where .* \"resampled\": t"):
        describe(tmp_path, prefix="v_")
    with pytest.raises(UserError, match=r"no file is named w_ID.npy"):
        describe(tmp_path, prefix="w_", clips=clips)
    with pytest.raises(UserError, match=r"damaged: layout: input should be .* \(found "):
        describe(tmp_path, layout="hdf5")


def test_compressed_arrays_are_read_and_others_refused(tmp_path: Path) -> None:
    array = np.ones((6, 2), np.float32)
    np.savez(tmp_path / "one.npz", feats=array, other=array[0])
    np.savez(tmp_path / "two.npz", only=array)
    np.savez(tmp_path / "six.npz", a=array, b=array)
    np.savez(tmp_path / "ten.npz", only=array[0])
    (tmp_path / "text.npz").write_text("no array")
    features = describe(tmp_path, ending=".npz", resampled=True)
    for video_id in ("one", "two"):
        assert np.array_equal(features.read(video_id, duration=9.0)[0], array)
    with pytest.raises(UserError, match=r"six.npz cannot be read as an array"):
        features.read("six", duration=9.0)
    with pytest.raises(UserError, match=r"of shape \(T, C\), but holds float32 of shape \(2,\)"):
        features.read("ten", duration=9.0)
    with pytest.raises(UserError, match=r"text.npz cannot be read as an array"):
        features.read("text", duration=9.0)


def test_a_windows_features_come_from_the_file(tmp_path: Path) -> None:
    sampling = SamplingConfig(way="windows", fps=10.0, frames=16)
    resolved = sampling.resolved(temporal_stride=4, multiple=4)
    folder = folder_at(tmp_path, FilesConfig(), ("e",), sampling=resolved)
    folder.begin(retry_failed=False)
    folder.add("e", made("e", resolved))
    folder.write_description()
    features = Features(str(tmp_path))
    video = VideoAnnotation(video_id="e", subset="", duration=8.0)
    config = WindowConfig(frames=16, fps=10.0, overlap=0.5)
    first, second, *_ = sliding_windows(video, (), config, stride=4)
    assert np.array_equal(features.window(first, duration=8.0), made("e", resolved).features[:4])
    assert np.array_equal(features.window(second, duration=8.0), made("e", resolved).features[2:6])
    assert features.examine({"e": 8.0, "other": 1.0}) == ({}, [])
    failures, (remark,) = features.examine({"e": 13.3})
    assert (failures, remark) == ({}, "e: its features end at second 8.0, but it lasts 13.3")
