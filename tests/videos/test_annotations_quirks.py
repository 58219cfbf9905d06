"""What is left out, set apart, repaired and added: only on request, and never without a trace."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from re2tal.annotations import AnnotationError, Instance, Repair, VideoAnnotation
from re2tal.datasets import (
    ACTIVITYNET13,
    DATASETS,
    DURATION_TOLERANCE,
    MULTITHUMOS,
    THUMOS14,
    Dataset,
    Fault,
    load_annotations,
    read_ids,
)

EVERYTHING = Dataset(name="any", repaired=frozenset(Fault))


def action(start: Any, end: Any, label: str = "run") -> dict[str, Any]:
    return {"segment": [start, end], "label": label}


def video(*actions: Any, duration: Any = 10.0, subset: str = "training") -> dict[str, Any]:
    return {"subset": subset, "duration": duration, "annotations": list(actions)}


def write(folder: Path, database: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "annotations.json"
    path.write_text(json.dumps({"database": database}))
    return path


def problems_of(path: Path, **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(AnnotationError) as caught:
        load_annotations(path, **arguments)
    return caught.value.problems


def test_activitynet_loses_segments_without_length_and_says_so(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"b": video(action(1, 2), action(0.0, 0.0, "jump")), "a": video(action(2, 10.004))},
    )
    (problem,) = problems_of(path)
    assert problem == "video 'b': annotations[1].segment: has no length (found [0.0, 0.0])"
    annotations = load_annotations(path, dataset=ACTIVITYNET13)
    assert annotations.repairs == (
        Repair(
            video_id="b",
            action="dropped",
            instance=Instance(start=0.0, end=0.0, label="jump"),
            reason="has no length",
        ),
    )
    # the dropped instance is evaluated as published, so its label counts as a class
    assert annotations.classes == ("jump", "run")
    nothing = write(tmp_path, {"a": video(action(1, 1))})
    assert "nothing to learn" in problems_of(nothing, dataset=ACTIVITYNET13)[0]
    assert annotations.videos[0].instances == (Instance(start=2.0, end=10.0, label="run"),)
    assert (
        "is reversed"
        in problems_of(write(tmp_path, {"a": video(action(3, 2))}), dataset=ACTIVITYNET13)[0]
    )


def test_a_late_segment_is_cut_if_half_of_it_is_there_and_dropped_otherwise(tmp_path: Path) -> None:
    segments = [(14.13, 21.33), (398.44, 4000.36), (19.0, 22.0), (20.24, 20.5)]
    path = write(tmp_path, {"a": video(*(action(*s) for s in segments), duration=20.24)})
    assert len(problems_of(path)) == 4
    annotations = load_annotations(path, dataset=MULTITHUMOS)
    assert annotations.videos[0].instances == (Instance(start=14.13, end=20.24, label="run"),)
    assert [(r.action, r.instance.start) for r in annotations.repairs] == [
        ("clipped", 14.13),
        ("dropped", 398.44),
        ("dropped", 19.0),
        ("dropped", 20.24),
    ]
    assert annotations.repairs[0].reason == "reaches past the video's duration of 20.24 s"


# quarters of a second are exact in binary, so that the definition below can be exact as well
quarters = st.integers(-60, 100).map(lambda n: n / 4)


@given(st.lists(st.tuples(quarters, quarters), min_size=1, max_size=6), st.integers(1, 80))
@example([(0.0, 11.0), (0.0, 11.25), (-1.0, 1.0), (-1.0, 0.75), (9.75, 10.5), (10.0, 10.5)], 40)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_instances_end_up_inside_or_in_the_list_of_repairs(
    tmp_path: Path, segments: list[tuple[float, float]], quarters_long: int
) -> None:
    duration = quarters_long / 4
    kept, changed = [], []
    for start, end in segments:
        a, b, long = Fraction(start), Fraction(end), Fraction(duration)
        low, high = max(a, Fraction(0)), min(b, long)
        fine = 0 <= a < b and a < long and b <= long + Fraction(DURATION_TOLERANCE)
        if fine or (b > a and high - low >= (b - a) / 2):
            kept.append((float(low), float(high)))
        if not fine:
            changed.append((start, end))
    # a second video, so that there is something to learn whatever becomes of the first
    path = write(
        tmp_path,
        {"a": video(*(action(*s) for s in segments), duration=duration), "b": video(action(1, 2))},
    )
    annotations = load_annotations(path, dataset=EVERYTHING)
    assert [(i.start, i.end) for i in annotations.videos[0].instances] == sorted(kept)
    assert [(r.instance.start, r.instance.end) for r in annotations.repairs] == changed
    if changed:
        assert len({p.split(":")[1] for p in problems_of(path)}) == len(changed)
    else:
        assert load_annotations(path) == annotations


def test_what_is_both_early_and_late_needs_both_repairs(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": video(action(-2, 12))})
    late = Dataset(name="any", repaired=frozenset({Fault.LATE}))
    (problem,) = problems_of(path, dataset=late)
    assert "starts before the video does" in problem
    (repair,) = load_annotations(path, dataset=EVERYTHING).repairs
    assert (
        repair.reason
        == "starts before the video does and reaches past the video's duration of 10 s"
    )


def test_ambiguous_stretches_are_no_class_but_are_there(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "a": video(
                action(3, 4, "Ambiguous"), action(1, 2, "Diving"), action(1, 2, "Ambiguous")
            ),
            "b": video(action(1, 2, "Diving")),
        },
    )
    assert load_annotations(path).classes == ("Ambiguous", "Diving")
    annotations = load_annotations(path, dataset=THUMOS14, classes=["Diving"])
    unclear = tuple(Instance(start=s, end=s + 1.0, label="Ambiguous") for s in (1.0, 3.0))
    assert annotations.classes == ("Diving",)
    assert annotations.ambiguous == {"a": unclear}
    assert annotations.videos[0] == VideoAnnotation(
        video_id="a",
        subset="training",
        duration=10.0,
        instances=(Instance(start=1.0, end=2.0, label="Diving"),),
        ambiguous=unclear,
    )
    only = write(tmp_path, {"a": video(action(3, 4, "Ambiguous"))})
    assert "nothing to learn" in problems_of(only, dataset=THUMOS14)[0]


def test_every_cliff_dive_is_a_dive(tmp_path: Path) -> None:
    dives = (action(1, 2, "CliffDiving"), action(1, 2, "Diving"), action(5, 6, "CliffDiving"))
    path = write(tmp_path, {"a": video(*dives)})
    annotations = load_annotations(path, dataset=THUMOS14)
    twin = Instance(start=5.0, end=6.0, label="Diving")
    assert [(i.start, i.label) for i in annotations.videos[0].instances] == [
        (1.0, "CliffDiving"),
        (1.0, "Diving"),
        (5.0, "CliffDiving"),
        (5.0, "Diving"),
    ]
    (repair,) = annotations.repairs
    assert (repair.action, repair.instance) == ("added", twin)
    narrow = load_annotations(
        write(tmp_path, {"a": video(dives[0])}), dataset=THUMOS14, classes=["CliffDiving"]
    )
    assert narrow.repairs == ()


def test_block_lists_of_all_kinds(tmp_path: Path) -> None:
    path = write(tmp_path, {i: video(action(1, 2)) for i in ("v_a", "b", "c", "d")})
    (lines := tmp_path / "missing_files.txt").write_text("b\n\nv_c \nnot-there\nv_a\n")
    assert read_ids(lines) == {"b", "v_c", "not-there", "v_a"}
    (listed := tmp_path / "blocked.json").write_text('["b", "v_c"]')
    (keyed := tmp_path / "reasons.json").write_text('{"b": "gone", "v_c": null}')
    assert read_ids(listed) == read_ids(keyed) == {"b", "v_c"}
    annotations = load_annotations(path, exclude=read_ids(lines))
    assert [v.video_id for v in annotations.videos] == ["d"]
    assert [e.video_id for e in annotations.excluded] == ["b", "c", "v_a"]
    # a name of a file in place of what it holds, or a list of another data set
    (problem,) = problems_of(path, exclude="ef.txt")
    assert problem.startswith("none of the 5 videos to exclude is there")
    assert "The ids there are ., e, f, ... and 2 more; those of the annotations are b, c" in problem
    for content in ("[1]", "3", "not json"):
        (broken := tmp_path / "broken.json").write_text(content)
        with pytest.raises(AnnotationError, match=r"broken\.json"):
            read_ids(broken)


def test_ids_are_the_same_in_every_normal_form(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    lacking = {"subset": "test", "annotations": []}
    path = write(tmp_path, {composed: lacking, "b": video(action(1, 2))})
    for excluded in (apart, f"v_{apart}"):
        annotations = load_annotations(path, exclude=[excluded])
        assert [e.video_id for e in annotations.excluded] == [composed]
    durations = {
        v.video_id: v.duration for v in load_annotations(path, durations={apart: 8.5}).videos
    }
    assert durations[composed] == 8.5


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (("run", "run ", "run", "\trun"), r"'run' (2 times), '\trun' (1 time), 'run ' (1 time)"),
        (("Long Jump", "long jump"), "'Long Jump' (1 time), 'long jump' (1 time)"),
        (("long  jump", "long jump"), "'long  jump' (1 time), 'long jump' (1 time)"),
        (("passe\u0301", "pass\u00e9"), r"'passe\u0301' (1 time), 'pass\xe9' (1 time)"),
        (("Stra\u00dfe", "STRASSE"), "'STRASSE' (1 time), 'Stra\u00dfe' (1 time)"),
        (("dive", "ambiguous"), "'Ambiguous' (0 times), 'ambiguous' (1 time)"),
    ],
)
def test_labels_that_are_one_name_are_a_problem_of_the_file(
    tmp_path: Path, labels: tuple[str, ...], shown: str
) -> None:
    database = {f"v{n}": video(action(1, 2, label)) for n, label in enumerate(labels)}
    path = write(tmp_path, database)
    (problem,) = problems_of(path, dataset=THUMOS14)
    assert problem.startswith(f"the labels {shown} differ only in spaces, case or Unicode's normal")
    assert ("--trim-labels" in problem) == ("run" in labels)
    known = load_annotations(path, dataset=THUMOS14, classes=labels)  # so they are meant
    assert known.classes == tuple(sorted(set(labels)))
    # of videos that are left out nothing counts
    load_annotations(path, dataset=THUMOS14, exclude=[*database][1:])


def test_spaces_around_labels_are_removed_when_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": video(action(1, 2), action(3, 12, " run\n")), "b": video()})
    clean = write(tmp_path / "clean", {"a": video(action(1, 2), action(3, 12)), "b": video()})
    assert problems_of(path, dataset=ACTIVITYNET13)
    found = load_annotations(path, dataset=ACTIVITYNET13.trimming())
    wanted = load_annotations(clean, dataset=ACTIVITYNET13)
    assert (found.classes, found.videos) == (wanted.classes, wanted.videos)
    assert found.videos[0].evaluated == wanted.videos[0].evaluated
    assert [(r.action, r.instance.label) for r in found.repairs] == [
        ("trimmed", " run\n"),
        ("clipped", " run\n"),
    ]
    listed = load_annotations(path, dataset=ACTIVITYNET13.trimming(), classes=["run"])
    assert listed.videos == found.videos
    for label in (" ", "\t\n"):
        path = write(tmp_path, {"a": video(action(1, 2, label))})
        for dataset in (ACTIVITYNET13, ACTIVITYNET13.trimming()):
            (problem,) = problems_of(path, dataset=dataset)
            assert problem.startswith("video 'a': annotations[0].label: is nothing but spaces")


def test_durations_that_the_file_lacks(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "a": {"subset": "test", "annotations": [action("1.5", "9")]},
            "b": {"subset": "test", "annotations": [], "duration": 3.0},
        },
    )
    (problem,) = problems_of(path)
    assert problem.startswith("video 'a': duration: is missing; durations can be given")
    annotations = load_annotations(path, durations={"a": 8.5, "b": 99.0})
    assert [v.duration for v in annotations.videos] == [8.5, 3.0]
    assert annotations.videos[0].instances[0].end == 8.5
    (problem,) = problems_of(path, durations={"a": 7.5})
    assert "past the video's duration of 7.5 s" in problem
    asked: list[str] = []

    def found(video_ids: Sequence[str]) -> dict[str, float]:
        asked.extend(video_ids)
        return {"a": 8.5}

    assert load_annotations(path, durations=found) == annotations
    left = load_annotations(path, durations=found, exclude=["a"], classes=["run"])
    assert left.videos == annotations.videos[1:]
    assert asked == ["a"]
    first, second = problems_of(path, durations={"v_a": 8.5})
    assert first.startswith(
        "none of the 1 durations is of a video here: are these its ids? The ids"
    )
    assert second.startswith("video 'a': duration: is missing")


def test_the_fingerprint_tells_what_was_done_but_not_how_it_is_worded(tmp_path: Path) -> None:
    database = {"a": video(action(1, 2), action(5, 12)), "b": video(action(1, 2))}
    path = write(tmp_path, database)
    clipped = load_annotations(path, dataset=EVERYTHING)
    plain = load_annotations(write(tmp_path, database | {"a": video(action(1, 2), action(5, 10))}))
    assert [v.instances for v in clipped.videos] == [v.instances for v in plain.videos]
    assert clipped.fingerprint != plain.fingerprint
    (repair,) = clipped.repairs
    reworded = replace(clipped, repairs=(replace(repair, reason="was late"),))
    assert reworded.fingerprint == clipped.fingerprint
    excluded = load_annotations(write(tmp_path, database), dataset=EVERYTHING, exclude=["b"])
    alone = load_annotations(write(tmp_path, {"a": database["a"]}), dataset=EVERYTHING)
    assert excluded.videos == alone.videos
    assert excluded.fingerprint != alone.fingerprint
    unclear = {"a": video(action(1, 2), action(5, 10), action(3, 4, "Ambiguous"))}
    apart = load_annotations(write(tmp_path, database | unclear), dataset=THUMOS14)
    assert apart.classes == plain.classes
    assert apart.fingerprint != plain.fingerprint
    # what needs no treatment has the fingerprint that it had before there was any
    content = [
        ["run"],
        [
            ["a", "training", 10.0, [[1.0, 2.0, "run"], [5.0, 10.0, "run"]]],
            ["b", "training", 10.0, [[1.0, 2.0, "run"]]],
        ],
    ]
    text = json.dumps(content, separators=(",", ":"))
    assert plain.fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_a_subset_keeps_only_its_own_repairs(tmp_path: Path) -> None:
    late = video(action(1, 2), action(5, 12))
    path = write(tmp_path, {"a": late, "b": {**late, "subset": "validation"}})
    part = load_annotations(path, dataset=EVERYTHING).subset("validation")
    assert [r.video_id for r in part.repairs] == ["b"]


def test_nothing_is_implied_by_what_is_no_class() -> None:
    for record in DATASETS.values():
        assert not record.ambiguous & set(record.implied)
