"""Memory profiles: memory of a step of a backbone or a recipe's detector, and windows that fit.

One forward and backward pass is counted, with parameters, gradients and inputs, and optionally the
optimizer's state. It is predicted with fake tensors, and measured if there is a GPU.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from matplotlib.figure import Figure

from pipelines.config.choices import choices_help, import_own, recipe_named, with_backbone
from pipelines.config.recipe import Recipe
from pipelines.config.recipes import RECIPES
from pipelines.core.checkout import script_command
from pipelines.core.gpus import free_memory
from pipelines.core.tracking import finishing, start_run
from pipelines.experiments.experiment import Row, Section, device
from pipelines.experiments.harness import Chapter, circumstances, log_results, name_of, write
from pipelines.experiments.pictures import COLOURS, tidy
from pipelines.experiments.planner import Planner, Subject, backbone_alone, of_recipe
from pipelines.training.fitting import budget_of, fit_recipe
from pipelines.training.layouts import explicit_command, without
from pipelines.training.workload import Workload
from re2tal.backbones.adapters import AdapterConfig, Addition
from re2tal.backbones.lora import LoraConfig
from re2tal.errors import UserError
from re2tal.memory import Breakdown, Origin
from re2tal.memory.fit import GIBIBYTE, parse_size
from re2tal.memory.ways import KEEPING, WAYS
from re2tal.precision import Precision

_ROWS = 6
_KEPT = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """Optional parts of a profile, and its file.

    Attributes:
        longest: also find, for each way, the longest window whose step needs at most this memory,
            such as 24GiB. (--fit keeps the window instead, and lays out a recipe's whole step.)
        optimizer: also count AdamW's moments of the trained parameters, and the EMA of all weights.
        curves: also draw memory against frames and against depth, which takes most of the time.
        json: file for all numbers; by default OUTPUT/profiles/NAME.json.
    """

    longest: str | None = None
    optimizer: bool = False
    curves: bool = True
    json: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneProfile:
    """Profile of a backbone alone.

    Attributes:
        backbone: name of the backbone; `python -m re2tal.backbones` lists them.
        frames: number of frames of a window.
        size: pixels of a frame's side.
        precision: number format of the branches.
        tuning: trained part: the whole backbone, its adapters, or LoRA's matrices.
        adapters: shape of the adapters.
        lora: shape of LoRA's matrices.
        batch: number of windows.
        experiment: MLflow experiment.
        output: folder of the results and of the default MLflow store.
    """

    backbone: str = "swin_t"
    frames: int = 768
    size: int = 224
    precision: Precision = "bfloat16"
    batch: int = 1
    tuning: Literal["full", "adapters", "lora"] = "full"
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    experiment: str = "re2tal"
    output: str = "runs"
    questions: Annotated[Questions, tyro.conf.arg(name="")] = Questions()

    def __post_init__(self) -> None:
        if min(self.frames, self.size, self.batch) < 1:
            raise ValueError(
                "Frames, size and batch must be at least 1, not "
                f"{self.frames}, {self.size} and {self.batch}."
            )

    @property
    def name(self) -> str:
        """Name of the run and its files."""
        return f"profile-{self.backbone}{'' if self.tuning == 'full' else f'-{self.tuning}'}"

    def subject(self) -> Subject:
        """Describe the backbone and its step."""
        work = Workload(
            batch=self.batch, frames=self.frames, size=self.size, precision=self.precision
        )
        additions: dict[str, Addition] = {"adapters": self.adapters, "lora": self.lora}
        addition = additions.get(self.tuning)
        subject = backbone_alone(self.backbone, work, addition)
        return replace(subject, optimizer=self.questions.optimizer)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeProfile:
    """Profile of a recipe's detector.

    Attributes:
        fit: instead of a profile, find a layout of the recipe's step for a GPU with this memory,
            such as 24GiB, or auto for the free memory of this machine's GPUs: batch, accumulation,
            size of pieces, and stored or rebuilt activations. The training command is printed. The
            step keeps its windows, frames and pixels. (--longest is about longer windows.)
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    fit: str | None = None
    questions: Annotated[Questions, tyro.conf.arg(name="")] = Questions()

    @property
    def name(self) -> str:
        """Name of the run and its files."""
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
        """Describe the detector and its step."""
        return replace(of_recipe(self.recipe), optimizer=self.questions.optimizer)


Asked = BackboneProfile | RecipeProfile


def parse(arguments: Sequence[str], description: str = "", *, prog: str = "memory.py") -> Asked:
    """Read the command line: a recipe's name and its fields, or a backbone and a step."""
    listed = "\n".join(f"  {name}" for name in RECIPES)
    option = "--model.backbone"
    description = f"{description}\nRecipes:\n\n{listed}\n\n{choices_help(option)}\n"
    arguments = import_own(arguments)
    if not arguments or arguments[0].startswith("-"):
        return tyro.cli(BackboneProfile, args=arguments, prog=prog, description=description)
    name, *rest = arguments
    recipe, rest = with_backbone(recipe_named(name, RECIPES, Recipe), rest, option)
    default = RecipeProfile(recipe=recipe)
    return tyro.cli(
        RecipeProfile, default=default, args=rest, prog=f"{prog} {name}", description=description
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Predictions and measurements of one way to train.

    Attributes:
        measured: bytes on the GPU; None without a GPU, or if it runs out of memory.
        fits: frames of the longest window within the given memory.
        frames: points of a curve: frames of a window, and bytes.
        depth: points of a curve: blocks of the deepest stage, and bytes.
    """

    predicted: Breakdown
    measured: int | None = None
    fits: int | None = None
    frames: Sequence[tuple[int, int]] = ()
    depth: Sequence[tuple[int, int]] = ()


def profile(asked: Asked) -> Section:
    """Make the profile that the command line requests; print a line of progress for each way.

    Raises:
        ValueError: if a memory size cannot be parsed, or the step cannot be run.
    """
    questions = asked.questions
    budget = parse_size(questions.longest) if questions.longest else None
    planner = Planner(asked.subject())
    found = {}
    for way in KEEPING:
        print(f"predicting: {WAYS[way].title}", flush=True)
        found[way] = Profile(
            predicted=planner.explain(way),
            fits=None if budget is None else planner.frames_that_fit(way, budget),
            frames=planner.against_frames(way) if questions.curves else (),
            depth=planner.against_depth(way) if questions.curves else (),
            measured=planner.measure(way) if torch.cuda.is_available() else None,
        )
    return section(planner.subject, found, budget, planner.blocks())


def laid_out(asked: RecipeProfile, size: str, arguments: Sequence[str]) -> Section:
    """Find a layout of a recipe's step for a memory size.

    Args:
        asked: the recipe.
        size: value of `--fit`.
        arguments: the command line, from which the training command is made.

    Raises:
        UserError: see `fit_recipe`.
    """
    budget = budget_of(size, asked.recipe, free_memory)
    found = fit_recipe(asked.recipe, budget, say=lambda line: print(line, flush=True))
    words = without(arguments, {"--json", "--longest", "--curves"})
    script = script_command("pipelines/train.py")
    command = explicit_command(script, words, found.layout, asked.recipe)
    chosen = next(one for one in found.considered if one.layout == found.layout)
    assert chosen.needs is not None
    return Section(
        title=f"{asked.recipe.name} in {budget / GIBIBYTE:.4g} GiB",
        text="\n\n".join([*found.remarks, f"`{command}`"]),
        tables={"Layouts of a worker's step that were considered, GiB": found.rows()},
        metrics={"peak_gib/fit": chosen.needs.peak / GIBIBYTE},
    )


def main(arguments: Sequence[str], description: str) -> None:
    """Make a profile or layout, print it, and write it to JSON, a picture and an MLflow run."""
    try:
        asked = parse(arguments, description)
        if isinstance(asked, RecipeProfile) and asked.fit is not None:
            found = laid_out(asked, asked.fit, arguments)
        else:
            found = profile(asked)
    except (UserError, ValueError) as problem:
        sys.exit(f"error: {problem}")
    file = Path(asked.questions.json or Path(asked.output) / "profiles" / f"{asked.name}.json")
    facts = circumstances(" ".join(["python", sys.argv[0], *arguments]), device())
    done = write([Chapter(name=asked.name, section=found, outcomes=())], facts, file)
    print(done.sections[0], flush=True)
    run = start_run(asked, output=Path(asked.output).absolute())
    with finishing(run):
        run.client.set_tag(run.run_id, "kind", "profile")
        run.client.log_text(run.run_id, done.sections[0], "profile.md")
        log_results(run, done)
    print(f"numbers    {file}\nMLflow run {run.run_id} in {run.uri}")


# Tables and the picture.


def section(
    subject: Subject, found: Mapping[str, Profile], budget: int | None, blocks: Sequence[str]
) -> Section:
    """Report on a step in all ways; residual blocks of one container are summed."""
    peaks = [_peak(WAYS[way].title, one, budget, subject) for way, one in found.items()]
    parts: list[Row] = [
        {
            "way to run it": WAYS[way].title,
            "GiB": size / GIBIBYTE,
            "%": round(100 * size / subject.size(one.predicted.memory)),
            "what": what,
        }
        for way, one in found.items()
        for what, size in (*rows(one.predicted, blocks), *_beside(one.predicted, subject))
    ]
    metrics = {
        f"peak_gib/{w}": subject.size(p.predicted.memory) / GIBIBYTE for w, p in found.items()
    }
    metrics |= {f"measured_gib/{w}": p.measured / GIBIBYTE for w, p in found.items() if p.measured}
    metrics |= {f"frames_that_fit/{w}": p.fits for w, p in found.items() if p.fits is not None}
    curves = all(one.frames for one in found.values())
    return Section(
        title=f"{subject.name}, {subject.work}",
        text=(
            "One forward and backward pass, with parameters, gradients and inputs, "
            + (
                "AdamW's moments and the EMA of the weights."
                if subject.optimizer
                else "without an optimizer."
            )
        ),
        tables={"Peak of the step": peaks, "What is in memory at the peak": parts},
        figures={f"profile-{subject.name}": _picture(subject, found, budget)} if curves else {},
        metrics=metrics,
    )


def _beside(found: Breakdown, subject: Subject) -> Iterator[tuple[str, int]]:
    if subject.optimizer:
        yield "AdamW's moments and the EMA", found.memory.kept_beside


def _peak(title: str, found: Profile, budget: int | None, subject: Subject) -> Row:
    at = found.predicted.peak
    where = f"{at.phase} of {at.module or 'the model itself'}"
    row: Row = {
        "way to run it": title,
        "trained parameters, M": found.predicted.memory.gradients / 4e6,  # float32
        "predicted, GiB": subject.size(found.predicted.memory) / GIBIBYTE,
    }
    if torch.cuda.is_available():
        size = found.measured
        row[f"measured, GiB, {name_of(device())}"] = size / GIBIBYTE if size else "out of memory"
    if budget is not None:
        row[f"frames in {budget / GIBIBYTE:.4g} GiB"] = found.fits or "none"
    parts = [asdict(origin) | {"bytes": size} for origin, size in found.predicted.parts[:_KEPT]]
    return row | {
        "the peak is in the": f"{where} ({at.operator})" if at.operator else where,
        "bytes": [asdict(found.predicted.memory)],
        "made of": parts,
        "against frames": list(found.frames),
        "against depth": list(found.depth),
    }


def rows(found: Breakdown, blocks: Sequence[str]) -> Iterator[tuple[str, int]]:
    """List the largest parts of a peak, and the sum of the rest; see `section`."""
    sums: Counter[str] = Counter()
    for origin, size in found.parts:
        sums[_what(origin, blocks)] += size
    listed = sums.most_common(_ROWS)
    yield from listed
    if len(sums) > len(listed):
        yield "everything else", found.memory.peak - sum(size for _, size in listed)


def _what(origin: Origin, blocks: Sequence[str]) -> str:
    if origin.kind != "activations":
        return origin.kind
    module = origin.module
    for block in blocks:
        if module == block or module.startswith(f"{block}."):
            module = f"{block.rpartition('.')[0]}.*{module.removeprefix(block)}"
            break
    return f"{origin.phase} of {module or 'the model itself'}: {origin.operator}"


def _picture(subject: Subject, found: Mapping[str, Profile], budget: int | None) -> Figure:
    """Draw memory against frames and against depth, one curve per way."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way, one in found.items():
        title = WAYS[way].title
        for axes, points in ((left, one.frames), (right, one.depth)):
            counts, sizes = zip(*points, strict=True)
            gib = [size / GIBIBYTE for size in sizes]
            axes.plot(counts, gib, "o-", color=COLOURS[title], markersize=4, label=title)
    for axes, label in ((left, "frames of a window"), (right, "blocks of the deepest stage")):
        if budget is not None:
            axes.axhline(budget / GIBIBYTE, color="0.6", linestyle="--", linewidth=1)
        axes.set(xlabel=label, ylabel="predicted peak in GiB", ylim=(0, None), xlim=(0, None))
        tidy(axes)
    left.legend(frameon=False)
    figure.suptitle(f"{subject.name}, {subject.work}")
    return figure
