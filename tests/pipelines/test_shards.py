"""Shard of videos: writing, reading back, and failures."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core import storage
from pipelines.data import shard_writing
from pipelines.data import shards as reading
from pipelines.data.decoding import decode_sample
from pipelines.data.shard_writing import ShardFolder, ShardTask, write_shard
from pipelines.data.shards import (
    FOLDER,
    NAME,
    SCHEMA,
    SHARDS,
    Manifest,
    Shard,
    ShardSettings,
    make_manifest,
    open_video,
    pack,
    read_manifest,
    video_uri,
)
from pipelines.data.videos import find_videos
from re2tal.annotations import Annotations, Instance, VideoAnnotation
from re2tal.errors import UserError
from re2tal.videos.decoding import VideoError, decode, probe
from re2tal.videos.limits import FrameError
from re2tal.videos.pieces import Pieces, decode_source
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.transcoding import TranscodeConfig, transcode
from re2tal.videos.windows import Window
from tests.videos.made_videos import FPS, make_video, numbers

NAMES = ("plain", "rotated", "short", "uneven")
SETTINGS = ShardSettings(
    fingerprint="f" * 64,
    subsets=("training",),
    transcode=TranscodeConfig(size=None, quality=10, piece_seconds=1.5),
)


@dataclass(frozen=True)
class Collection:
    folder: Path
    videos: tuple[VideoAnnotation, ...]
    sources: dict[str, str]

    def task(self, uri: str | Path, **changes: Any) -> ShardTask:
        task = ShardTask(
            uri=str(uri), settings=SETTINGS, videos=self.videos, sources=self.sources, missing={}
        )
        return replace(task, **changes)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    folder = tmp_path_factory.mktemp("collection")
    times = np.cumsum([0, *np.random.default_rng(0).choice([1, 2, 9], size=39)]).tolist()
    make_video(folder / "plain.mp4", 100)
    make_video(folder / "rotated.mp4", 60, rotation=90)
    make_video(folder / "short.mp4", 10)
    make_video(folder / "uneven.mp4", 40, times=times)
    return Collection(
        folder=folder,
        videos=tuple(
            VideoAnnotation(
                video_id=name,
                subset="training",
                duration=4.0,
                instances=(Instance(start=0.5, end=1.25, label=f"{name}ing"),),
                ambiguous=(Instance(start=0.0, end=0.25, label="Ambiguous"),),
            )
            for name in NAMES
        ),
        sources={name: str(folder / f"{name}.mp4") for name in NAMES},
    )


@pytest.fixture(scope="module")
def written(collection: Collection) -> Path:
    """Shard of the whole collection."""
    path = collection.folder / "written" / FOLDER / "part-00000.parquet"
    write_shard(collection.task(path))
    return path


def shown(source: Any, *times: float) -> np.ndarray:
    return decode_source(source, np.array(times), size=None)


def window(video_id: str, offset: float, length: int) -> Window:
    return Window(
        video_id=video_id,
        grid=TimeGrid(fps=FPS, stride=1, length=length, offset=offset),
        valid=length,
        segments=np.empty((0, 2), np.float32),
        labels=np.empty(0, np.int64),
    )


def test_a_row_is_a_piece_with_its_annotations_and_its_source(
    collection: Collection, written: Path
) -> None:
    table = pq.read_table(written)
    assert table.schema.equals(SCHEMA)
    assert pq.ParquetFile(written).num_row_groups == table.num_rows == 3 + 2 + 1 + 5
    rows = table.to_pylist()
    assert [row["video_id"] for row in rows] == ["plain"] * 3 + ["rotated"] * 2 + ["short"] + [
        "uneven"
    ] * 5
    row = rows[1]
    content = row.pop("video")
    np.testing.assert_array_equal(
        numbers(decode(content, np.array([0.01, 1.4]), size=None)), [37, 72]
    )
    assert row == {
        "video_id": "plain",
        "subset": "training",
        "piece": 1,
        "pieces": 3,
        "start": 1.5,
        "end": 3.0,
        "frames": 37,  # and the one that was on screen before
        "duration": 4.0,
        "width": 96,
        "height": 64,
        "fps": 25.0,
        "annotated_duration": 4.0,
        "annotations": [{"start": 0.5, "end": 1.25, "label": "plaining"}],
        "ambiguous": [{"start": 0.0, "end": 0.25, "label": "Ambiguous"}],
        "annotations_fingerprint": "f" * 64,
        "source": str(collection.folder / "plain.mp4"),
        "source_bytes": (collection.folder / "plain.mp4").stat().st_size,
        "source_codec": "h264",
        "source_width": 96,
        "source_height": 64,
        "damage": "",
    }
    upright = rows[3]
    assert (upright["video_id"], upright["width"], upright["height"]) == ("rotated", 64, 96)


@pytest.mark.parametrize("name", NAMES)
def test_windows_are_the_same_from_shard_and_file(
    collection: Collection, written: Path, name: str
) -> None:
    length = {"short": 10}.get(name, 50)
    random = np.random.default_rng(0)
    for offset in random.uniform(0, {"short": 0.0, "rotated": 0.3}.get(name, 1.9), 6):
        uris = (collection.sources[name], video_uri(str(written), name))
        samples = [
            decode_sample({"index": 0, "uri": uri, "window": window(name, offset, length)}, size=64)
            for uri in uris
        ]
        assert [sample["error"] for sample in samples] == ["", ""]
        raw, sharded = (sample["frames"].astype(float) for sample in samples)
        errors = ((raw - sharded) ** 2).mean(axis=(1, 2, 3))
        assert 10 * np.log10(255**2 / errors.max()) > 38
        if name in ("plain", "uneven"):
            whole = [shown(open_video(u), offset + 0.7) for u in uris]
            assert numbers(whole[0]) == numbers(whole[1])


def test_only_what_a_window_needs_is_read(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading._opened.cache_clear()
    read: list[tuple[int, Any]] = []
    opened: list[str] = []
    original, init = pq.ParquetFile.read_row_group, Shard.__init__

    def noted(self: Any, number: int, **options: Any) -> Any:
        read.append((number, options["columns"]))
        return original(self, number, **options)

    def counted(self: Any, uri: str) -> None:
        opened.append(uri)
        init(self, uri)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    monkeypatch.setattr(Shard, "__init__", counted)
    for offset in (0.2, 1.6):
        uri = video_uri(str(written), "plain")
        assert not decode_sample(
            {"index": 0, "uri": uri, "window": window("plain", offset, 20)}, size=32
        )["error"]
    assert read == [(0, ["damage", "video"]), (1, ["damage", "video"])]
    assert opened == [str(written)]


def test_the_same_task_gives_the_same_bytes(collection: Collection, written: Path) -> None:
    other = collection.folder / "other" / written.name
    write_shard(collection.task(other))
    assert other.read_bytes() == written.read_bytes()
    assert [path.name for path in other.parent.iterdir()] == [written.name]


def broken(collection: Collection, folder: Path) -> Collection:
    """Collection with one damaged and one missing video."""
    path = folder / "plain.mp4"
    path.write_text("this is no video")
    return replace(collection, sources={**collection.sources, "plain": str(path)})


def test_a_failed_video_is_left_out_and_encoded_alone_once_it_is_mended(
    collection: Collection, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / written.name
    missing = {"uneven": "there is no file"}
    contents = write_shard(broken(collection, tmp_path).task(path, missing=missing))
    assert list(contents.videos) == ["rotated", "short"]
    assert contents.failures["uneven"] == "there is no file"
    assert "cannot be opened" in contents.failures["plain"]
    assert Shard(str(path)).contents == contents
    assert set(pq.read_table(path)["video_id"].to_pylist()) == {"rotated", "short"}
    with pytest.raises(VideoError, match="there is no file"):
        open_video(video_uri(str(path), "uneven"))
    encoded: list[str] = []

    def noted(reader: Any, config: TranscodeConfig) -> Iterator[Any]:
        encoded.append(Path(reader.name).stem)
        return transcode(reader, config)

    monkeypatch.setattr(shard_writing, "transcode", noted)
    contents = write_shard(collection.task(path, kept=True))
    assert encoded == ["plain", "uneven"]
    assert not contents.failures
    assert path.read_bytes() == written.read_bytes()


def test_a_shard_does_not_prolong_a_file_that_was_cut_off(
    collection: Collection, tmp_path: Path
) -> None:
    whole = make_video(tmp_path / "whole.mkv", 100).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 7 // 10])
    path = tmp_path / FOLDER / "part-00000.parquet"
    short = next(video for video in collection.videos if video.video_id == "short")
    video = replace(short, video_id="cut", duration=4.0)
    task = collection.task(path, videos=(video,), sources={"cut": str(tmp_path / "cut.mkv")})
    entry = write_shard(task).videos["cut"]
    source = open_video(video_uri(str(path), "cut"))
    assert isinstance(source, Pieces)
    last = round(entry.end * FPS) - 1
    assert 50 < last < 90
    middles = (np.arange(last + 1) + 0.5) / FPS
    assert numbers(decode_source(source, middles[-1:], size=None)) == [last]
    for time in (entry.end + 0.5 / FPS, 3.9):
        with pytest.raises(FrameError, match="the file was cut off"):
            decode_source(source, np.array([time]), size=None)
    assert probe(tmp_path / "cut.mkv").duration == pytest.approx(entry.end)


def test_a_video_that_was_replaced_is_encoded_anew_and_no_other(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(collection.folder, videos)
    annotations = Annotations(classes=("run",), videos=collection.videos)
    encoded: list[str] = []

    def noted(reader: Any, config: TranscodeConfig) -> Iterator[Any]:
        encoded.append(Path(reader.name).stem)
        return transcode(reader, config)

    def write(self: ShardFolder, tasks: Sequence[ShardTask], _: object) -> None:
        for task in tasks:  # as Ray's tasks do
            self._there[Path(task.uri).name] = write_shard(task)

    monkeypatch.setattr(shard_writing, "transcode", noted)
    monkeypatch.setattr(shard_writing, "start_ray", lambda: None)
    monkeypatch.setattr(ShardFolder, "_write", write)

    def filled() -> Manifest:
        encoded.clear()
        folder = ShardFolder(
            str(tmp_path / "out"),
            annotations,
            source="annotations.json",
            videos=str(videos),
            subsets=(),
            transcode=SETTINGS.transcode,
            shard_seconds=1000.0,
        )
        return folder.fill(retry_failed=False)

    before = filled()
    assert sorted(encoded) == sorted(NAMES)
    filled()
    assert encoded == []
    make_video(videos / "short.mp4", 15)
    after = filled()
    assert encoded == ["short"]
    found = find_videos(str(tmp_path / "out"), NAMES)
    assert found.durations["short"] == pytest.approx(0.6)
    # features that were made of the shards before know it, too
    was = {v: entry.stamp for file in before.shards for v, entry in file.videos.items()}
    assert found.replaced(was) == ["short"]
    assert found.replaced(found.stamped(NAMES)) == []
    assert after.totals.videos == len(NAMES)


def test_a_shard_that_cannot_be_written_leaves_the_old_one(
    collection: Collection, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / written.name
    path.write_bytes(written.read_bytes())

    def full(self: Any, table: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(collection.task(path))
    assert path.read_bytes() == written.read_bytes()
    assert not [other for other in tmp_path.iterdir() if storage.PARTIAL in other.name]


CRASH = """
import os, pickle, sys
from pathlib import Path
from pipelines.data import shard_writing

