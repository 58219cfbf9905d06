"""Lists of trimmed videos, the clips cut from them, and the toy data set's trimmed split."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from re2tal.annotations import AnnotationError
from re2tal.datasets.toy import (
    FPS,
    FRAME_SIZE,
    POSES,
    TRIMMED_CLASSES,
    TrimmedToyConfig,
    make_clip,
    make_trimmed_toy,
)
from re2tal.datasets.trimmed import (
    ClipConfig,
    Entry,
    Place,
    TrimmedList,
    TrimmedVideo,
    ViewConfig,
    find_files,
    joint_classes,
    random_clip,
    read_classes,
    read_folders,
    read_list,
    views,
)
from re2tal.videos.decoding import decode
from re2tal.videos.windows import window_frames
from tests.videos.made_videos import make_video

KINETICS = """label,youtube_id,time_start,time_end,split
air drumming,-0xAbC_12,7,17,train
"high, jump",_b-9,100,110,train
archery,cc,0,10,validate
"""


def entry(video_id: str, label: str) -> Entry:
    return Entry(video_id=video_id, label=label, places=(Place(name=f"{video_id}.mp4"),))


def listing(*entries: Entry, source: str = "a list") -> TrimmedList:
    return TrimmedList(source=source, entries=entries)


def test_a_folder_names_the_class_of_the_videos_in_it() -> None:
    names = ["spin/b.mp4", "air drumming/c.d.MKV", "spin/README.txt", "spin/more/a.webm", "x.mp4"]
    found = read_folders("videos", names)
    assert [(e.video_id, e.label, e.places[0].name) for e in found.entries] == [
        ("air drumming/c.d", "air drumming", "air drumming/c.d.MKV"),
        ("spin/b", "spin", "spin/b.mp4"),
        ("spin/more/a", "spin", "spin/more/a.webm"),
    ]
    assert found.problems == ("x.mp4 is not in the folder of a class",)


def test_kinetics_own_csv_finds_trimmed_files_and_whole_videos() -> None:
    found = read_list("train.csv", KINETICS, split="train")
    assert [(e.video_id, e.label) for e in found.entries] == [
        ("-0xAbC_12_000007_000017", "air drumming"),
        ("_b-9_000100_000110", "high, jump"),
    ]
    assert not found.problems
    whole = "-0xAbC_12"
    for name, start, end in (
        (f"air drumming/{whole}_000007_000017.mp4", 0.0, None),
        (f"air_drumming/{whole}_000007_000017.mkv", 0.0, None),
        (f"{whole}_000007_000017.webm", 0.0, None),
        (f"{whole}.mp4", 7.0, 17.0),
    ):
        files, missing = find_files(found.entries, {name: f"/v/{name}", "other.mp4": "/v/o"})
        uri, place = files["-0xAbC_12_000007_000017"]
        assert (uri, place.start, place.end) == (f"/v/{name}", start, end)
        assert list(missing) == ["_b-9_000100_000110"]


@pytest.mark.parametrize(
    ("line", "video_id", "label", "start", "end"),
    [
        ("abseiling/x y.mp4 1", "abseiling/x y", "jump", 0.0, None),
        ("air drumming/a.mp4 0 1.5 4", "air drumming/a@1.5-4", "drum", 1.5, 4.0),
        ("a.mp4,jump", "a", "jump", 0.0, None),
        ("1 2 3/a.mp4\t1", "1 2 3/a", "jump", 0.0, None),
    ],
)
def test_lines_of_path_and_label(
    line: str, video_id: str, label: str, start: float, end: float | None
) -> None:
    (found,) = read_list("train.txt", f"\n{line}\n", classes=("drum", "jump")).entries
    assert (found.video_id, found.label) == (video_id, label)
    assert (found.places[0].start, found.places[0].end) == (start, end)


def test_a_csv_with_a_header_of_its_own() -> None:
    text = "start,path,label,end,split\n2,a b.mp4,high jump,5,train\n,c.mp4,spin,,val\n"
    first, second = read_list("list.csv", text).entries
    assert first.places == (Place(name="a b.mp4", start=2.0, end=5.0),)
    assert (first.label, second.label) == ("high jump", "spin")
    assert second.places == (Place(name="c.mp4"),)
    assert [e.label for e in read_list("list.csv", text, split="val").entries] == ["spin"]


def test_every_problem_of_both_lists_stands_in_one_error() -> None:
    text = (
        "path,label,start,end\nok.mp4,spin,,\n../up.mp4,spin,,\n/abs.mp4,spin,,\nno.mp4,,,\n"
        "r.mp4,spin,5,2\nn.mp4,spin,x,2\nnumber.mp4,3,,\nok.mp4,jump,,\n"
    )
    training = read_list("train.csv", text)
    validation = listing(entry("ok", "spin"), entry("v", "fly"), source="val.csv")
    with pytest.raises(AnnotationError) as caught:
        joint_classes(training, validation)
    for expected in (
        "train.csv: line 3: '../up.mp4' is not the path",
        "train.csv: line 4: '/abs.mp4' is not the path",
        "train.csv: line 5: has no label",
        "train.csv: line 6: the part from 5 to 2 s has no length",
        "train.csv: line 7: start is not a number of seconds: 'x'",
        "train.csv: line 8: the label 3 is a number",
        "train.csv: ok is listed 2 times",
        "val.csv: 'fly' is not among the 2 classes",
        "val.csv: ok is in the training list too",
    ):
        assert expected in str(caught.value)
    assert len(caught.value.problems) == 9


def test_labels_of_lists_that_are_one_name_are_a_problem() -> None:
    training = read_folders("train", ["Spin/a.mp4", "spin/b.mp4", "spin/c.mp4", "fly/d.mp4"])
    validation = listing(entry("v", "fly"), source="val.csv")
    with pytest.raises(AnnotationError) as caught:
        joint_classes(training, validation)
    (problem,) = caught.value.problems
    assert problem.startswith("train: the labels 'spin' (2 times), 'Spin' (1 times) differ only in")
    meant = joint_classes(training, validation, ("Spin", "fly", "spin"))
    assert meant == ("Spin", "fly", "spin")


@pytest.mark.parametrize(
    ("text", "split", "expected"),
    [
        ("", None, "has no video"),
        ("a.mp4 0\n", "train", "no column 'split'"),
        (KINETICS, "val", "no row has 'val'"),
        ("a.mp4\n", None, "line 1: has no label"),
        ("a.mp4 7\n", None, "label 7 is not one of 0 to 1"),
        ("label,youtube_id,time_start,time_end\ndrum,a/b,0,10\n", None, "'a/b' is not an id"),
        ("label,youtube_id,time_start,time_end\ndrum,ab,0,\n", None, "no time_end"),
    ],
)
def test_what_a_list_can_lack(text: str, split: str | None, expected: str) -> None:
    classes = ("drum", "jump")
    broken = read_list("l", text, classes=classes, split=split)
    with pytest.raises(AnnotationError, match=expected):
        joint_classes(broken, listing(entry("v", "drum")), classes)


def test_classes_are_those_given_or_those_trained_on() -> None:
    training, validation = (
        listing(entry("a", "spin"), entry("b", "fly")),
        listing(entry("c", "fly")),
    )
    assert joint_classes(training, validation) == ("fly", "spin")
    given = read_classes("classes.txt", "spin\nwalk on\n\nfly\n")
    assert joint_classes(training, validation, given) == ("spin", "walk on", "fly")
    assert joint_classes(training, replace(validation, entries=training.entries, root="other"))
    with pytest.raises(AnnotationError, match="both the training and the validation"):
        joint_classes(training, training)
    with pytest.raises(AnnotationError, match="'a' is listed more than once"):
        read_classes("classes.txt", "a\nb\na\n")
    with pytest.raises(AnnotationError, match="has no class names"):
        read_classes("classes.txt", "\n")


def test_a_file_is_found_by_its_name_or_with_another_ending() -> None:
    entries = [entry("d/a.b", "spin"), entry("e", "spin")]
    files = {"d/a.b.webm": "webm", "d/a.b.mkv": "mkv", "e.mp4.txt": "no"}
    found, missing = find_files(entries, files)
    assert found["d/a.b"][0] == "mkv"
    assert missing == {"e": "there is no file e.mp4"}
    assert find_files(entries, {**files, "d/a.b.mp4": "itself"})[0]["d/a.b"][0] == "itself"


VIDEO = TrimmedVideo(video_id="v", label=3, start=10.0, end=20.0)
CLIP = ClipConfig(frames=32, fps=16.0)


def test_random_clips_lie_inside_the_video_everywhere_and_follow_the_generator() -> None:
    def starts(seed: int) -> list[float]:
        random = np.random.default_rng(seed)
        clips = [random_clip(VIDEO, CLIP, stride=2, random=random) for _ in range(300)]
        assert all(clip.valid == 32 and clip.labels.tolist() == [3] for clip in clips)
        assert all(clip.segments.tolist() == [[-0.5, 15.5]] for clip in clips)
        return [clip.grid.offset for clip in clips]

    assert starts(1) == starts(1) != starts(2)
    assert min(starts(1)) >= 10.0
    assert max(starts(1)) <= 18.0
    assert np.mean(starts(1)) == pytest.approx(14.0, abs=0.4)
    assert np.ptp(starts(1)) > 7.5


def test_a_short_video_is_padded_and_draws_as_much_as_a_long_one() -> None:
    short = replace(VIDEO, start=1.0, end=2.0)
    random, other = np.random.default_rng(0), np.random.default_rng(0)
    clip = random_clip(short, CLIP, stride=2, random=random)
    assert (clip.grid.offset, clip.valid) == (1.0, 16)
    assert clip.segments.tolist() == [[-0.5, 7.5]]
    random_clip(VIDEO, CLIP, stride=2, random=other)
    assert random.uniform() == other.uniform()
    (only,) = views(short, CLIP, ViewConfig(clips=4), stride=2)
    assert (only.grid.offset, only.valid) == (1.0, 16)


def test_views_are_spread_evenly_over_time_and_space() -> None:
    found = list(views(VIDEO, CLIP, ViewConfig(clips=4, crops=3), stride=2))
    assert [view.grid.offset for view in found[::3]] == [11.0, 13.0, 15.0, 17.0]
    assert [view.place for view in found[:3]] == [0.0, 0.5, 1.0]
    (middle,) = views(VIDEO, CLIP, ViewConfig(), stride=2)
    assert (middle.grid.offset, middle.place) == (14.0, 0.5)
    assert [v.place for v in views(VIDEO, CLIP, ViewConfig(crops=2), stride=2)] == [0.0, 1.0]


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96)])
def test_a_crop_is_the_square_at_its_place(tmp_path: Path, width: int, height: int) -> None:
    path = make_video(tmp_path / "v.mp4", 30, width=width, height=height)
    video = replace(VIDEO, start=0.0, end=1.0)
    wanted = list(views(video, ClipConfig(frames=4, fps=8.0), ViewConfig(crops=3), stride=1))
    for view, first in zip(wanted, (0, 16, 32), strict=True):
        whole = decode(str(path), view.frame_times(), size=None)
        rows, columns = (
            (slice(first, first + 64), slice(None))
            if height > width
            else (slice(None), slice(first, first + 64))
        )
        assert np.array_equal(window_frames(str(path), view, size=64), whole[:, rows, columns])


def test_configurations_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="0 <= start < end"):
        replace(VIDEO, end=10.0)
    with pytest.raises(ValueError, match="frames must be at least 1"):
        ClipConfig(frames=0)
    with pytest.raises(ValueError, match="fps must be a positive"):
        ClipConfig(fps=0.0)
    with pytest.raises(ValueError, match="at least 1 clip and 1 crop"):
        ViewConfig(clips=0)


TOY = TrimmedToyConfig(training=8, validation=7, seconds=1.0, seed=3)


def clips_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.mp4")}


def test_the_toy_split_is_a_folder_for_each_class_and_is_made_once(tmp_path: Path) -> None:
    folder = make_trimmed_toy(tmp_path, TOY)
    made = clips_in(folder)
    names = {s: [n for n in made if n.startswith(s)] for s in ("training", "validation")}
    assert {len(v) for v in names.values()} == {8, 7}
    training, validation = (
        read_folders(s, [n.removeprefix(f"{s}/") for n in names[s]]) for s in names
    )
    assert joint_classes(training, validation) == TRIMMED_CLASSES
    assert made["training/spin/training_00004.mp4"] == make_clip("spin", 1.0, 3000004).content
    shown = make_clip("spin", 1.0, 3000004, held_out=True).content
    assert made["validation/spin/validation_00004.mp4"] == shown

    def refuse(function: object, items: Iterable[object]) -> Iterable[object]:
        raise AssertionError("it is there already")

    make_trimmed_toy(folder, TOY, parallel_map=refuse)
    smaller = replace(TOY, training=7)
    make_trimmed_toy(folder, smaller)
    assert clips_in(folder) == {n: c for n, c in made.items() if "training_00007" not in n}
    (folder / POSES).unlink()
    make_trimmed_toy(folder, smaller)
    assert (folder / POSES).is_file()


def test_the_poses_of_the_toy_split_are_its_actors(tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    folder = make_trimmed_toy(
        tmp_path,
        replace(TOY, training=2, validation=0),
        progress=lambda done, total: counts.append((done, total)),
    )
    assert counts == [(1, 2), (2, 2)]
    poses = load_file(folder / POSES)
    assert sorted(poses) == ["bounce/training_00000", "orbit/training_00001"]
    pose = make_clip("bounce", 1.0, 3000000).pose
    found = poses["bounce/training_00000"]
    assert found.shape == (FPS, 4)
    np.testing.assert_allclose(found[:, 0] * FRAME_SIZE, pose.x, rtol=1e-5)
    np.testing.assert_allclose(found[:, 3], pose.angle, rtol=1e-5)
