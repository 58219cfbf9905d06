"""End of a program: one message, or the whole stack."""

import pytest
from ray.exceptions import OutOfMemoryError, RayError
from ray.train import WorkerGroupError

from pipelines.config.command_line import told_shortly
from re2tal.errors import UserError


def test_a_problem_is_one_message() -> None:
    with pytest.raises(SystemExit, match=r"^error: no such folder$"), told_shortly():
        raise UserError("no such folder")


def test_a_mistake_of_ours_keeps_its_stack() -> None:
    with pytest.raises(KeyError), told_shortly():
        raise KeyError("layer")


def test_of_failed_workers_the_first_one_is_told() -> None:
    failed = WorkerGroupError("2 failed", {1: ValueError("loss is nan"), 3: ValueError("later")})
    with (
        pytest.raises(SystemExit, match=r"^error: a training worker failed.\nloss is nan$"),
        told_shortly(),
    ):
        raise failed


def test_a_failed_task_is_told_by_those_who_know_what_it_means() -> None:
    with pytest.raises(RayError), told_shortly():
        raise RayError("a task died")
    with (
        pytest.raises(SystemExit, match=r"^error: start again\.\na task died$"),
        told_shortly(failure="start again."),
    ):
        raise RayError("a task died")


def test_of_a_machine_without_memory_the_largest_process_is_named() -> None:
    report = (
        "8 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
        "192.0.2.2, ID: d5) was 22.29GB used / 23.54GB limit (0.947050)\nOOM kill reason: ...\n"
        "Top 10 memory users: PID\tMEM(GB)\tCOMMAND\n"
        "18022\t13.35\tpython other.py\n8195\t0.67\tpython pipelines/train.py toy\nRefer to ..."
    )
    with pytest.raises(SystemExit) as ended, told_shortly():
        raise OutOfMemoryError(report)
    message = str(ended.value)
    assert "(IP: 192.0.2.2) was 22.29GB used / 23.54GB limit." in message
    assert "The largest process has 13.35 GB: python other.py." in message
    assert "--scale.workers" in message
    assert "\n" not in message
