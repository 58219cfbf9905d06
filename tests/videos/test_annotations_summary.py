"""The summary, the comparison of durations, and the two as a command."""

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.annotations import (
    AnnotationError,
    Annotations,
    Exclusion,
    Instance,
    Repair,
    VideoAnnotation,
)
from re2tal.datasets import check_durations, load_annotations, read_durations, summarize
from re2tal.datasets.__main__ import main


def instances(*segments: tuple[float, float], label: str = "run") -> tuple[Instance, ...]:
    return tuple(Instance(start=start, end=end, label=label) for start, end in segments)


def video(
    video_id: str, duration: float, *found: Instance, subset: str = "training", **more: Any
) -> VideoAnnotation:
    return VideoAnnotation(
        video_id=video_id, subset=subset, duration=duration, instances=found, **more
    )


def test_the_summary_says_this() -> None:
    late = Instance(start=30.0, end=99.5, label="jump")
    summary = summarize(
        Annotations(
            classes=("fly", "jump", "run"),
            videos=(
                video("a", 3600.0, *instances((0, 900), (600, 1200), (700, 800), (700, 800))),
                video("b", 1800.0, ambiguous=instances((1, 2), label="unclear")),
                video("c", 10.0, *instances((1, 1.75), label="jump"), subset="validation"),
            ),
            excluded=(Exclusion(video_id="d", reason="is gone"),),
            repairs=(Repair(video_id="c", action="dropped", instance=late, reason="was late"),),
        )
    )
    assert (
        summary
        == """\
subset               videos     hours  instances      per video  in action
training                  2      1.50          4     2.0 (<= 4)      22.2%
validation                1      0.00          1     1.0 (<= 1)       7.5%
all                       3      1.50          5     1.7 (<= 4)      22.2%

3 classes
  all     run 4, jump 1, fly 0
  without an instance: 1

Lengths of instances in seconds
  min 0.75   5% 0.75   25% 100   median 100   75% 600   95% 900   max 900
        0.5 to 1                 1 ####################
          1 to 2                 0
          2 to 4                 0
          4 to 8                 0
          8 to 16                0
         16 to 32                0
         32 to 64                0
         64 to 128               2 ########################################
        128 to 256               0
        256 to 512               0
        512 to 1024              2 ########################################

1 instance with the times and the label of another
1 ambiguous stretch in 1 video, set apart

Left out: 1
  d: is gone

Repaired: 1
  c: jump 30 to 99.5 s dropped: was late"""
    )


@given(
    st.lists(st.tuples(st.integers(0, 39), st.integers(1, 40)), max_size=12),
    st.text("abc é", max_size=30),
)
@settings(max_examples=50)
def test_the_share_in_action_counts_no_second_twice(
    segments: list[tuple[int, int]], name: str
) -> None:
    spans = sorted((start, min(start + length, 40)) for start, length in segments)
    seconds = {second for start, end in spans for second in range(start, end)}
    found = instances(*spans, label=name)
    summary = summarize(Annotations(classes=(name,), videos=(video(name, 40.0, *found),)))
    assert f" {len(seconds) / 40:.1%}\n" in summary
    assert max(map(len, summary.splitlines())) <= 80


def test_long_lists_are_cut_but_counted_and_nothing_is_wider_than_80_columns() -> None:
    labels = [f"{'a very long name of a class ' * 4}{n:02}" for n in range(12)]
    repairs = tuple(
        Repair(
            video_id="v" * 90,
            action="dropped",
            instance=Instance(start=1.0, end=1.0, label=label),
            reason="has no length",
        )
        for label in labels * 2
    )
    found = tuple(
        Instance(start=float(k), end=k + 1.0, label=label)
        for k, label in enumerate(labels)
        for _ in range(k + 1)
    )
    summary = summarize(
        Annotations(classes=tuple(labels), videos=(video("a", 20.0, *found),), repairs=repairs)
    )
    assert max(map(len, summary.splitlines())) <= 80
    assert "Repaired: 24" in summary
    assert "... and 4 more" in summary
    most, fewest = summary.index("  most "), summary.index("  fewest ")
    text = " ".join(summary[most:].split())
    assert most < fewest
    assert "class 11 12," in text
    assert text.index("class 00 1,") > text.index("class 07 8")
    assert "class 06 7" not in text


