"""Results of jobs, kept in files: the same command goes on with what it has."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pipelines.experiments.experiment import Job, Outcome
from re2tal.atomic import replacing

_ROOT = Path(__file__).parents[2]


def code_fingerprint() -> str:
    """Hash of all code that a result may depend on."""
    digest = hashlib.sha256()
    for package in ("re2tal", "pipelines"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(_ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """A folder of results.

    Attributes:
        folder: is made.
        code: fingerprint of the code; what other code computed is computed again.
        device: what computes; likewise.
    """

    folder: Path
    code: str
    device: str

    def find(self, experiment: str, job: Job) -> Outcome | None:
        """What a job with the same arguments came to; None if it was not done, or failed.

        Args:
            experiment: name of its experiment.
            job: what is to be done.
        """
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
        """Writes what a job came to, unless it failed.

        Args:
            outcome: of the job.
        """
        if outcome.error:
            return
        path = self._path(outcome.experiment, outcome.job)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "job": outcome.job.name,
            "arguments": outcome.job.arguments,
            "code": self.code,
            "device": self.device,
            "seconds": outcome.seconds,
            "result": outcome.result,
        }
        with replacing(path) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def _path(self, experiment: str, job: Job) -> Path:
        what = json.dumps([job.name, dict(job.arguments)], sort_keys=True)
        return self.folder / experiment / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
