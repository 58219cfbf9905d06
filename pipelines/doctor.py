"""Check an installation or a cluster, and report what to repair.

  python pipelines/doctor.py
  RAY_ADDRESS=HEAD:6379 python pipelines/doctor.py --output s3://bucket/runs --videos FOLDER

It checks versions, machines, GPUs, the network between two workers, the output, MLflow and
decoding, on every node of the cluster that RAY_ADDRESS names, or of a Ray that it starts. Each
finding is one line: ok, note, or FAIL with advice; the exit code is 1 if a check failed. The only
trace that it leaves is a run tagged re2tal.doctor in the experiment re2tal-doctor of an existing
MLflow store.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

# No other imports here: a package may be missing, which this script must report.
from pipelines.diagnostics.findings import (
    Finding,
    check_missing,
    check_versions,
    note,
    requirements,
    run_check,
    summary,
)

Check = Callable[[Any], Iterable[Finding]]  # takes a `Cluster`, which cannot be imported yet
_GRACE = 10.0  # extra seconds for a check to report its own time-out


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Output and videos to check.

    Attributes:
        output: folder of runs, as in train.py; a path or a URI.
        videos: files, folders, patterns, or folders of shards; paths or URIs. Each node decodes the
            first video.
        timeout: seconds to wait for a node, a store or a server before it counts as failed.
    """

    output: str = "runs"
    videos: tuple[str, ...] = ()
    timeout: float = 60.0


def parse(arguments: Sequence[str]) -> DoctorConfig:
    """Read the command line, without the program's name."""
    import tyro  # see above

    return tyro.cli(DoctorConfig, args=arguments, prog="doctor.py", description=__doc__)


def diagnose(config: DoctorConfig) -> Iterator[tuple[str, Finding]]:
    """Run all checks except that of missing packages; yield each finding with its check's name."""
    from pipelines.core.storage import absolute  # see above
    from pipelines.diagnostics import frames, machines, nodes, writing

    yield from (("versions", finding) for finding in check_versions(requirements()))
    output = absolute(config.output)
    with nodes.joined(seconds=config.timeout) as (finding, cluster):
        yield "ray", finding
        on_nodes: dict[str, Check] = {
            "software": machines.check_software,
            "machine": machines.check_machines,
            "gpu": machines.check_gpus,
            "all-reduce": nodes.check_all_reduce,
        }
        anywhere: dict[str, Check] = {
            "storage": partial(writing.check_output, output),
            "mlflow": partial(writing.check_mlflow, output),
            "video": frames.check_video,
            "videos": partial(frames.check_own, config.videos),
        }
        # some checks wait for two answers, one after the other
        seconds = 2 * config.timeout + _GRACE
        for name, check in (on_nodes | anywhere).items():
            if name in on_nodes and not cluster.nodes:
                yield name, note("Not tried, because there is no Ray.")
                continue
            for finding in run_check(partial(check, cluster), seconds=seconds):
                yield name, finding


def show(findings: Iterable[tuple[str, Finding]]) -> int:
    """Print findings, each with its check's name, and a summary; return the exit code."""
    seen = []
    for check, finding in findings:
        print(f"{finding.verdict:<4}  {check:<10}  {' '.join(finding.text.split())}", flush=True)
        seen.append(finding)
    print(summary(seen))
    return int(any(finding.verdict == "FAIL" for finding in seen))


def main(arguments: Sequence[str]) -> int:
    """Run the checks, print their findings, and return the exit code."""
    missing = check_missing(requirements())
    if missing:
        return show(("versions", finding) for finding in missing)
    return show(diagnose(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
