"""Harness of the experiments: results are kept, distinguished, written and printed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from pipelines.core.tracking import finishing, start_run
from pipelines.experiments.__main__ import EXPERIMENTS, RESULTS, main
from pipelines.experiments.experiment import (
    Experiment,
    Finding,
    Job,
    Measured,
    Outcome,
    Result,
    Section,
    Tables,
    at_least,
)
from pipelines.experiments.harness import (
    Chapter,
    Records,
    all_results,
    carry_out,
    chapters,
    circumstances,
    execute_here,
    log_outcome,
    log_results,
    markdown,
    run_command,
    write,
)
from pipelines.experiments.paper import Reproduction
from re2tal.errors import UserError

FACTS = {**circumstances("python this.py", torch.device("cpu")), "device": "an abacus"}


@pytest.mark.parametrize(
    ("a", "b", "margin", "expected"),
    [
        ((0.90, 0.91, 0.92), (0.80, 0.81, 0.82), 0.0, True),
        ((0.80, 0.81, 0.82), (0.90, 0.91, 0.92), 0.0, False),
        ((0.80, 0.90, 0.85), (0.90, 0.80, 0.85), 0.0, None),  # chance may have done it
        ((0.80, 0.81, 0.82), (0.81, 0.82, 0.83), 0.02, True),  # worse, but within the margin
        ((0.80, 0.81, 0.82), (0.81, 0.82, 0.83), 0.0, False),
        ((0.9,), (0.1,), 0.0, None),  # one seed tells nothing
    ],
)
def test_two_are_told_apart_by_the_standard_error_of_their_difference(
    a: tuple[float, ...], b: tuple[float, ...], margin: float, *, expected: bool | None
) -> None:
    assert at_least(Measured(a), Measured(b), margin=margin) is expected


def test_a_measurement_has_the_sample_deviation() -> None:
    found = Measured((0.2, 0.4, 0.9))
    assert found.mean == pytest.approx(0.5)
    assert found.deviation == pytest.approx(torch.tensor(found.values).std().item())
    assert str(found) == "0.500 ± 0.361"


def _square(*, of: int, log: str) -> Result:
    with Path(log).open("a") as file:
        file.write(f"{of}\n")
    if of == 3:
        raise ArithmeticError("three is too much")
    return {"square": of * of}


@dataclass(frozen=True)
class Squares:
    """Experiment that records the jobs that it was asked to do."""

    numbers: tuple[int, ...]
    log: str

    def prepare(self) -> None:
        Path(self.log).touch()

    def jobs(self) -> Sequence[Job]:
        return [
            Job(name=f"of {n}", work=_square, arguments={"of": n, "log": self.log})
            for n in self.numbers
        ]

    def section(self, results: Mapping[str, Result]) -> Section:
        rows = [{"of": name, "square": result["square"]} for name, result in results.items()]
        figure = Figure()
        figure.subplots().plot([1, 2])
        return Section(
            title="Squares",
            text="Numbers times themselves.",
            findings=[Finding(claim="They grow", holds=True, evidence="see below")],
            tables={"All of them": rows},
            figures={"squares": figure},
        )


def _carried_out(
    tmp_path: Path, experiment: Experiment, *, code: str = "code", resume: bool = True
) -> list[Outcome]:
    records = Records(folder=tmp_path / "results", code=code, device="an abacus")
    return list(carry_out({"squares": experiment}, execute_here, records, resume=resume))


def _done(experiment: Squares) -> list[str]:
    """Return the jobs that were asked for since the last call."""
    log = Path(experiment.log)
    done = log.read_text().split()
    log.write_text("")
    return done


def test_the_same_command_goes_on_with_what_it_has(tmp_path: Path) -> None:
    experiment = Squares(numbers=(1, 2), log=str(tmp_path / "log"))
    assert [o.result for o in _carried_out(tmp_path, experiment)] == [{"square": 1}, {"square": 4}]
    assert _done(experiment) == ["1", "2"]
    more = replace(experiment, numbers=(1, 2, 4))
    assert [o.result["square"] for o in _carried_out(tmp_path, more)] == [1, 4, 16]
    assert _done(experiment) == ["4"]
    _carried_out(tmp_path, more, resume=False)
    assert _done(experiment) == ["1", "2", "4"]
    _carried_out(tmp_path, more, code="other code")
    assert _done(experiment) == ["1", "2", "4"]


def test_a_failure_is_told_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = Squares(numbers=(2, 3, 4), log=str(tmp_path / "log"))
    outcomes = _carried_out(tmp_path, experiment)
    assert [o.error for o in outcomes] == ["", "ArithmeticError: three is too much", ""]
    assert "of 3: FAILED: ArithmeticError: three is too much" in capsys.readouterr().out
    found = chapters({"squares": experiment}, outcomes)
    with pytest.raises(UserError, match="1 jobs failed"):
        write(found, FACTS, tmp_path).refuse_failures()
    report = (tmp_path / "report.md").read_text()
    assert "- of 3: ArithmeticError: three is too much" in report
    assert [chapter.failed for chapter in found] == [[outcomes[1]]]
    _done(experiment)
    _carried_out(tmp_path, experiment)
    assert _done(experiment) == ["3"]


def test_the_report_has_verdicts_tables_pictures_and_circumstances(tmp_path: Path) -> None:
    experiment = Squares(numbers=(1, 2), log=str(tmp_path / "log"))
    found = chapters({"squares": experiment}, _carried_out(tmp_path, experiment))
    done = write(found, FACTS, tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "`python this.py`" in report
    assert "an abacus" in report
    assert "| They grow | holds | see below |" in report
    assert "| of 2 | 4 |" in report
    assert "![squares](squares.png)" in report
    assert (tmp_path / "out" / "squares.png").stat().st_size > 1000
    assert [file.name for file in done.files] == ["squares.json", "squares.png", "report.md"]
    squares = json.loads((tmp_path / "out" / "squares.json").read_text())
    assert squares["tables"] == {
        "All of them": [{"of": "of 1", "square": 1}, {"of": "of 2", "square": 4}]
    }
    assert squares["findings"] == [{"claim": "They grow", "holds": True, "evidence": "see below"}]
    assert squares["device"] == "an abacus"
    assert markdown(squares) in report


# One experiment by its name.


def test_markdown_of_a_table(tmp_path: Path) -> None:
    rows = [{"name": "a", "value": 0.12345, "all": [1.0, 2.0]}, {"name": "b", "value": 2e-7}]
    section = Section(title="One", text="", tables={"A title": rows})
    facts = circumstances("python -m memory", torch.device("cpu"))
    write([Chapter(name="one", section=section)], facts, tmp_path / "one.json")
    text = all_results(tmp_path)
    assert text.startswith("## One\n\n`python -m memory`, ")
    assert text.endswith(
        "**A title**\n\n| name | value |\n| --- | --- |\n| a | 0.123 |\n| b | 2e-07 |"
    )


def measure(*, rounds: int = 3) -> Tables:
    """Count to a number.

    Numbers are
    counted.

    Args:
        rounds: number of repetitions.
    """
    return {"Rounds": [{"rounds": rounds}]}


def _run(*arguments: str, output: Path) -> None:
    run_command(arguments, measure, prog="count", output=output)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a folder of its own, where the results of its jobs are kept."""
    monkeypatch.chdir(tmp_path)


