"""The command line of one experiment: common options, and its own."""

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
"""Function that makes an experiment from its own options."""


def of_function(measure: Callable[..., Tables], prog: str) -> Configure:
    """Make a function's parameters the options of an experiment.

    Args:
        measure: function that returns tables.
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
        configure: function that makes the experiment from its own options.
        prog: beginning of the command line.
        output: JSON file of the results, unless `--output` names one; its name is the experiment's.

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
    # The results' path does not affect the measurement, so the recorded command leaves it out.
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
    """Raise an error if any jobs failed.

    Raises:
        UserError: with their number.
    """
    if failures:
        raise UserError(
            f"{failures} jobs failed, as listed above; the same command tries them again."
        )
