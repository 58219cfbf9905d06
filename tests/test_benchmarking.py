"""The command that all benchmarks share, and what it writes."""

import json
from pathlib import Path

import pytest
import torch

from pipelines.experiments.benchmarking import Benchmark, Tables, markdown, run, save


def test_markdown_of_a_table(tmp_path: Path) -> None:
    rows = [{"name": "a", "value": 0.12345, "all": [1.0, 2.0]}, {"name": "b", "value": 2e-7}]
    path = tmp_path / "one.json"
    save({"A title": rows}, path, "python -m memory", torch.device("cpu"))
    assert markdown(path).endswith(
        "**A title**\n\n| name | value |\n| --- | --- |\n| a | 0.123 |\n| b | 2e-07 |"
    )


def _measure(rounds: int) -> Tables:
    return {"Rounds": [{"rounds": rounds}]}


BENCHMARKS = {
    "rounds": Benchmark(
        text="nothing", measure=_measure, options={"rounds": {"type": int, "default": 3}}
    )
}


def test_results_go_to_their_folder_and_are_printed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("some.package", BENCHMARKS, tmp_path, ["rounds", "--rounds", "5"])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "rounds.json").read_text())
    assert record["tables"] == {"Rounds": [{"rounds": 5}]}
    assert record["command"] == "python -m some.package rounds --rounds 5"
    run("some.package", BENCHMARKS, tmp_path, ["tables"])
    assert capsys.readouterr().out == printed == markdown(tmp_path / "rounds.json") + "\n"


def test_where_the_results_lie_is_not_part_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "there.json"
    run("some.package", BENCHMARKS, tmp_path, ["rounds", "--output", str(output)])
    assert json.loads(output.read_text())["command"] == "python -m some.package rounds"
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


def test_an_unknown_benchmark_is_refused_with_the_choices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("some.package", BENCHMARKS, tmp_path, ["time"])
    refused = capsys.readouterr().err
    assert "'time'" in refused
    assert "'rounds', 'tables'" in refused.replace("rounds, tables", "'rounds', 'tables'")
