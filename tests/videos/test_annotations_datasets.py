"""Each of the seven data sets in the layout in which it is published, with its own faults."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from re2tal.annotations import AnnotationError, Instance, VideoAnnotation
from re2tal.datasets import FINEACTION, HACS_SEGMENTS, MULTITHUMOS, load_annotations
from re2tal.datasets.__main__ import main
from tests.videos import published_layouts as layouts


def segments(instances: Sequence[Instance]) -> list[tuple[float, float]]:
    return [(i.start, i.end) for i in instances]


def problems_of(path: Path) -> int:
    """Number of problems that a file has without the record of its data set."""
    with pytest.raises(AnnotationError) as caught:
        load_annotations(path)
    return len(caught.value.problems)


def test_hacs_segments(tmp_path: Path) -> None:
    path = layouts.hacs(tmp_path)
    assert problems_of(path) == 3
    annotations = load_annotations(path, dataset=HACS_SEGMENTS)
    training, testing, validation = annotations.videos
    assert annotations.classes == ("Dodgeball", "Ironing clothes")
    assert testing == VideoAnnotation(video_id="NKB_CEA5jNQ", subset="testing", duration=120.5)
    assert (training.video_id, training.duration) == ("--0edUL8zmA", 92.166667)
    assert segments(training.instances) == [(5.4, 11.6), (12.6, 88.16)]
    assert segments(training.evaluated) == [(5.4, 11.6), (12.6, 88.16), (90.5, 90.1), (91, 91)]
    assert segments(validation.instances) == [(40, 60)]
    assert segments(validation.evaluated) == [(40, 62.5)]
    assert [(r.action, r.reason) for r in annotations.repairs] == [
        ("dropped", "is reversed: it ends before it starts"),
        ("dropped", "has no length"),
        ("clipped", "reaches past the video's duration of 60 s"),
    ]


def test_fineaction(tmp_path: Path) -> None:
    path = layouts.fineaction(tmp_path)
    assert problems_of(path) == 2
    annotations = load_annotations(path, dataset=FINEACTION)
    assert [(v.video_id, v.subset) for v in annotations.videos] == [
        ("v_00000102", "training"),
        ("v_00004276", "validation"),
        ("v_00009001", "testing"),
    ]
    training, validation, testing = annotations.videos
    assert segments(training.instances) == [(1.0, 1.4)]
    assert segments(training.evaluated) == [(1.0, 1.4), (1.2, 1.2)]
    assert segments(validation.instances) == [(7.0, 9.5)]
    assert testing.instances == ()
    fewer = load_annotations(path, dataset=FINEACTION, exclude=["v_00004276"])  # `v_` is of the id
    assert [e.video_id for e in fewer.excluded] == ["v_00004276"]
    reversed_one = json.loads(path.read_text())
    reversed_one["database"]["v_00000102"]["annotations"][0]["segment"] = [3, 2]
    path.write_text(json.dumps(reversed_one))
    with pytest.raises(AnnotationError, match=r"v_00000102.*is reversed"):
        load_annotations(path, dataset=FINEACTION)


def test_multithumos_as_class_files_and_as_a_conversion(tmp_path: Path) -> None:
    durations = layouts.MULTITHUMOS_DURATIONS
    annotations = load_annotations(
        layouts.multithumos(tmp_path), dataset=MULTITHUMOS, durations=durations
    )
    assert annotations.classes == ("CloseUpTalkToCamera", "CricketShot", "Stand")
    assert [(v.video_id, v.subset, len(v.instances)) for v in annotations.videos] == [
        ("video_test_0001292", "test", 1),
        ("video_test_0001496", "test", 1),
        ("video_validation_0000160", "validation", 1),
    ]
    assert [(r.instance.start, r.reason) for r in annotations.repairs] == [
        (398.44, "reaches past the video's duration of 232.59 s"),
        (54.0, "has no length"),
    ]
    assert annotations.excluded == ()
    database = {
        video.video_id: {
            "subset": video.subset,
            "duration": video.duration,
            "frame": round(30 * video.duration),
            "annotations": [layouts.action(i.start, i.end, i.label) for i in video.evaluated],
        }
        for video in annotations.videos
    }
    conversion = layouts.written(tmp_path / "multithumos_anno.json", {"database": database})
    assert problems_of(conversion) == 2
    assert load_annotations(conversion, dataset=MULTITHUMOS) == annotations


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a data set is given to the command, and what must be in the summary.

    Attributes:
        subsets: name to number of videos and of instances.
        repaired: segments that were clipped, dropped or added.
        left_out: ids.
    """

    make: Callable[[Path], Path]
    subsets: dict[str, tuple[int, int]]
    classes: int
    options: tuple[str, ...] = ()
    repaired: int = 0
    left_out: tuple[str, ...] = ()


