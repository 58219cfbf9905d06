"""Harness of all experiments: jobs with stored results, JSON, pictures, Markdown and MLflow."""

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision

from pipelines.core.checkout import code_fingerprint, git_commit
from pipelines.core.clock import duration
from pipelines.core.metric_names import safe_path
from pipelines.experiments.experiment import (
    Experiment,
    Job,
    Measurement,
    Outcome,
    Prepares,
    Row,
    Section,
    Tables,
    device,
)
from re2tal.atomic import replacing
from re2tal.errors import UserError

if TYPE_CHECKING:
    from pipelines.core.tracking import Run

# tyro and MLflow are imported where they are used: a machine that measures memory may lack them.

Work = tuple[str, Job]
"""Name of an experiment, and one of its jobs."""

Execute = Callable[[Sequence[Work]], Iterator[Outcome]]
"""Function that runs jobs and yields the outcome of each as it ends."""

VERDICTS = {True: "holds", False: "does not hold", None: "cannot be told"}
REPORT = "report.md"
_JOBS = Path("runs/experiments")  # folder of results of jobs, unless `paper` has its own


# Jobs.


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """Folder of job results, from which the same command resumes.

    Attributes:
        code: fingerprint of the code; results of other code are not reused.
        device: name of the device; results of other devices are not reused.
    """

    folder: Path
    code: str
    device: str

    def find(self, experiment: str, job: Job) -> Outcome | None:
        """Look up a job's result for the same arguments; None if it is missing or failed."""
        path = self._path(experiment, job)
        if not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        if (kept["code"], kept["device"]) != (self.code, self.device):
            return None
        return Outcome(
            experiment=experiment, job=job, result=kept["result"], seconds=kept["seconds"]
        )

    def keep(self, outcome: Outcome) -> None:
        """Write the result of a job, unless it failed."""
        if outcome.error:
            return
        record = {
            "job": outcome.job.name,
            "arguments": outcome.job.arguments,
            "code": self.code,
            "device": self.device,
            "seconds": outcome.seconds,
            "result": outcome.result,
        }
        _write(self._path(outcome.experiment, outcome.job), json.dumps(record, indent=1))

    def _path(self, experiment: str, job: Job) -> Path:
        what = json.dumps([job.name, dict(job.arguments)], sort_keys=True)
        return self.folder / experiment / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def execute_here(works: Sequence[Work]) -> Iterator[Outcome]:
    """Run jobs in this process, one after another."""
    for experiment, job in works:
        yield attempt(experiment, job)


def attempt(experiment: str, job: Job) -> Outcome:
    """Run a job; a failure becomes its outcome, and does not stop other jobs."""
    began = time.perf_counter()
    try:
        result, error = job.work(**job.arguments), ""
    except Exception as problem:  # any failure goes into the report
        result, error = None, f"{type(problem).__name__}: {problem}"
    seconds = time.perf_counter() - began
    return Outcome(experiment=experiment, job=job, result=result, seconds=seconds, error=error)


def carry_out(
    experiments: Mapping[str, Experiment], execute: Execute, records: Records, *, resume: bool
) -> Iterator[Outcome]:
    """Prepare the experiments' data, and run the jobs whose results are not in the records."""
    for experiment in experiments.values():
        if isinstance(experiment, Prepares):
            experiment.prepare()
    works = [(name, job) for name, one in experiments.items() for job in one.jobs()]
    left = []
    for name, job in works:
        known = records.find(name, job) if resume else None
        if known is None:
            left.append((name, job))
        else:
            yield known
    if len(left) < len(works):
        print(f"{len(works) - len(left)} of {len(works)} jobs were done before", flush=True)
    began = time.perf_counter()
    for done, outcome in enumerate(execute(left), start=1):
        records.keep(outcome)
        to_come = (time.perf_counter() - began) / done * (len(left) - done)
        how = f"FAILED: {outcome.error}" if outcome.error else duration(outcome.seconds)
        print(
            f"{outcome.experiment:<10} {outcome.job.name}: {how}  ({done} of {len(left)}, "
            f"left {duration(to_come)})",
            flush=True,
        )
        yield outcome


# Results of experiments.


def circumstances(command: str, where: torch.device) -> dict[str, Any]:
    """Describe the circumstances of a measurement: command, date, commit, device, versions."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git_commit(Path(__file__).parent) or "",
        "device": name_of(where),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


def name_of(where: torch.device) -> str:
    """Return the name of a GPU or of this machine's processor."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True, kw_only=True, slots=True)
