"""The report: what was claimed, what came out, and the numbers and pictures behind it."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipelines.core.clock import duration
from pipelines.experiments.experiment import Experiment, Finding, Outcome, Section
from re2tal.atomic import replacing
from pipelines.experiments.benchmarking import Row, table

REPORT = "report.md"
NUMBERS = "report.json"
VERDICTS = {True: "holds", False: "does not hold", None: "cannot be told"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """Under which numbers were measured.

    Attributes:
        command: that was given.
        device: what computed.
        commit: of the repository; empty if that is not known.
    """

    command: str
    device: str
    commit: str

    def __str__(self) -> str:
        at = f", commit {self.commit[:12]}" if self.commit else ""
        return (
            f"`{self.command}`, {datetime.now(UTC).date().isoformat()}{at}: {self.device}, "
            f"{os.cpu_count()} cores, torch {torch.__version__}, "
            f"Python {platform.python_version()}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Chapter:
    """What the report holds of one experiment.

    Attributes:
        name: of the experiment.
        section: None if jobs of it failed.
        outcomes: of all its jobs.
    """

    name: str
    section: Section | None
    outcomes: Sequence[Outcome]

    @property
    def failed(self) -> list[Outcome]:
        """Jobs that did not come to a result."""
        return [outcome for outcome in self.outcomes if outcome.error]


def chapters(experiments: Sequence[Experiment], outcomes: Sequence[Outcome]) -> list[Chapter]:
    """Makes of the results what the report says.

    Args:
        experiments: in the order of the report.
        outcomes: of all their jobs.
    """
    found = []
    for experiment in experiments:
        own = [outcome for outcome in outcomes if outcome.experiment == experiment.name]
        whole = not any(outcome.error for outcome in own)
        results = {outcome.job.name: outcome.result for outcome in own}
        section = experiment.section(results) if whole else None
        found.append(Chapter(name=experiment.name, section=section, outcomes=own))
    return found


def write_report(folder: Path, found: Sequence[Chapter], circumstances: Circumstances) -> Path:
    """Writes the report, its pictures, and the same numbers as JSON.

    Args:
        folder: where to; files of the same names are replaced.
        found: the chapters.
        circumstances: of all numbers.

    Returns:
        The report, Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# Re2TAL, reproduced", str(circumstances), _summary(found)]
    for chapter in found:
        if chapter.section is None:
            lines = [f"- {o.job.name}: {o.error.splitlines()[0]}" for o in chapter.failed]
            parts += [f"## {chapter.name}", "It is not complete. What failed:", "\n".join(lines)]
            continue
        parts += _written(chapter.section, folder)
        seconds = sum(outcome.seconds for outcome in chapter.outcomes)
        parts.append(f"{len(chapter.outcomes)} jobs, {duration(seconds)} of computing.")
    numbers = {"circumstances": str(circumstances), "experiments": _numbers(found)}
    for name, text in (
        (NUMBERS, json.dumps(numbers, indent=1)),
        (REPORT, "\n\n".join(parts)),
    ):
        with replacing(folder / name) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    return folder / REPORT


def _numbers(found: Sequence[Chapter]) -> dict[str, Any]:
    """Of the experiments that are complete, what the report says."""
    return {
        chapter.name: {
            "text": chapter.section.text,
            "findings": [asdict(finding) for finding in chapter.section.findings],
            "tables": chapter.section.tables,
            "jobs": len(chapter.outcomes),
            "seconds": sum(outcome.seconds for outcome in chapter.outcomes),
        }
        for chapter in found
        if chapter.section is not None
    }


def _summary(found: Sequence[Chapter]) -> str:
    rows = [
        _verdict(finding)
        for chapter in found
        if chapter.section is not None
        for finding in chapter.section.findings
    ]
    return table(rows) if rows else "Nothing came out."


def _verdict(finding: Finding) -> Row:
    return {
        "claim": finding.claim,
        "at this scale": VERDICTS[finding.holds],
        "evidence": finding.evidence,
    }


def _written(section: Section, folder: Path) -> list[str]:
    parts = [f"## {section.title}", section.text]
    for name, figure in section.figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        parts.append(f"![{name}]({name}.png)")
    for title, rows in section.tables.items():
        parts += [f"**{title}**", table(rows)]
    return parts