def ego4d(folder: Path) -> Path:
    layouts.ego4d(
        folder,
        "moments_train.json",
        "train",
        layouts.clip("c1", [layouts.moment(116.1, 123.6), layouts.moment(470.0, 490.0)]),
        layouts.clip("c0", [layouts.moment(1, 2, primary=False)]),
    )
    late = layouts.moment(-1.0, 3.0, "walk")
    layouts.ego4d(folder, "moments_val.json", "val", layouts.clip("c2", [late]))
    return folder


def multithumos(folder: Path) -> Path:
    (inner := folder / "multithumos").mkdir()
    layouts.written(folder / "durations.json", layouts.MULTITHUMOS_DURATIONS)
    return layouts.multithumos(inner)


CASES = {
    "activitynet-1.3": Case(
        make=layouts.activitynet,
        subsets={"testing": (1, 0), "training": (1, 1), "validation": (1, 1)},
        classes=2,
        repaired=1,
    ),
    "thumos-14": Case(
        make=layouts.thumos,
        subsets={"Test": (1, 1), "Validation": (1, 2)},
        classes=3,
        repaired=1,
        left_out=("video_test_0000270", "video_test_0001496"),
    ),
    "multithumos": Case(
        make=multithumos,
        options=("--durations", "durations.json"),
        subsets={"test": (2, 2), "validation": (1, 1)},
        classes=3,
        repaired=2,
    ),
    "hacs-segments": Case(
        make=layouts.hacs,
        subsets={"testing": (1, 0), "training": (1, 2), "validation": (1, 1)},
        classes=2,
        repaired=3,
    ),
    "fineaction": Case(
        make=layouts.fineaction,
        subsets={"testing": (1, 0), "training": (1, 1), "validation": (1, 1)},
        classes=2,
        repaired=2,
    ),
    "epic-kitchens-100": Case(
        make=layouts.epic,
        options=("--form", "epic-noun"),
        subsets={"test": (1, 0), "train": (1, 3), "validation": (1, 1)},
        classes=3,
    ),
    "ego4d-mq": Case(
        make=ego4d,
        subsets={"train": (1, 1), "val": (1, 1)},
        classes=2,
        repaired=2,
        left_out=("c0",),
    ),
}


@pytest.mark.parametrize("dataset", sorted(CASES))
def test_the_command_describes(
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[dataset]
    monkeypatch.chdir(tmp_path)
    assert main([str(case.make(tmp_path)), "--dataset", dataset, *case.options]) == 0
    out, err = capsys.readouterr()
    assert not err
    table, _, rest = out.partition("subset ")[2].partition("\n\n")
    rows = [line.split() for line in table.splitlines()[1:]]
    found = {name: (int(videos), int(count)) for name, videos, _, count, *_ in rows}
    total = tuple(map(sum, zip(*case.subsets.values(), strict=True)))
    assert found == {**case.subsets, "all": total}
    assert rest.startswith(f"{case.classes} classes\n")
    assert (f"Repaired: {case.repaired}\n" in rest) == bool(case.repaired)
    assert (f"Left out: {len(case.left_out)}\n" in rest) == bool(case.left_out)
    assert all(f"\n  {video_id}: " in rest for video_id in case.left_out)
