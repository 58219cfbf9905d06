"""Time left, stages of a command, and lines that are removed from its output."""

from pathlib import Path

import pytest
from ray._private import worker as ray_worker

from pipelines.core import progress
from pipelines.core.clock import TimeLeft
from pipelines.core.cluster import hide_noise


class Now:
    """Clock that is set by hand."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_time_left_follows_the_last_steps_and_the_evaluation() -> None:
    now = Now()
    left = TimeLeft(now)

    def steps(number: int, seconds: float) -> None:
        for _ in range(number):
            now.seconds += seconds
            left.step()

    steps(1, 500.0)  # the first waits for the first videos
    steps(9, 2.0)
    assert left.describe(steps=100, evaluations=2) == "", "nine steps say little"
    steps(1, 2.0)
    assert left.describe(steps=100, evaluations=2) == "left 3:20 and 2 evaluations"
    assert left.describe(steps=10, evaluations=1) == "left 0:20 and the evaluation"
    assert left.describe(steps=10, evaluations=0) == "left 0:20"
    now.seconds += 30.0
    left.evaluation()
    assert left.describe(steps=100, evaluations=1) == "left 3:50"
    steps(1, 4.0)  # kept over the end of an epoch: 10 steps of 2 s and one of 4
    assert left.describe(steps=110, evaluations=1) == "left 4:30"
    steps(50, 1.0)  # and only the last 50 count
    assert left.describe(steps=60, evaluations=0) == "left 1:00"


def test_a_stage_is_a_line_and_a_count_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = Now()
    monkeypatch.setattr("time.perf_counter", now)
    with progress.doing("opening the videos") as count:
        for done in range(1, 101):
            now.seconds += 0.1
            count(done, 100)
    assert capsys.readouterr().out.splitlines() == ["opening the videos ...", "  51 of 100"]


def test_a_stage_on_a_terminal_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    monkeypatch.setenv("TERM", "xterm")
    path = tmp_path / "output"
    with path.open("w") as output, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", output)
        with progress.doing("starting Ray") as count:
            count(3, 8)
            print("a line of its own")
    shown = path.read_text()
    assert "a line of its own\n" in shown
    assert shown.endswith(("\x1b[?25h\r\x1b[1A\x1b[2K", "\x1b[1A\x1b[2K")), "the line is erased"


def test_what_no_user_can_act_on_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr(
        ray_worker, "print_to_stdstream", lambda data, ignore_prefix: printed.extend(data["lines"])
    )
    hide_noise()
    hide_noise()
    noise = "WARNING: 8 PYTHON worker processes have been started on node: 2ba8 with address: a."
    for line in (noise, "a node was lost"):
        ray_worker.print_to_stdstream({"lines": [line], "is_err": False}, ignore_prefix=False)
    assert printed == ["a node was lost"]