def test_results_go_to_their_file_and_are_printed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    threads = str(torch.get_num_threads())
    _run("--rounds", "5", "--threads", threads, output=folder / "counting.json")
    printed = capsys.readouterr().out
    record = json.loads((folder / "counting.json").read_text())
    assert record["tables"] == {"Rounds": [{"rounds": 5}]}
    assert (record["title"], record["text"]) == ("Count to a number", "Numbers are counted.")
    assert record["command"] == f"count --rounds 5 --threads {threads}"
    assert record["threads"] == torch.get_num_threads()
    assert record["torch"] == torch.__version__
    main(["tables", str(folder)])
    shown = capsys.readouterr().out
    assert "| 5 |" in shown
    assert printed.endswith(shown)


def test_where_the_results_lie_is_not_part_of_the_command(tmp_path: Path) -> None:
    output = tmp_path / "there.json"
    _run("--output", str(output), output=tmp_path / "here.json")
    assert json.loads(output.read_text())["command"] == "count"
    assert not (tmp_path / "here.json").exists()


def test_an_unknown_experiment_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"no experiment 'time'\. Choose one of: memory, accuracy"):
        main(["time"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_configured(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Throughput is measured on Ray, which is imported for it alone."""
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m pipelines.experiments {name}" in capsys.readouterr().out


def test_the_folder_of_results_shows_them() -> None:
    """Made by `python -m pipelines.experiments tables`."""
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == all_results(RESULTS) + "\n"


# MLflow: a run for each job, below that of all.


@pytest.mark.slow
def test_jobs_and_results_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job = Job(name="of 2", work=print, arguments={"of": 2})
    result = {"square": 4, "root, rounded": 1.4, "text": "no metric"}
    done = Outcome(experiment="squares", job=job, result=result, seconds=1.5)
    failed = replace(done, result=None, error="ArithmeticError: too much")
    section = Section(
        title="Squares",
        text="",
        tables={"All": [{"of": 2, "square": 4}]},
        figures={"squares": Figure()},
        metrics={"squares/of 2, that is 4": 4.0},
    )
    run = start_run(Reproduction(), output=tmp_path)
    with finishing(run):
        own = run.client.create_run(run.client.get_run(run.run_id).info.experiment_id).info.run_id
        for outcome in (done, failed, replace(done, result={"run_id": own})):
            log_outcome(run, outcome)
        facts = circumstances("a command", torch.device("cpu"))
        chapter = Chapter(name="squares", section=section, outcomes=[done])
        log_results(run, write([chapter], facts, tmp_path / "report"))
    parent = run.client.get_run(run.run_id)
    found = run.client.search_runs([parent.info.experiment_id])
    children = {one.info.run_id: one for one in found if one.info.run_id != run.run_id}
    assert len(children) == 3
    assert {one.data.tags["mlflow.parentRunId"] for one in children.values()} == {run.run_id}
    del children[own]  # the job made it, and ends it
    by_status = {one.info.status: one.data for one in children.values()}
    good, bad = by_status["FINISHED"], by_status["FAILED"]
    assert good.params == {"of": "2"}
    assert good.metrics == {"square": 4, "root_ rounded": 1.4, "seconds": 1.5}
    assert good.tags["kind"] == "squares"
    assert bad.tags["error"] == "ArithmeticError: too much"
    assert parent.data.metrics == {"squares/of 2_ that is 4": 4.0}
    artifacts = {file.path for file in run.client.list_artifacts(run.run_id)}
    assert {"report.md", "squares.json", "squares.png"} <= artifacts
