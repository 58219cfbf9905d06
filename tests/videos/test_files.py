from pathlib import Path
from typing import Literal
from unicodedata import normalize

import pytest

from re2tal.annotations import Annotations, VideoAnnotation, as_named
from re2tal.videos.files import find_videos, list_videos, match_videos

Form = Literal["NFC", "NFD"]


def annotated(*video_ids: str) -> Annotations:
    return Annotations(
        classes=("run",),
        videos=tuple(VideoAnnotation(video_id=i, subset="t", duration=1.0) for i in video_ids),
    )


def test_finds_every_kind_of_name(tmp_path: Path) -> None:
    names = ["a.mp4", "b.mkv", "c.webm", "d.avi", "e.mov", "v_f.mp4", "g.MP4", "h.x.mp4", "v_i.mp4"]
    for name in [*names, "j.txt", "unrelated.mp4"]:
        (tmp_path / name).touch()
    found, missing = find_videos(annotated(*"abcdefg", "h.x", "v_i", "j", "k"), tmp_path)
    assert {i: path.name for i, path in found.items()} == dict(
        zip([*"abcdefg", "h.x", "v_i"], names, strict=True)
    )
    assert all(path.is_absolute() for path in found.values())
    assert set(missing) == {"j", "k"}
    assert missing["k"] == "there is no file k with a video's extension"


def test_the_order_of_preference(tmp_path: Path) -> None:
    for name in ("a.webm", "v_a.mp4", "a.mkv", "b.mkv", "b.mp4"):
        (tmp_path / name).touch()
    found, _ = find_videos(annotated("a", "b"), tmp_path)
    assert {i: path.name for i, path in found.items()} == {"a": "a.mkv", "b": "b.mp4"}


@pytest.mark.parametrize("video_id", ["../secret", "sub/secret", "..", "/etc/passwd", "a\0b", ""])
def test_an_id_never_leads_out_of_the_folder(tmp_path: Path, video_id: str) -> None:
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.mp4").touch()
    (folder / "sub" / "secret.mp4").touch()
    found, missing = find_videos(annotated(video_id), folder)
    assert not found
    assert set(missing) == {video_id}


def test_links_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (tmp_path / "outside.mp4").touch()
    (folder / "real.mp4").touch()
    (folder / "in.mp4").symlink_to("real.mp4")
    (folder / "out.mp4").symlink_to(tmp_path / "outside.mp4")
    (folder / "dangling.mp4").symlink_to(folder / "nothing")
    (folder / "folder.mp4").mkdir()
    found, missing = find_videos(annotated("in", "out", "dangling", "folder"), folder)
    assert found == {"in": (folder / "real.mp4").resolve()}
    assert "outside the video folder" in missing["out"]
    assert "leads nowhere" in missing["dangling"]
    assert "not a file" in missing["folder"]


def test_a_folder_that_is_itself_a_link_is_fine(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.mp4").touch()
    (tmp_path / "videos").symlink_to("disk")
    found, _ = find_videos(annotated("a"), tmp_path / "videos")
    assert found["a"].name == "a.mp4"


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_videos(annotated("a"), tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        find_videos(annotated("a"), tmp_path / "file")


def test_files_may_be_anything_that_has_a_name() -> None:
    files = {"v_a.MKV": "s3://bucket/v_a.MKV", "b.txt": "s3://bucket/b.txt"}
    found, missing = match_videos(["a", "b"], files)
    assert found == {"a": "s3://bucket/v_a.MKV"}
    assert set(missing) == {"b"}


def test_all_videos_of_a_folder_and_what_is_passed_over() -> None:
    names = ["a.mkv", "a.MP4", "b.Ts", "c.h264", "d.x.WMV", "e.m4v", "notes.txt", "f", "g.mp4.part"]
    found, passed = list_videos({name: f"s3://{name}" for name in names})
    assert found == {
        "a": "s3://a.MP4",
        "b": "s3://b.Ts",
        "c": "s3://c.h264",
        "d.x": "s3://d.x.WMV",
        "e": "s3://e.m4v",
    }
    assert passed["a.mkv"] == "a.MP4 has the same name and comes first"
    assert {name for name, why in passed.items() if why == "does not have a video's extension"} == {
        "notes.txt",
        "f",
        "g.mp4.part",
    }


@pytest.mark.parametrize("word", ["caf\u00e9", "\uc885\uc774\uc811\uae30", "\u304c"])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_the_same_in_every_normal_form(word: str, forms: tuple[Form, Form]) -> None:
    known, named = (normalize(form, word) for form in forms)
    assert known != named
    found, missing = match_videos([known], {f"{named}.mp4": "x", "other.mp4": "y"})
    assert (found, missing) == ({known: "x"}, {})
    assert match_videos([known], {f"v_{named}.mp4": "x"})[0] == {known: "x"}
    found, passed = list_videos({f"{named}.mkv": "x", f"{known}.mp4": "y"})
    assert (list(found.values()), list(passed)) == (["y"], [f"{named}.mkv"])
    assert as_named({named: 1, "b": 2}, [known, "c"]) == {known: 1, "b": 2}
    both = as_named({named: 1, known: 2}, [known])
    assert both[known] == 2  # the very name goes first