def test_durations_that_do_not_fit_the_files() -> None:
    annotations = Annotations(
        classes=("run",),
        videos=(
            video("a", 10.0, *instances((1, 9))),
            video("b", 10.0, *instances((1, 4))),
            video("c", 10.0),
            video("d", 10.0),
        ),
    )
    assert check_durations(annotations, {}) == {}
    assert check_durations(annotations, {"a": 11.0, "b": 9.0, "other": 3.0}) == {}
    found = check_durations(annotations, {"a": 8.5, "b": 30.0, "d": math.nan})
    assert list(found) == ["a", "b", "d"]
    shorter, longer, unknown = found.values()
    assert shorter == (
        "video 'a': its file lasts 8.5 s, its annotation says 10 s, and actions in it reach up to "
        "9 s; get the original file, or exclude it"
    )
    assert "'b': its file lasts 30 s, its annotation says 10 s; get" in longer
    assert "'d'" in unknown
    assert check_durations(annotations, {"a": 8.5, "b": 12.0}, tolerance=2.0) == {}


def files(folder: Path) -> Path:
    database = {
        "video_test_0000006": {
            "subset": "test",
            "duration": 9.0,
            "annotations": [
                {"segment": ["1", "3"], "label": "Shotput"},
                {"segment": [12, 13], "label": "Shotput"},
                {"segment": [4, 5], "label": "Ambiguous"},
            ],
        },
        "video_test_0000004": {"subset": "test", "annotations": []},
    }
    (folder / "thumos.json").write_text(json.dumps({"database": database}))
    (folder / "durations.json").write_text('{"video_test_0000004": 4.0, "video_test_0000006": 9.5}')
    (folder / "missing_files.txt").write_text("video_test_0000004\n")
    return folder / "thumos.json"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = files(tmp_path)
    assert main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "2 problems" in err
    assert "past the video's duration of 9 s" in err
    assert "'video_test_0000004': duration: is missing" in err

    known = ["--dataset", "thumos-14", "--durations", str(tmp_path / "durations.json")]
    assert main([str(path), *known]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "Repaired: 1" in out
    assert "1 ambiguous stretch in 1 video," in out

    assert main([str(path), *known, "--exclude", str(tmp_path / "missing_files.txt")]) == 0
    assert "Left out: 1\n  video_test_0000004: is on the list" in capsys.readouterr().out

    assert main([str(path), *known, "--keep", "video_test_0001496"]) == 1
    assert (
        "'video_test_0001496': is to be kept, but is not in the annotations"
        in capsys.readouterr().err
    )

    (tmp_path / "durations.json").write_text('{"video_test_0000004": 4, "video_test_0000006": 3}')
    assert main([str(path), *known]) == 1
    assert "its file lasts 3 s" in capsys.readouterr().err

    (tmp_path / "durations.json").write_text('{"a": -1, "b": "long", "c": 3}')
    assert main([str(path), *known]) == 1
    assert "2 problems" in capsys.readouterr().err
    (tmp_path / "durations.json").write_text('{"a": 3, "a": 4, "b": 0}')
    assert main([str(path), *known]) == 1
    err = capsys.readouterr().err
    assert "key 'a' is there more than once" in err
    assert "'b': input should be greater than or equal to 0.001 (found " in err
    (tmp_path / "durations.json").write_text('{"a": "3.5"}')
    assert read_durations(tmp_path / "durations.json") == {"a": 3.5}


def test_the_command_removes_spaces_around_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actions = [{"segment": [1, 2], "label": label} for label in ("run", "run ")]
    database = {"a": {"subset": "test", "duration": 9, "annotations": actions}}
    (path := tmp_path / "a.json").write_text(json.dumps({"database": database}))
    assert main([str(path)]) == 1
    assert "the labels 'run' (1 time), 'run ' (1 time) differ only" in capsys.readouterr().err
    assert main([str(path), "--trim-labels"]) == 0
    assert "Repaired: 1\n  a: run  1 to 2 s trimmed: has spaces" in capsys.readouterr().out


def test_the_command_lists_all_problems_of_a_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = {f"v{n}": {"subset": "test", "annotations": []} for n in range(400)}
    (path := tmp_path / "a.json").write_text(json.dumps({"database": database}))
    assert main([str(path)]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 401
    with pytest.raises(AnnotationError) as caught:
        load_annotations(path)
    heading, *listed, hint = str(caught.value).splitlines()
    assert "400 problems" in heading
    missing = "duration: is missing; durations can be given apart from the file (durations)"
    examples = [f"  - video 'v{n}': {missing}" for n in range(3)]
    assert listed == [*examples, "  - ... and 397 more like these"]
    assert f"python -m re2tal.datasets {path}" in hint
    assert pickle.loads(pickle.dumps(caught.value)).listed == err.strip()


@pytest.mark.slow
def test_the_module_runs_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "re2tal.datasets", str(files(tmp_path))]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "2 problems" in refused.stderr
    assert "Traceback" not in refused.stderr
    options = ["--dataset", "thumos-14", "--exclude", str(tmp_path / "missing_files.txt")]
    described = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "1 class\n" in described.stdout
    assert not described.stderr
