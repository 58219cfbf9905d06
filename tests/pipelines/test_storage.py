"""Paths and URIs: the same answers for both, and one sentence if something is missing."""

import errno
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.core.storage import (
    crc32,
    file_sizes,
    folders_in,
    list_files,
    local_copy,
    open_source,
    read_bytes,
    remove,
    remove_folder,
    replaced_files,
    replacing,
    require,
    require_room,
    sizes_below,
    stamps_of,
    writing_to,
)
from re2tal.errors import UserError


def test_a_missing_path_is_one_sentence_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"The videos: nothing at .*nowhere. Correct --data.videos"
    ) as caught:
        require(str(tmp_path / "nowhere"), what="The videos", option="--data.videos")
    assert "\n" not in str(caught.value)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # a read of it would wait for ever
    for place in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match=r"It: \S+ is no regular file, .* Correct --it"):
            require(str(place), what="It", option="--it")
        with pytest.raises(OSError, match="is no regular file"):
            read_bytes(str(place))


def test_a_path_that_was_not_given_names_the_option() -> None:
    with pytest.raises(UserError, match=r"no path given. Say where with --model.weights"):
        require(None, what="The weights", option="--model.weights")


def test_a_uri_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        require("gopher://host/videos", what="The videos", option="--data.videos")


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert require("a.json", what="It", option="--it") == str(tmp_path / "a.json")


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_listing_and_copying_work_alike_for_paths_and_uris(tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.mp4", "a.mp4"):
        (folder / name).write_text(name)
    files = list_files(f"{prefix}{folder}")
    assert list(files) == ["a.mp4", "b.mp4"]
    copied = local_copy(files["a.mp4"], tmp_path)
    assert copied.read_text() == "a.mp4"


def _write_half(uri: str) -> None:
    with replacing(uri) as stream:
        stream.write(b"half")
        raise OSError("the store is full")


def test_an_object_store_holds_what_a_folder_does(remote: str, tmp_path: Path) -> None:
    for folder in (remote, str(tmp_path / "made")):
        assert sizes_below(folder) == {}
        with replacing(f"{folder}/run/a.bin") as stream:
            stream.write(b"first")
        with pytest.raises(OSError, match="full"):
            _write_half(f"{folder}/run/a.bin")
        with replacing(f"{folder}/run/in/b.bin") as stream:
            stream.write(b"2")
        assert read_bytes(f"{folder}/run/a.bin") == b"first"
        assert sizes_below(folder) == {"run/a.bin": 5, "run/in/b.bin": 1}
        assert file_sizes(f"{folder}/run") == {"a.bin": 5}
        remove(f"{folder}/run/a.bin")
        assert sizes_below(folder) == {"run/in/b.bin": 1}


def test_remote_sources_are_seekable_files(tmp_path: Path) -> None:
    path = tmp_path / "v.bin"
    path.write_bytes(b"0123456789")
    assert open_source(str(path)) == str(path)
    source = open_source(f"file://{path}")
    assert not isinstance(source, str)
    source.seek(4)
    assert source.read(2) == b"45"


@pytest.mark.parametrize("uri", [False, True])
@pytest.mark.parametrize("dated", [True, False])
def test_a_file_that_was_replaced_is_known(tmp_path: Path, uri: bool, dated: bool) -> None:
    names = ["same", "touched", "copied", "longer", "other", "gone"]
    for name in names:
        (tmp_path / name).write_bytes(b"content of " + name.encode())
    places = {n: (tmp_path / n).as_uri() if uri else str(tmp_path / n) for n in names}
    stamps = stamps_of({**places, "nowhere": str(tmp_path / "nowhere")})
    assert stamps.keys() == set(names)
    if not dated:
        stamps = {name: stamp.undated for name, stamp in stamps.items()}
    assert replaced_files(places, stamps) == []
    os.utime(tmp_path / "touched", (1.0, 1.0))
    copied = (tmp_path / "copied").read_bytes()
    (tmp_path / "copied").unlink()
    (tmp_path / "copied").write_bytes(copied)
    (tmp_path / "longer").write_bytes(b"content of longer, and more")
    (tmp_path / "other").write_bytes(b"CONTENT of other")
    os.utime(tmp_path / "other", (2.0, 2.0))
    (tmp_path / "gone").unlink()
    assert replaced_files(places, stamps) == ["longer", "other"]
    assert replaced_files({"longer": places["longer"]}, stamps) == ["longer"]


@pytest.mark.parametrize("kind", ["folder", "object store"])
def test_folders_are_listed_digested_and_removed_alike(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place = str(tmp_path) if kind == "folder" else request.getfixturevalue("remote")
    assert folders_in(f"{place}/nowhere") == []
    for name in ("b/one", "b/deep/two", "a/one", "file"):
        with replacing(f"{place}/{name}") as stream:
            stream.write(name.encode() * 2**18)
    assert folders_in(place) == ["a", "b"]
    assert crc32(f"{place}/b/one") == f"{zlib.crc32(b'b/one' * 2**18):08x}"
    remove_folder(f"{place}/b")
    assert sizes_below(place) == {"a/one": 5 * 2**18, "file": 4 * 2**18}


def test_room_is_asked_for_where_a_folder_will_be(
    tmp_path: Path, disk: Callable[[int], None]
) -> None:
    folder = str(tmp_path / "to" / "come")
    require_room(folder, 2**20, what="a file")
    require_room("s3://bucket/runs", 2**60, what="a file")
    disk(40 * 2**20)
    require_room(folder, 8 * 2**20, what="a file")
    with pytest.raises(UserError, match=r"no room for a file: 41 MiB are needed in .*/to/come, 40"):
        require_room(folder, 9 * 2**20, what="a file")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_than_of_the_disk_pass_through(tmp_path: Path) -> None:
    for error in (ConnectionResetError("reset"), FileNotFoundError(errno.ENOENT, "gone")):
        with pytest.raises(type(error)), writing_to(str(tmp_path), what="a file"):
            raise error
