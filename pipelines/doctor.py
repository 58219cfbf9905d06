"""Looks at an installation or a cluster, and says what to mend.

  python pipelines/doctor.py
  RAY_ADDRESS=HEAD:6379 python pipelines/doctor.py --output s3://bucket/runs --videos FOLDER

Versions, machines, GPUs, the output, MLflow, the network between two workers, and decoding: each on
every node of the cluster that RAY_ADDRESS names, else of a Ray that is started for it. One line a
finding: ok, note, or FAIL with what to do; the exit code is 1 if anything failed. Nothing stays of
what it tries out, but that an MLflow server keeps a deleted run until `mlflow gc`.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Not more: a package may be missing, and this is what tells so.
from pipelines.diagnostics.finding import Finding, summary
from pipelines.diagnostics.missing import check_missing, stated_requirements


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """What to look at.

    Attributes:
        output: where runs go, as in train.py; a path or a URI.
        videos: files, folders, patterns, or folders of shards, of which each node decodes the first
            video; paths or URIs.
        timeout: seconds to wait for a node, a store or a server before it counts as failed.
    """

    output: str = "runs"
    videos: tuple[str, ...] = ()
    timeout: float = 60.0


def parse(arguments: Sequence[str]) -> DoctorConfig:
    """Reads the command line.

    Args:
        arguments: without the program's name.
    """
    import tyro  # see above

    return tyro.cli(DoctorConfig, args=arguments, prog="doctor.py", description=__doc__)


def diagnose(config: DoctorConfig) -> Iterator[Finding]:
    """Runs all checks, one after the other.

    Args:
        config: what to look at.

    Yields:
        What they find.
    """
    from pipelines.diagnostics.examination import examine_all  # see above
    from pipelines.diagnostics.versions import check_installation

    yield from check_installation()
    yield from examine_all(config.output, config.videos, seconds=config.timeout)


def show(findings: Iterator[Finding]) -> int:
    """Prints findings as they come, and a last line about all of them.

    Args:
        findings: of the checks.

    Returns:
        The exit code.
    """
    all_of_them = []
    for finding in findings:
        print(finding, flush=True)
        all_of_them.append(finding)
    print(summary(all_of_them))
    return int(any(finding.verdict == "FAIL" for finding in all_of_them))


def main(arguments: Sequence[str]) -> int:
    """Looks, and prints what was found.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code.
    """
    missing = check_missing(stated_requirements())
    return show(iter(missing) if missing else diagnose(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
