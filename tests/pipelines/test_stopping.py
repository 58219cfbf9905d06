"""Ctrl-C and SIGTERM: an answer at once, and an immediate end the second time."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import clip_recipes
from pipelines.config.recipes import toy
from pipelines.core.stopping import stoppable
from pipelines.training.run import finetune, train
from tests.pipelines.ray_head import ROOT
from tests.pipelines.scripts import run_here


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_answered_before_the_block_ends(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(60)
        finally:
            said.append(capfd.readouterr().err)

    with pytest.raises(SystemExit) as stopped, stoppable(lambda: "kept: the last checkpoint"):
        work()
    assert said == [f"stopping ({number.name}); once more ends this at once\n"]
    assert capfd.readouterr().err == "kept: the last checkpoint\n"
    assert stopped.value.code == 128 + number


@pytest.mark.parametrize(
    ("command", "recipe", "first"),
    [(train, toy(), "detection_inputs"), (finetune, clip_recipes.toy(), "classification_inputs")],
    ids=["train", "finetune"],
)
def test_a_training_that_has_not_begun_is_stopped_in_two_lines(
    command: Callable[[Any], object],
    recipe: object,
    first: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)

    monkeypatch.setattr(f"pipelines.training.run.{first}", interrupted)
    with pytest.raises(SystemExit):
        command(recipe)
    assert capfd.readouterr().err.splitlines() == [
        "stopping (SIGINT); once more ends this at once",
        "nothing was trained yet: give the same command again",
    ]


@pytest.mark.parametrize(
    ("script", "work"),
    [
        ("prepare", "pipelines.data.shard_writing.ShardFolder.fill"),
        ("extract_features", "pipelines.data.feature_extraction.extract_features"),
        ("detect", "pipelines.inference.run.run"),
    ],
)
def test_scripts_that_go_on_say_so_when_they_are_stopped(
    script: str,
    work: str,
    tiny_set: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)

    monkeypatch.setattr(work, interrupted)
    videos, annotations = str(tiny_set / "videos"), str(tiny_set / "annotations.json")
    arguments = ["--videos", videos, "--output", str(tmp_path / "out")]
    arguments += ["--model", "m"] if script == "detect" else ["--annotations", annotations]
    with pytest.raises(SystemExit) as stopped:
        run_here(ROOT / "pipelines" / f"{script}.py", *arguments, folder=tmp_path)
    assert stopped.value.code == 130
    assert capfd.readouterr().err.splitlines()[-2:] == [
        "stopping (SIGINT); once more ends this at once",
        "what is done is kept: give the same command again to go on",
    ]


def test_the_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, sys, time\n"
        "from pipelines.core.stopping import stoppable\n"
        "with stoppable(lambda: 'never said'):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.splitlines()[-1] == "ended (SIGTERM)"
    assert "never said" not in done.stderr


def test_without_a_signal_the_handlers_are_those_of_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stoppable(lambda: ""):
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_works_and_changes_no_handler() -> None:
    found: list[object] = []

    def work() -> None:
        with stoppable(lambda: ""):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
