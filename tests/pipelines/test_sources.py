"""Videos by file, folder, pattern and URI."""

from pathlib import Path

import pytest

from pipelines.data.videos import find_sources
from re2tal.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.MKV", "notes.txt", "deep/down/c.webm", "x[1].mp4", "raw"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def find(*places: object) -> dict[str, str]:
    return find_sources([str(place) for place in places], option="--videos")


def test_a_folder_gives_its_videos_and_a_file_counts_whatever_its_ending(folder: Path) -> None:
    videos = {name: str(folder / f"{name}{end}") for name, end in (("a", ".mp4"), ("b", ".MKV"))}
    assert find(folder) == videos | {"x[1]": str(folder / "x[1].mp4")}
    assert find(folder / "raw") == {"raw": str(folder / "raw")}


def test_patterns_reach_down_and_a_name_may_hold_their_signs(folder: Path) -> None:
    assert list(find(folder / "**" / "*.webm", folder / "?.*")) == ["a", "b", "c"]
    assert list(find(folder / "x[1].mp4")) == ["x[1]"]
    assert list(find(folder / "a.mp4", folder / "a*")) == ["a"]  # twice the same


def test_uris_are_files_folders_or_patterns(folder: Path) -> None:
    uri = folder.as_uri()
    assert find(uri)["a"] == f"{uri}/a.mp4"
    assert find(f"{uri}/a.mp4") == find(f"{uri}/a*.mp4") == {"a": f"{uri}/a.mp4"}
    with pytest.raises(UserError, match="wildcard in the name of a folder"):
        find(f"{uri}/*/c.webm")


def test_relative_paths_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find("a.mp4") == find("a.*") == {"a": str(folder / "a.mp4")}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("gone.mp4", "nothing at .*gone.mp4. Correct --videos"),
        ("gone*.mp4", "matches no file"),
        ("deep", "holds no video"),
        ("nowhere://x/y", "cannot be reached"),
    ],
)
def test_a_place_without_a_video_is_named(place: str, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        find(place if "://" in place else folder / place)


def test_two_videos_of_one_name_and_none_at_all_are_refused(folder: Path) -> None:
    (folder / "deep" / "a.mp4").touch()
    with pytest.raises(UserError, match="have one name"):
        find(folder, folder / "deep")
    with pytest.raises(UserError, match="none given"):
        find()
