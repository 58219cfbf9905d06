"""Folders of Parquet files in the format of earlier versions are read and continued."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.features import Features
from pipelines.data.shard_writing import ShardTask, write_shard
from pipelines.data.shards import SCHEMA, SHARDS, ShardSettings, open_video, video_uri
from pipelines.data.store import Attempts
from pipelines.data.videos import find_videos, opened, probe_files_here
from re2tal.annotations import VideoAnnotation
from re2tal.errors import UserError
from re2tal.videos.pieces import decode_source
from re2tal.videos.transcoding import TranscodeConfig
from tests.pipelines.test_features_files import IDS, PARQUET, folder_at, made
from tests.videos.made_videos import make_video, numbers

# what version 0.1 wrote into the footer of part-00001.parquet of `IDS`
FOOTER = {
    "settings": {
        "way": "clips",
        "fps": 10.0,
        "frames": 16,
        "stride": 4,
        "backbone": "b",
        "feature_type": "float32",
        "videos": "dbbc47f2a90b02153a78630eb0341612800f530bd3ae6dda5504e60ffbc64018",
        "videos_per_file": 2,
    },
    "videos": {
        "c": {
            "file": "features/part-00001.parquet",
            "row": 0,
            "length": 12,
            "fps": 10.0,
            "stride": 4,
            "offset": 0.6,
            "duration": 6.0,
        }
    },
    "failures": {"d": "no video"},
}


def write(path: Path, rows: list[pa.Table], footer: dict[str, Any], **options: Any) -> None:
    """Write a row group for each row, and the file's content as JSON under "re2tal"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(
        path, rows[0].schema, compression="none", write_statistics=False, **options
    ) as writer:
        for row in rows:
            writer.write_table(row)
        writer.add_key_value_metadata({"re2tal": json.dumps(footer, separators=(",", ":"))})


def footer_of(path: Path) -> Any:
    """Read the content that a file's footer lists."""
    return json.loads(pq.read_metadata(path).metadata[b"re2tal"])


def test_a_folder_of_features_in_the_old_layout_is_gone_on_with(tmp_path: Path) -> None:
    features = made("c").features
    types = {
        "video_id": pa.string(), "subset": pa.string(), "length": pa.int32(),
        "channels": pa.int32(), "fps": pa.float64(), "stride": pa.int32(),
        "offset": pa.float64(), "duration": pa.float64(), "source": pa.string(),
        "features": pa.large_list(pa.float32()),
    }  # fmt: skip
    values = [
        "c", "training", 12, 3, 10.0, 4, 0.6, 6.0, "/c.mp4", features.reshape(-1).tolist()
    ]  # fmt: skip
    row = pa.table(
        {name: pa.array([v], types[name]) for name, v in zip(types, values, strict=True)},
        schema=pa.schema(list(types.items())),
    )
    path = tmp_path / "features" / "part-00001.parquet"
    write(path, [row], FOOTER, use_dictionary=["subset"])
    old = path.read_bytes()
    folder = folder_at(tmp_path, PARQUET)
    left = folder.begin(retry_failed=False)
    assert left == ["a", "b", "e"]
    for video_id in left:
        folder.add(video_id, made(video_id))
    folder.write_description()
    assert path.read_bytes() == old
    found = Features(str(tmp_path))
    assert np.array_equal(found.read("c", duration=6.0)[0], features)
    assert found.missing(IDS) == {"d": "no video"}
    # and what is written today differs only in the signs by which the video's file is known
    anew = folder_at(tmp_path / "anew", PARQUET)
    anew.begin(retry_failed=False)
    anew.fail("d", "no video")
    anew.add("c", made("c"))
    today = tmp_path / "anew" / "features" / path.name
    assert pq.read_table(today).equals(pq.read_table(path))
    contents = footer_of(today)
    assert contents["videos"]["c"].pop("source") is None
    assert contents == FOOTER
    # a retried video goes into the old file, beside what was there
    again = folder_at(tmp_path, PARQUET)
    assert again.begin(retry_failed=True) == ["d"]
    again.add("d", made("d"))
    again.write_description()
    assert np.array_equal(Features(str(tmp_path)).read("c", duration=6.0)[0], features)
    assert not Features(str(tmp_path)).missing(IDS)


SETTINGS = ShardSettings(
    fingerprint="f" * 64,
    subsets=("training",),
    transcode=TranscodeConfig(size=None, quality=10, piece_seconds=1.5),
)


@pytest.fixture
def shard(tmp_path: Path) -> tuple[ShardTask, Path]:
    """Task of writing a shard, and the path of the written file."""
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "v.mp4", 60)
    path = tmp_path / "out" / "shards" / "part-00000.parquet"
    videos = tuple(
        VideoAnnotation(video_id=name, subset="training", duration=2.4) for name in ("gone", "v")
    )
    task = ShardTask(
        uri=str(path),
        settings=SETTINGS,
        videos=videos,
        sources={"v": str(tmp_path / "videos" / "v.mp4")},
        missing={"gone": "there is no file"},
    )
    write_shard(task)
    return task, path