class Chapter:
    """Report on a finished experiment (None if jobs failed), and the outcomes of all jobs."""

    name: str
    section: Section | None
    outcomes: Sequence[Outcome] = ()

    @property
    def failed(self) -> list[Outcome]:
        """Outcomes of failed jobs."""
        return [outcome for outcome in self.outcomes if outcome.error]


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """Finished experiments, the written files, and a Markdown text for each experiment."""

    chapters: Sequence[Chapter]
    files: Sequence[Path]
    sections: Sequence[str]

    def refuse_failures(self) -> None:
        """Raise if jobs failed.

        Raises:
            UserError: with the number of failed jobs.
        """
        if failures := sum(len(chapter.failed) for chapter in self.chapters):
            raise UserError(
                f"{failures} jobs failed, as listed above; the same command tries them again."
            )


def run(
    experiments: Mapping[str, Experiment],
    *,
    command: str,
    kept: Path,
    results: Path,
    execute: Execute = execute_here,
    resume: bool,
    seen: Callable[[Outcome], object] = lambda _: None,
) -> Done:
    """Run experiments, and write and print their results.

    Args:
        experiments: experiments by name.
        command: command that was given.
        kept: folder of the results of jobs.
        results: JSON file for a single experiment; or a folder, which also gets a common report.
        execute: `execute_here`, or its counterpart on Ray.
        resume: reuse results of jobs that the same code computed before.
        seen: callback for each outcome as soon as it is known.
    """
    facts = circumstances(command, _measured_device(next(iter(experiments.values()))))
    records = Records(folder=kept, code=code_fingerprint(), device=facts["device"])
    outcomes = []
    for outcome in carry_out(experiments, execute, records, resume=resume):
        outcomes.append(outcome)
        seen(outcome)
    done = write(chapters(experiments, outcomes), facts, results)
    for chapter in done.chapters:
        for finding in chapter.section.findings if chapter.section else ():
            print(f"{VERDICTS[finding.holds]:<16} {finding.claim}: {finding.evidence}")
        for outcome in chapter.failed:
            print(f"FAILED           {chapter.name}, {outcome.job.name}: {outcome.error}")
    print(f"results: {done.files[-1]}" if done.files else "there are no results", flush=True)
    return done


def _measured_device(experiment: Experiment) -> torch.device:
    if isinstance(experiment, Measurement):  # its option; most measurements need no GPU
        return torch.device(experiment.arguments.get("device", "cpu"))
    return device()


def chapters(experiments: Mapping[str, Experiment], outcomes: Sequence[Outcome]) -> list[Chapter]:
    """Report on experiments, in order, from the outcomes of all their jobs."""
    found = []
    for name, experiment in experiments.items():
        own = [outcome for outcome in outcomes if outcome.experiment == name]
        whole = not any(outcome.error for outcome in own)
        results = {outcome.job.name: outcome.result for outcome in own}
        section = experiment.section(results) if whole else None
        found.append(Chapter(name=name, section=section, outcomes=own))
    return found


def write(found: Sequence[Chapter], facts: dict[str, Any], results: Path) -> Done:
    """Write complete experiments' results as JSON, their pictures, and for a folder a report.

    Args:
        found: chapters of the experiments.
        facts: circumstances of all numbers.
        results: see `run`.
    """
    one = results.suffix == ".json"
    folder = results.parent if one else results
    files: list[Path] = []
    sections = []
    for chapter in found:
        if chapter.section is None:
            lines = "\n".join(f"- {o.job.name}: {o.error.splitlines()[0]}" for o in chapter.failed)
            sections.append(f"## {chapter.name}\n\nNot complete. Failed jobs:\n\n{lines}")
            continue
        record = {
            "experiment": chapter.name,
            "title": chapter.section.title,
            "text": chapter.section.text,
            **facts,
            "jobs": len(chapter.outcomes),
            "seconds": sum(outcome.seconds for outcome in chapter.outcomes),
            "findings": [asdict(finding) for finding in chapter.section.findings],
            "figures": list(chapter.section.figures),
            "tables": chapter.section.tables,
        }
        files.append(results if one else folder / f"{chapter.name}.json")
        _write(files[-1], json.dumps(record, indent=1))
        for name, figure in chapter.section.figures.items():
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=150)
        sections.append(markdown(record))
    if not one:
        findings = [asdict(f) for c in found if c.section for f in c.section.findings]
        head = ["# Re2TAL, reproduced", _told(facts), _verdicts(findings)]
        files.append(folder / REPORT)
        _write(files[-1], "\n\n".join(head + sections))
    return Done(chapters=found, files=files, sections=sections)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


# Markdown.


def markdown(record: dict[str, Any]) -> str:
    """Format an experiment's record as a section: circumstances, text, pictures and tables."""
    parts = [f"## {record['title']}", _told(record), record["text"]]
    parts += [_verdicts(record["findings"])] if record["findings"] else []
    parts += [f"![{name}]({name}.png)" for name in record["figures"]]
    for title, rows in record["tables"].items():
        parts += [f"**{title}**"] if title else []
        parts += [table(rows)]
    if record["jobs"] > 1:
        parts.append(f"{record['jobs']} jobs, {duration(record['seconds'])} of computing.")
    return "\n\n".join(part for part in parts if part)


