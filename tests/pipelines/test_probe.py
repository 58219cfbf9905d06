"""Script that opens a collection of videos in parallel and writes a Parquet table."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.data.videos import (
    SCHEMA,
    find_videos,
    probe_files,
    probe_files_here,
    summary,
)
from pipelines.probe import ProbeConfig, parse, probe_collection
from re2tal.errors import UserError
from tests.videos.made_videos import make_video


@pytest.fixture
def collection(tiny_set: Path, tmp_path: Path) -> Path:
    """Tiny set with a text and an empty file among the videos, one missing, and other files."""
    shutil.copytree(tiny_set, tmp_path / "set")
    videos = tmp_path / "set" / "videos"
    (videos / "toy_000.mp4").unlink()
    (videos / "toy_001.mp4").write_text("this is no video")
    (videos / "toy_002.mp4").write_bytes(b"")
    (videos / "notes.txt").write_text("not one either")
    return tmp_path / "set"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_every_file_is_a_row_with_facts_or_a_reason(collection: Path, tmp_path: Path) -> None:
    output = tmp_path / "tables" / "videos.parquet"
    config = ProbeConfig(videos=str(collection / "videos"), output=str(output))
    table = probe_collection(config)
    assert pq.read_table(output).equals(table)
    assert table.schema.equals(SCHEMA)
    rows = {row["video_id"]: row for row in table.to_pylist()}
    assert list(rows) == ["toy_001", "toy_002", "toy_003", "toy_004"]
    assert "toy_001.mp4: cannot be opened" in rows["toy_001"]["error"]
    assert "empty (zero bytes)" in rows["toy_002"]["error"]
    assert rows["toy_001"]["codec"] is rows["toy_001"]["duration"] is None
    good = rows["toy_003"]
    path = collection / "videos" / "toy_003.mp4"
    assert good["uri"] == str(path)
    assert good["bytes"] == path.stat().st_size
    assert (good["codec"], good["rotation"], good["problems"], good["error"]) == ("h264", 0, [], "")
    assert good["frames"] == pytest.approx(good["duration"] * good["fps"], abs=1)
    lines = "\n".join(summary(table))
    assert re.search(r"2 of 4 videos can be used: 0\.0\d hours, [\d.]+ MB", lines)
    assert "h264 (2)" in lines
    assert "2 videos cannot be used:" in lines


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_annotations_that_disagree_with_the_files_are_flagged(
    collection: Path, tmp_path: Path
) -> None:
    path = collection / "annotations.json"
    content = json.loads(path.read_text())
    content["database"]["toy_003"]["duration"] += 100
    path.write_text(json.dumps(content))
    config = ProbeConfig(
        videos=str(collection / "videos"),
        annotations=str(path),
        output=str(tmp_path / "videos.parquet"),
    )
    table = probe_collection(config)
    rows = {row["video_id"]: row for row in table.to_pylist()}
    assert list(rows) == [f"toy_00{i}" for i in range(5)]
    assert "there is no file" in rows["toy_000"]["error"]
    assert "its annotation says" in rows["toy_003"]["disagrees"]
    assert rows["toy_004"]["disagrees"] == ""
    assert "1 videos disagree with their annotations:" in "\n".join(summary(table))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_what_is_odd_about_a_file_is_a_list_of_sentences(tiny_set: Path, tmp_path: Path) -> None:
    whole = (tiny_set / "videos" / "toy_000.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    told: list[tuple[int, int]] = []
    table = probe_files({"cut": str(path)}, progress=lambda *numbers: told.append(numbers))
    (row,) = table.to_pylist()
    assert row["problems"] or row["error"]
    assert told == [(1, 1)]


def test_no_file_is_left_out_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a.MP4", "a.mkv", "b.Ts", "c.h264", "d.AVI"):
        made = make_video(tmp_path / name.lower(), 5)
        (videos / name).write_bytes(made.read_bytes())
    (videos / "notes.txt").write_text("not one")
    # the same without Ray
    monkeypatch.setattr("pipelines.probe.probe_files", lambda files, **_: probe_files_here(files))
    table = probe_collection(ProbeConfig(videos=str(videos), output=str(tmp_path / "t.parquet")))
    rows = {row["video_id"]: row for row in table.to_pylist()}
    assert {name: row["error"] for name, row in rows.items()} == dict.fromkeys("abcd", "")
    assert rows["a"]["uri"].endswith("a.MP4")
    told = capsys.readouterr().out
    assert "2 files are passed over:" in told
    assert "  a.mkv: a.MP4 has the same name and comes first" in told
    assert "  notes.txt: does not have a video's extension" in told
    # extract_features.py finds the same
    found = find_videos(str(videos), None)
    assert set(found.uris) == set("abcd")
    assert any("a.mkv" in remark for remark in found.remarks)


def test_no_files_are_an_empty_table_and_no_folder_is_an_error(tmp_path: Path) -> None:
    assert probe_files({}).schema.equals(SCHEMA)
    with pytest.raises(UserError, match="Say where with --videos"):
        probe_collection(ProbeConfig())
    with pytest.raises(UserError, match="holds none of them"):
        probe_collection(ProbeConfig(videos=str(tmp_path)))


def test_the_command_line_is_read() -> None:
    config = parse(["--videos", "v", "--annotations", "a.json", "--dataset", "thumos-14"])
    assert (config.videos, config.annotations, config.dataset) == ("v", "a.json", "thumos-14")