original = shard_writing.transcode

def transcode(reader, config):
    if "rotated" in reader.name:
        os._exit(9)
    return original(reader, config)

shard_writing.transcode = transcode
shard_writing.write_shard(pickle.loads(Path(sys.argv[1]).read_bytes()))
"""


@pytest.mark.slow
def test_a_video_that_ends_the_process_is_given_up(
    collection: Collection, written: Path, tmp_path: Path
) -> None:
    path = tmp_path / FOLDER / written.name
    (tmp_path / "task").write_bytes(pickle.dumps(collection.task(path)))
    codes = [
        subprocess.run(
            [sys.executable, "-c", CRASH, str(tmp_path / "task")], timeout=120, check=False
        ).returncode
        for _ in range(3)
    ]
    assert codes == [9, 9, 0]
    contents = Shard(str(path)).contents
    assert list(contents.videos) == ["plain", "short", "uneven"]
    assert "ended the process" in contents.failures["rotated"]
    # what is left of the crashes goes when a run starts, and with it the count
    assert [p for p in path.parent.iterdir() if storage.PARTIAL in p.name]
    SHARDS.remove_leftovers(str(tmp_path))
    assert [p.name for p in path.parent.iterdir()] == [written.name]


def test_damaged_sources_and_shards_are_errors_of_the_windows(
    collection: Collection, written: Path, tmp_path: Path
) -> None:
    video = make_video(tmp_path / "plain.mkv", 150, gop=10)
    content = bytearray(video.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2500] = bytes(2500)
    video.write_bytes(content)
    path = tmp_path / written.name
    sources = {**collection.sources, "plain": str(video)}
    entry = write_shard(collection.task(path, sources=sources)).videos["plain"]
    assert 0 < entry.damaged < 2
    source = open_video(video_uri(str(path), "plain"))
    assert numbers(shown(source, 0.1, 5.9)).tolist() == [2, 147]
    times = [number / 50 for number in range(300)]
    hurt = []
    for time in times:
        try:
            shown(source, time)
        except FrameError:
            hurt.append(time)
    with pytest.raises(FrameError, match="its source is damaged there"):
        shown(source, hurt[0])
    assert len(hurt) == pytest.approx(entry.damaged * 50, abs=2)
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 3] = bytes(len(data) // 3 - 4)
    path.write_bytes(data)
    reading._opened.cache_clear()
    row = {"index": 0, "uri": video_uri(str(path), "plain"), "window": window("plain", 0.2, 9)}
    assert decode_sample(row, size=32)["error"]
    path.write_bytes(data[:1000])
    reading._opened.cache_clear()
    assert "does not have the format" in decode_sample(row, size=32)["error"]


@given(
    durations=st.lists(st.floats(0.1, 5000.0), min_size=1, max_size=30),
    seconds=st.floats(1.0, 4000.0),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_videos_are_packed_alike_in_whatever_order(
    durations: list[float], seconds: float, seed: int
) -> None:
    videos = [
        VideoAnnotation(video_id=f"v{number:02d}", subset="training", duration=duration)
        for number, duration in enumerate(durations)
    ]
    packed = pack(videos, seconds)
    shuffled = [videos[i] for i in np.random.default_rng(seed).permutation(len(videos))]
    assert pack(shuffled, seconds) == packed
    assert [video for held in packed.values() for video in held] == videos
    assert list(packed) == [f"part-{number:05d}.parquet" for number in range(len(packed))]
    shards = list(packed.values())
    for shard, following in pairwise(shards):
        total = sum(video.duration for video in shard)
        assert total <= seconds or len(shard) == 1
        assert total + following[0].duration > seconds


def test_other_settings_are_named() -> None:
    wanted = SETTINGS.described()
    SHARDS.require_equal("there", wanted, json.loads(json.dumps(wanted)))
    changed = replace(SETTINGS, transcode=replace(SETTINGS.transcode, size=128, gop=8))
    with pytest.raises(UserError, match=r"size: None there, 128 asked for; gop: 32 there, 8"):
        SHARDS.require_equal("there", changed.described(), wanted)
    # a number is the same however it is written
    whole = replace(SETTINGS, transcode=TranscodeConfig(fps=10, piece_seconds=60))
    other = replace(SETTINGS, transcode=TranscodeConfig(fps=10.0, piece_seconds=60.0))
    assert json.dumps(whole.described()) == json.dumps(other.described())


def manifest_of(folder: Path, *, expected: int = 1) -> Manifest:
    manifest = make_manifest(
        SETTINGS.described(),
        SHARDS.read(str(folder), SETTINGS.described()),
        storage.file_sizes(str(folder / FOLDER)),
        expected=expected,
        annotations="a.json",
        videos="videos",
    )
    SHARDS.write_description(str(folder), manifest)
    return manifest


def test_the_manifest_sums_up_the_shards_and_can_be_made_from_them(
    collection: Collection, written: Path
) -> None:
    folder = written.parents[1]
    manifest = manifest_of(folder)
    assert read_manifest(str(folder)) == manifest
    rows = pq.read_table(written).to_pylist()
    totals = manifest.totals
    assert (totals.shards, totals.videos, totals.failed) == (1, 4, 0)
    assert totals.rows == len(rows)
    assert totals.frames == sum(row["frames"] for row in rows)
    assert totals.bytes == written.stat().st_size
    assert totals.seconds == pytest.approx(sum(row["end"] - row["start"] for row in rows))
    assert totals.source_bytes == sum(Path(p).stat().st_size for p in collection.sources.values())
    document = json.loads((folder / NAME).read_text())
    assert document["state"] == "complete"
    assert document["settings"]["quality"] == 10
    assert document["settings"]["annotations"] == "f" * 64
    assert set(document["software"]) == {"re2tal", "av", "libavcodec"}


def test_other_files_of_that_name_are_left_alone(tmp_path: Path) -> None:
    assert read_manifest(str(tmp_path)) is None
    (tmp_path / NAME).write_text('{"name": "an app"}')
    assert read_manifest(str(tmp_path)) is None
    for damaged in (b'{"format": "re2tal shards 1", "state": "half"}', b"", b"\0" * 4096):
        (tmp_path / NAME).write_bytes(damaged)
        with pytest.raises(UserError, match=r"manifest.json does not have the .* prepare.py"):
            read_manifest(str(tmp_path))


def test_what_is_missing_is_said_before_a_run(collection: Collection, tmp_path: Path) -> None:
    path = tmp_path / FOLDER / "part-00000.parquet"
    write_shard(broken(collection, tmp_path).task(path))
    options: dict[str, Any] = {"fingerprint": "f" * 64, "size": 64, "fps": 12.0}
    manifest = manifest_of(tmp_path)
    found = find_videos(str(tmp_path), ["short", "plain", "other"], **options)
    assert found.uris == {"short": f"{path}#short"}
    assert found.durations == {"short": pytest.approx(0.4)}
    assert "cannot be opened" in found.failures["plain"]
    assert "no shard" in found.failures["other"]
    assert found.remarks == ()
    small = replace(manifest, settings={**manifest.settings, "size": 32, "fps": 5.0})
    SHARDS.write_description(str(tmp_path), small)
    remarks = find_videos(str(tmp_path), [], **{**options, "fingerprint": "other"}).remarks
    assert len(remarks) == 3
    assert "32 pixels and are enlarged to 64" in remarks[1]
    manifest_of(tmp_path, expected=3)
    with pytest.raises(UserError, match="not complete: 1 of 3 shards"):
        find_videos(str(tmp_path), [], **options)
    manifest_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"1 of 1 shard .* part-00000"):
        find_videos(str(tmp_path), [], **options)


def test_a_shard_s_names_are_the_same_in_every_normal_form(
    collection: Collection, tmp_path: Path
) -> None:
    one, several = normalize("NFC", "caf\u00e9"), normalize("NFD", "caf\u00e9")
    path = tmp_path / FOLDER / "part-00000.parquet"
    short = next(video for video in collection.videos if video.video_id == "short")
    task = collection.task(
        path,
        videos=(replace(short, video_id=several), replace(short, video_id="gone\u0301")),
        sources={several: collection.sources["short"]},
        missing={"gone\u0301": "was deleted"},
    )
    write_shard(task)
    manifest_of(tmp_path)
    found = find_videos(str(tmp_path), [one, "gon\u00e9"])
    assert found.uris == {one: f"{path}#{several}"}
    assert found.durations == {one: pytest.approx(0.4)}
    assert found.failures == {"gon\u00e9": "was deleted"}


@pytest.mark.parametrize("kind", ["file://", "memory://"])
def test_any_file_system_will_do(
    collection: Collection,
    written: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory, resolve = pafs._MockFileSystem(), storage.resolve

    def resolved(uri: str) -> tuple[pafs.FileSystem, str]:
        return (memory, uri[len(kind) :]) if uri.startswith("memory://") else resolve(uri)

    monkeypatch.setattr(storage, "resolve", resolved)
    root = f"{kind}{tmp_path}/out" if kind == "file://" else f"{kind}bucket/out"
    uri = f"{root}/{FOLDER}/{written.name}"
    sources = {}
    for name, path in collection.sources.items():
        sources[name] = f"{root}/videos/{name}.mp4"
        with storage.replacing(sources[name]) as stream:
            stream.write(Path(path).read_bytes())
    contents = write_shard(collection.task(uri, sources=sources))
    assert not contents.failures
    assert SHARDS.read(root, SETTINGS.described()) == {written.name: contents}
    source = open_video(video_uri(uri, "plain"))
    assert isinstance(source, Pieces)
    assert numbers(shown(source, 0.1, 3.9)).tolist() == [2, 97]
    SHARDS.write_description(
        root,
        make_manifest(
            SETTINGS.described(),
            {written.name: contents},
            storage.file_sizes(f"{root}/{FOLDER}"),
            expected=1,
            annotations="a",
            videos="v",
        ),
    )
    found = find_videos(root, NAMES, fingerprint="f" * 64, size=32)
    assert found.uris["plain"] == f"{uri}#plain"
    write_shard(collection.task(uri, sources=sources, kept=True))
    assert storage.read_bytes(uri)[:4] == b"PAR1"
    assert list(storage.file_sizes(f"{root}/{FOLDER}")) == [written.name]