def all_results(folder: Path) -> str:
    """Format all results in a folder, one section each."""
    files = sorted(folder.glob("*.json"))
    return "\n\n".join(markdown(json.loads(path.read_text(encoding="utf-8"))) for path in files)


def _told(facts: dict[str, Any]) -> str:
    at = f", commit {facts['commit'][:12]}" if facts["commit"] else ""
    return (
        f"`{facts['command']}`, {facts['date']}{at}: {facts['device']}, {facts['threads']} "
        f"threads, torch {facts['torch']}, Python {facts['python']}."
    )


def _verdicts(findings: Sequence[dict[str, Any]]) -> str:
    rows: list[Row] = [
        {"claim": f["claim"], "at this scale": VERDICTS[f["holds"]], "evidence": f["evidence"]}
        for f in findings
    ]
    return table(rows) if rows else "There are no verdicts."


def table(rows: Sequence[Row]) -> str:
    """Format rows, at least one, as a table; values that are lists are left out."""
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[_text(row[name]) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


# The command line of one experiment.


def run_command(
    arguments: Sequence[str], settings: Callable[..., Any], *, prog: str, output: Path
) -> None:
    """Run an experiment and print its results.

    Args:
        arguments: --output, --threads, --resume, and the experiment's own options.
        settings: class of the experiment, whose fields are its options; or function that returns
            tables, whose parameters are the options.
        prog: beginning of the command line.
        output: default JSON file of the results; its stem is the experiment's name.

    Raises:
        UserError: if jobs failed.
    """
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--output", type=Path, default=output)
    common.add_argument("--threads", type=int, default=torch.get_num_threads())
    common.add_argument("--resume", action="store_true")
    asked, own = common.parse_known_args(arguments)
    experiment = _configured(settings, own, prog)
    torch.set_num_threads(asked.threads)
    # the recorded command omits the results' path, which does not affect the measurement
    told = [word for word in arguments if word not in ("--output", str(asked.output), "--resume")]
    done = run(
        {output.stem: experiment},
        command=" ".join([prog, *told]),
        kept=_JOBS,
        results=asked.output,
        resume=asked.resume,
    )
    print("\n\n".join(done.sections), flush=True)
    done.refuse_failures()


def _configured(settings: Callable[..., Any], arguments: Sequence[str], prog: str) -> Experiment:
    import tyro

    if isinstance(settings, type):
        made: Experiment = tyro.cli(settings, args=arguments, prog=prog)
        return made
    measure: Callable[..., Tables] = settings

    @wraps(measure)
    def given(**options: Any) -> dict[str, Any]:
        return options

    return Measurement(measure=measure, arguments=tyro.cli(given, args=arguments, prog=prog))


# Runs in MLflow.


def log_outcome(parent: "Run", outcome: Outcome) -> None:
    """Make a child run for a job; a run that the job itself made becomes the child."""
    from mlflow.entities import Param, RunTag
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

    from pipelines.core.metric_log import log_metrics
    from pipelines.core.tracking import Run

    client, job = parent.client, outcome.job
    result = outcome.result if isinstance(outcome.result, dict) else {}
    if "run_id" in result:
        client.set_tag(result["run_id"], MLFLOW_PARENT_RUN_ID, parent.run_id)
        return
    experiment = client.get_run(parent.run_id).info.experiment_id
    run = Run(uri=parent.uri, run_id=client.create_run(experiment).info.run_id)
    params = [Param(name, str(value)) for name, value in job.arguments.items()]
    tags = {
        MLFLOW_PARENT_RUN_ID: parent.run_id,
        MLFLOW_RUN_NAME: f"{outcome.experiment}: {job.name}",
        "kind": outcome.experiment,
    }
    client.log_batch(run.run_id, params=params, tags=[RunTag(*tag) for tag in tags.items()])
    numbers = {safe_path(name): v for name, v in result.items() if isinstance(v, int | float)}
    log_metrics(run, numbers | {"seconds": outcome.seconds}, step=0)
    client.log_dict(run.run_id, {"result": outcome.result}, "result.json")
    if outcome.error:
        client.set_tag(run.run_id, "error", outcome.error[:5000])
    client.set_terminated(run.run_id, "FAILED" if outcome.error else "FINISHED")


def log_results(run: "Run", done: Done) -> None:
    """Log files, pictures and metrics of the experiments to their MLflow run."""
    from pipelines.core.metric_log import log_metrics

    for file in done.files:
        run.client.log_artifact(run.run_id, str(file))
    for chapter in done.chapters:
        if chapter.section is not None:
            metrics = chapter.section.metrics
            log_metrics(run, {safe_path(name): v for name, v in metrics.items()}, step=0)
