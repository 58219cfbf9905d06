"""The paper's five experiments as one command: choice and sizes."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from pipelines.experiments import accuracy, exactness, memory, speed, tal
from pipelines.experiments.accuracy import Accuracy
from pipelines.experiments.exactness import Exactness
from pipelines.experiments.experiment import Experiment, Outcome
from pipelines.experiments.harness import Done, Execute, execute_here, run
from pipelines.experiments.memory import Memory
from pipelines.experiments.speed import Speed
from pipelines.experiments.tal import Tal

Name = Literal["memory", "accuracy", "tal", "exactness", "speed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """The paper's experiments.

    Attributes:
        name: name of the MLflow run.
        experiment: MLflow experiment.
        output: folder of the report, of the results and of the default MLflow store.
        only: experiments to run; by default all five.
        quick: small sizes and few seeds, only to show that everything runs.
        resume: reuse results of jobs that the same code computed before with the same settings.
        memory: experiment 1, memory consumption is reduced.
        accuracy: experiment 2, accuracy is preserved.
        tal: experiment 3, end to end improves over features.
        exactness: experiment 4, gradients equal those of stored activations.
        speed: experiment 5, the cost in time.
    """

    name: str = "reproduce"
    experiment: str = "re2tal-reproduce"
    output: str = "runs"
    only: tuple[Name, ...] = ("memory", "accuracy", "tal", "exactness", "speed")
    quick: bool = False
    resume: bool = True
    memory: Memory = field(default_factory=Memory)
    accuracy: Accuracy = field(default_factory=Accuracy)
    tal: Tal = field(default_factory=Tal)
    exactness: Exactness = field(default_factory=Exactness)
    speed: Speed = field(default_factory=Speed)

    @property
    def experiments(self) -> dict[str, Experiment]:
        """Chosen experiments by name, in the order of `only`."""
        return {name: getattr(self, name) for name in self.only}

    @property
    def folder(self) -> Path:
        """Folder of the report."""
        return Path(self.output) / ("reproduction-quick" if self.quick else "reproduction")


def quick() -> Reproduction:
    """Configure the smallest size of all experiments."""
    return Reproduction(
        quick=True,
        memory=memory.quick(),
        accuracy=accuracy.quick(),
        tal=tal.quick(),
        exactness=exactness.quick(),
        speed=speed.quick(),
    )


def parse(
    arguments: Sequence[str], description: str, *, prog: str = "reproduce.py"
) -> Reproduction:
    """Read the command line.

    Args:
        arguments: arguments without the program's name; arguments after "--" are options of
            `train.py` for the recipes of the experiment `tal`.
        description: text above the help.
        prog: name of the program.
    """
    own, options = list(arguments), None
    if "--" in own:
        at = own.index("--")
        own, options = own[:at], tuple(own[at + 1 :])
    default = quick() if "--quick" in own else Reproduction()
    asked = tyro.cli(Reproduction, default=default, args=own, prog=prog, description=description)
    if options is None:
        return asked
    return replace(asked, tal=replace(asked.tal, options=options))


def carry_out(
    asked: Reproduction,
    execute: Execute = execute_here,
    *,
    seen: Callable[[Outcome], object] = lambda _: None,
) -> Done:
    """Run the experiments, and write and print the report; see `harness.run`."""
    return run(
        asked.experiments,
        command=shlex.join(["python", *sys.argv]),
        kept=asked.folder / "jobs",
        results=asked.folder,
        execute=execute,
        resume=asked.resume,
        seen=seen,
    )
