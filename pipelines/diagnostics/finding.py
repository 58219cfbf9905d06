"""What a check found: all is well, something to know, or something to mend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A line of the report.

    Attributes:
        check: what was looked at, in a word.
        verdict: "ok", "note" for what hinders no run, or "FAIL".
        text: a sentence; of a failure: what is wrong, where, and what to do.
    """

    check: str
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<4}  {self.check:<10}  {' '.join(self.text.split())}"


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check=check, verdict="ok", text=text)


def note(check: str, text: str) -> Finding:
    """Something to know, which hinders no run."""
    return Finding(check=check, verdict="note", text=text)


def fail(check: str, text: str) -> Finding:
    """Something to mend."""
    return Finding(check=check, verdict="FAIL", text=text)


def summary(findings: Sequence[Finding]) -> str:
    """The last line of a report.

    Args:
        findings: all of them.
    """
    verdicts = [finding.verdict for finding in findings]
    counts = f"{verdicts.count('ok')} ok, {verdicts.count('note')} to know"
    failed = verdicts.count("FAIL")
    if failed:
        return f"{failed} to mend ({counts}): see the lines that begin with FAIL."
    return f"Nothing to mend ({counts})."
