"""The command line of `memory.py`."""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from pipelines.config.choices import choices_help, import_own, recipe_named, with_backbone
from pipelines.config.recipe import Precision, Recipe
from pipelines.config.recipes import RECIPES
from pipelines.core.tracking import Run, finishing, flatten, log_metrics, start_run
from re2tal.memory.fit import parse_size
from pipelines.experiments.planner import Planner
from pipelines.experiments.plan_report import Profile, picture, print_profile
from pipelines.training.workload import Workload
from pipelines.experiments.subject import Subject, backbone_alone, of_recipe
from re2tal.memory.ways import TITLES, WAYS
from re2tal.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What else to find out, and where to write it.

    Attributes:
        fits: also find the longest window whose step fits this much memory, such as 24GiB.
        curves: also draw memory against frames and against depth; most of the time goes there.
        json: file of all numbers; by default OUTPUT/profiles/NAME.json.
    """

    fits: str | None = None
    curves: bool = True
    json: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneProfile:
    """A backbone by itself.

    Attributes:
        backbone: its name, of those that `python -m re2tal.backbones` lists.
        frames: of a window.
        size: pixels of a frame's side.
        precision: what the branches compute in.
        batch: windows.
        experiment: MLflow experiment.
        output: folder of the results and of the default MLflow store.
    """

    backbone: str = "swin_t"
    frames: int = 768
    size: int = 224
    precision: Precision = "bfloat16"
    batch: int = 1
    experiment: str = "re2tal"
    output: str = "runs"
    questions: Annotated[Questions, tyro.conf.arg(name="")] = Questions()

    def __post_init__(self) -> None:
        if min(self.frames, self.size, self.batch) < 1:
            raise ValueError(
                "The frames, size and batch of a step are at least 1, but these are "
                f"{self.frames}, {self.size} and {self.batch}."
            )

    @property
    def name(self) -> str:
        """Of the run and its files."""
        return f"profile-{self.backbone}"

    def subject(self) -> Subject:
        """What is profiled."""
        work = Workload(
            batch=self.batch, frames=self.frames, size=self.size, precision=self.precision
        )
        return backbone_alone(self.backbone, work)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeProfile:
    """The detector of a recipe.

    Attributes:
        recipe: the recipe.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    questions: Annotated[Questions, tyro.conf.arg(name="")] = Questions()

    @property
    def name(self) -> str:
        """Of the run and its files."""
        return f"profile-{self.recipe.name}"

    @property
    def experiment(self) -> str:
        """MLflow experiment."""
        return self.recipe.experiment

    @property
    def output(self) -> str:
        """Folder of the results and of the default MLflow store."""
        return self.recipe.output

    def subject(self) -> Subject:
        """What is profiled."""
        return of_recipe(self.recipe)


def parse(arguments: Sequence[str], description: str = "") -> BackboneProfile | RecipeProfile:
    """Reads the command line: a recipe's name and its fields, or a backbone and a step.

    Args:
        arguments: without the program's name.
        description: printed above the help.
    """
    listed = "\n".join(f"  {name}" for name in RECIPES)
    option = "--model.backbone"
    description = f"{description}\nRecipes:\n\n{listed}\n\n{choices_help(option)}\n"
    arguments = import_own(arguments)
    if not arguments or arguments[0].startswith("-"):
        return tyro.cli(BackboneProfile, args=arguments, prog="memory.py", description=description)
    name, *rest = arguments
    recipe, rest = with_backbone(recipe_named(name, RECIPES, Recipe), rest, option)
    return tyro.cli(
        RecipeProfile,
        default=RecipeProfile(recipe=recipe),
        args=rest,
        prog=f"memory.py {name}",
        description=description,
    )


def profile(asked: BackboneProfile | RecipeProfile) -> Profile:
    """Predicts what was asked for, with a line of progress for each way.

    Args:
        asked: what to profile.

    Raises:
        ValueError: if a size is none, or the step cannot be run.
    """
    questions = asked.questions
    budget = parse_size(questions.fits) if questions.fits else None
    planner = Planner(asked.subject())
    found = Profile(subject=planner.subject, blocks=planner.blocks(), budget=budget)
    for way in WAYS:
        print(f"predicting: {TITLES[way]}", flush=True)
        found.predicted[way] = planner.explain(way)
        if budget is not None:
            found.fits[way] = planner.frames_that_fit(way, budget)
        if questions.curves:
            found.frames[way] = planner.against_frames(way)
            found.depth[way] = planner.against_depth(way)
        if torch.cuda.is_available():
            found.measured[way] = planner.measure(way)
    return found


def write(asked: BackboneProfile | RecipeProfile, found: Profile) -> Path:
    """Writes the JSON file.

    Args:
        asked: what was profiled.
        found: the result.

    Returns:
        The file.
    """
    path = Path(asked.questions.json or Path(asked.output) / "profiles" / f"{asked.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found.record(dict(_settings(asked))), indent=2) + "\n")
    return path


def track(asked: BackboneProfile | RecipeProfile, found: Profile, file: Path) -> Run:
    """Makes an MLflow run of a profile.

    Args:
        asked: what was profiled.
        found: the result.
        file: the JSON file.
    """
    run = start_run(asked, output=Path(asked.output).absolute())
    with finishing(run):
        client = run.client
        client.set_tag(run.run_id, "kind", "profile")
        log_metrics(run, found.metrics(), step=0)
        client.log_artifact(run.run_id, str(file))
        text = io.StringIO()
        print_profile(found, Console(width=120, file=text))
        client.log_text(run.run_id, text.getvalue(), "profile.txt")
        if found.frames:
            client.log_figure(run.run_id, picture(found), "pictures/memory.png")
    return run


def main(arguments: Sequence[str], description: str) -> None:
    """Predicts, prints, writes and tracks.

    Args:
        arguments: without the program's name.
        description: of the program, for its help.
    """
    try:
        asked = parse(arguments, description)
        found = profile(asked)
    except (UserError, ValueError) as problem:
        sys.exit(f"error: {problem}")
    console = Console()
    print_profile(found, Console(width=max(100, console.width)))
    file = write(asked, found)
    run = track(asked, found, file)
    print(f"numbers    {file}\nMLflow run {run.run_id} in {run.uri}")


def _settings(asked: BackboneProfile | RecipeProfile) -> list[tuple[str, Any]]:
    plain = (str, int, float, bool, type(None))
    return [(name, v if isinstance(v, plain) else str(v)) for name, v in flatten(asked)]