def test_a_shard_in_the_old_layout_is_read_and_mended(shard: tuple[ShardTask, Path]) -> None:
    task, path = shard
    table = pq.read_table(path)
    pieces = table["video"].to_pylist()
    footer = {
        "settings": {
            "format": "re2tal shards 1",
            "annotations": "f" * 64,
            "subsets": ["training"],
            "size": None,
            "fps": None,
            "quality": 10,
            "gop": 32,
            "piece_seconds": 1.5,
            "shard_seconds": 900.0,
        },
        "videos": {
            "v": {
                "first_row": 0,
                "starts": [0.0, 1.5],
                "end": 2.4,
                "damaged": 0.0,
                "frames": sum(table["frames"].to_pylist()),
                "width": 96,
                "height": 64,
                "source": [96, 64],
                "bytes": sum(map(len, pieces)),
                "source_bytes": Path(task.sources["v"]).stat().st_size,
            }
        },
        "failures": {"gone": "there is no file"},
    }
    old = path.with_name("old.parquet")
    rows = [pa.Table.from_pylist([row], schema=SCHEMA) for row in table.to_pylist()]
    write(old, rows, footer, use_dictionary=False)
    assert pq.read_table(old).equals(table)
    today = footer_of(path)
    assert len(today["videos"]["v"].pop("source_head")) > 8  # of the video's file, since then
    assert today == footer
    source = open_video(video_uri(str(old), "v"))
    assert numbers(decode_source(source, np.array([0.1, 2.3]), size=None)).tolist() == [2, 57]
    kept = write_shard(replace(task, uri=str(old), missing={"gone": "is lost"}, kept=True))
    assert kept.failures == {"gone": "is lost"}
    assert list(kept.videos) == ["v"]


def test_videos_are_found_as_files_or_in_shards(shard: tuple[ShardTask, Path]) -> None:
    task, path = shard
    folder, files = path.parents[1], path.parents[2] / "videos"
    (files / "notes.txt").touch()
    (files / "bad.mp4").write_text("this is no video")
    found = find_videos(str(files), None)
    assert found.uris == {"bad": str(files / "bad.mp4"), "v": task.sources["v"]}
    assert not found.durations
    probed = opened(found, probe_files_here)
    assert probed.uris == {"v": task.sources["v"]}
    assert (probed.durations["v"], probed.rates["v"]) == pytest.approx((2.4, 25.0))
    assert "cannot be opened" in probed.failures["bad"]
    with pytest.raises(UserError, match=r"holds none of them. Correct --videos"):
        find_videos(str(folder), None)
    manifest = {
        "format": "re2tal shards 1", "state": "complete", "settings": SETTINGS.described(),
        "annotations": "a", "videos": "v", "software": {}, "expected_shards": 1,
        "totals": {
            "shards": 1, "videos": 1, "failed": 1, "rows": 2, "seconds": 2.4,
            "damaged_seconds": 0.0, "frames": 61, "bytes": path.stat().st_size, "source_bytes": 1,
        },
        "failures": {"gone": "there is no file"},
        "shards": [{
            "name": path.name, "bytes": path.stat().st_size, "rows": 2,
            "videos": footer_of(path)["videos"],
        }],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = find_videos(str(folder), None)
    assert found.uris == {"v": f"{path}#v"}
    assert opened(found, probe_files_here) is found  # nothing is opened
    assert found.rates["v"] == pytest.approx(25.0, rel=0.02)
    found = find_videos(str(folder), ["gone", "other"])
    assert found.failures["gone"] == "there is no file"
    assert "no shard" in found.failures["other"]
    manifest["state"] = "incomplete"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"not complete: 1 of 1 shards are there. Run the"):
        find_videos(str(folder), None)


def test_a_video_is_given_up_after_two_crashes(tmp_path: Path) -> None:
    uri = str(tmp_path / "part")
    assert [Attempts(uri).begin("a") for _ in range(2)] == ["", ""]
    again = Attempts(uri)
    assert "2 times" in again.begin("a")
    assert not again.begin("b")
    again.end("a")
    assert json.loads((tmp_path / "part.attempts").read_text()) == {"a": 3, "b": 1}
    again.clear()
    assert not list(tmp_path.iterdir())


def test_too_many_failures_are_listed() -> None:
    failures = {f"v{number:02d}": "is damaged" for number in range(23)}
    SHARDS.check_failures(failures, 46, 0.5, problem="fail")
    with pytest.raises(UserError, match=r"(?s)^23 of 40 videos fail, .*50%.*v19: is d") as caught:
        SHARDS.check_failures(failures, 40, 0.5, problem="fail")
    assert str(caught.value).endswith("\n  ... and 3 more, in manifest.json")
