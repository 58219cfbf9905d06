"""The command line of one experiment: what all of them take, and its own options."""

import argparse
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import tyro

from pipelines.experiments.experiment import Experiment, Measurement, Tables
from pipelines.experiments.harness import run
from re2tal.errors import UserError

JOBS = Path("runs/experiments")
"""Folder of results of jobs."""

Configure = Callable[[Sequence[str]], Experiment]
"""Makes an experiment of its own options."""


def of_function(measure: Callable[..., Tables], prog: str) -> Configure:
    """Make a function's parameters the options of an experiment.

    Args:
        measure: function whose result is tables.
        prog: beginning of the command line.
    """

    @wraps(measure)
    def given(**options: Any) -> dict[str, Any]:
        return options

    def configure(arguments: Sequence[str]) -> Experiment:
        options = tyro.cli(given, args=arguments, prog=prog)
        return Measurement(measure=measure, arguments=options)

    return configure


def carry_out(arguments: Sequence[str], configure: Configure, *, prog: str, output: Path) -> None:
    """Run an experiment and print its results.

    Args:
        arguments: --output, --threads, --resume, and the experiment's own options.
        configure: makes the experiment of the latter.
        prog: beginning of the command line.
        output: JSON file of the results, unless `--output` names one; it bears the name of the
            experiment.

    Raises:
        UserError: if jobs failed.
    """
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--output", type=Path, default=output)
    common.add_argument("--threads", type=int, default=torch.get_num_threads())
    common.add_argument("--resume", action="store_true")
    asked, own = common.parse_known_args(arguments)
    experiment = configure(own)
    torch.set_num_threads(asked.threads)
    # Where the file lies is no circumstance of the measurement.
    told = [word for word in arguments if word not in ("--output", str(asked.output), "--resume")]
    command = " ".join([prog, *told])
    done = run(
        {output.stem: experiment},
        command=command,
        kept=JOBS,
        results=asked.output,
        resume=asked.resume,
    )
    print("\n\n".join(done.sections), flush=True)
    refuse_failures(done.failures)


def refuse_failures(failures: int) -> None:
    """End with a sentence if jobs failed.

    Raises:
        UserError: if any did.
    """
    if failures:
        raise UserError(
            f"{failures} pieces of work failed, as listed above; the same command tries them again."
        )
