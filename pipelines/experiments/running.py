"""From the configuration to the report, whatever does the jobs."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.core.tracking import git_commit
from pipelines.experiments.device import device
from pipelines.experiments.execution import Execute, carry_out
from pipelines.experiments.experiment import Outcome
from pipelines.experiments.records import Records, code_fingerprint
from pipelines.experiments.report import (
    VERDICTS,
    Chapter,
    Circumstances,
    chapters,
    write_report,
)
from pipelines.experiments.settings import Reproduction
from pipelines.experiments.benchmarking import name_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduced:
    """What came out.

    Attributes:
        chapters: of the report.
        report: the file.
    """

    chapters: Sequence[Chapter]
    report: Path

    @property
    def failures(self) -> int:
        """How many jobs failed."""
        return sum(len(chapter.failed) for chapter in self.chapters)


def reproduce(
    asked: Reproduction, execute: Execute, *, seen: Callable[[Outcome], object] | None = None
) -> Reproduced:
    """Does the experiments, and writes and prints what came out.

    Args:
        asked: which, and how large.
        execute: does their jobs.
        seen: is given each outcome as it is known.
    """
    folder = Path(asked.output) / ("reproduction-quick" if asked.quick else "reproduction")
    computing = name_of(device())
    records = Records(folder=folder / "results", code=code_fingerprint(), device=computing)
    outcomes = []
    for outcome in carry_out(asked.experiments, execute, records, resume=asked.resume):
        outcomes.append(outcome)
        if seen is not None:
            seen(outcome)
    found = chapters(asked.experiments, outcomes)
    circumstances = Circumstances(
        command=shlex.join(["python", *sys.argv]),
        device=computing,
        commit=git_commit(Path(__file__).parent) or "",
    )
    report = write_report(folder, found, circumstances)
    for chapter in found:
        for finding in chapter.section.findings if chapter.section else ():
            print(f"{VERDICTS[finding.holds]:<16} {finding.claim}: {finding.evidence}")
        for outcome in chapter.failed:
            print(f"FAILED           {chapter.name}, {outcome.job.name}: {outcome.error}")
    print(f"report: {report}", flush=True)
    return Reproduced(chapters=found, report=report)
