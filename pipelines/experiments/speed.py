"""The paper's fifth question: the cost of reversible training in time, and that of `verify`.

All ways to train take turns in every round, on one model in one process, so that the ratios of a
round compare the ways whatever else the machine does.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pipelines.experiments.experiment import (
    Finding,
    Job,
    Result,
    Row,
    Section,
    Tables,
    device,
    refuse_unknown,
)
from pipelines.experiments.harness import name_of
from pipelines.experiments.models import LONG, MODELS, SMALL, STACKS, build, stack, swin_stack
from pipelines.experiments.pictures import COLOURS, lines, tidy
from pipelines.experiments.timing import Times, compared, paired, ratios, timed
from pipelines.training.workload import Workload
from re2tal.errors import UserError
from re2tal.memory import MemoryMeter, measure_activations, work_of_pieces
from re2tal.memory.ways import PLAIN, WAYS, prepared
from re2tal.reversible import rewire
from re2tal.reversible.watch import Watch, Witness

_STEPS, _DEPTH = "steps", "depth"

_ONE_MORE_FORWARD = 4 / 3  # times plain, if a backward takes twice as long as a forward
_LITTLE = 0.05  # share of plain training's growth, parameters and gradients aside

_MB = 1e6
_PEAK = "peak, MB"
_WEIGHTS = "parameters and gradients, MB"

# A stage large enough to keep a GPU busy.
_ON_GPU: dict[str, Any] = {"width": 192, "heads": 6, "grid": (64, 28, 28)}

_PREPARE = {name: way.prepare for name, way in WAYS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Time of a training step, in five ways, and its growth with depth.

    Attributes:
        models: networks of `pipelines/experiments/models.py`, trained in float32 on a CPU and in
            bfloat16 on a GPU; by default swin3d_t, and slowfast_50 on a CPU or slowfast_101 on a
            GPU.
        frames: length of the single clip in the batch; by default 32, on a GPU 256.
        size: height and width of a frame; by default 112, on a GPU 224.
        depths: even numbers of residual branches of a stack of Swin blocks; none leaves it out.
        grid: tokens of the stack in time, height and width on a CPU.
        rounds: number of turns of each way, at least 3.
    """

    models: tuple[str, ...] = ()
    frames: int | None = None
    size: int | None = None
    depths: tuple[int, ...] = (12, 24, 48, 96)
    grid: tuple[int, int, int] = (4, 16, 16)
    rounds: int = 5

    def __post_init__(self) -> None:
        refuse_unknown("model", self.models, MODELS)
        odd = [depth for depth in self.depths if depth % 2]
        if odd:
            raise UserError(f"Depths must be even, two branches per Swin block, not {odd[0]}.")
        if self.rounds < 3:
            raise UserError(f"Quartiles need 3 rounds, but rounds is {self.rounds}.")

    def jobs(self) -> Sequence[Job]:
        """List whole models, and stacks of several depths."""
        models = {"models": list(self.models), "frames": self.frames, "size": self.size}
        models["rounds"] = self.rounds
        stacks = {"depths": sorted(self.depths), "grid": self.grid, "rounds": self.rounds}
        found = [Job(name=_STEPS, work=steps, arguments=models, alone=True)]
        if self.depths:
            found.append(Job(name=_DEPTH, work=against_depth, arguments=stacks, alone=True))
        return found

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report on time."""
        models, stacks = results[_STEPS], results.get(_DEPTH)
        rows = of_models(models["times"])
        tables = {f"Time of a step: {step}": r for step, r in rows.items()}
        found = [
            finding
            for step, times in models["times"].items()
            for finding in verdicts(step.partition(",")[0], times)
        ]
        figures = {"speed": _ratios(rows)}
        text = (
            f"A step is a forward and backward pass without an optimizer, on {models['device']}. "
            f"The ways take turns in one process, in {self.rounds} rounds after a warm-up round; "
            "ratios are medians over the rounds, with their quartiles."
        )
        if stacks:
            width, grid = stacks["stage"]["width"], "x".join(map(str, stacks["stage"]["grid"]))
            tables["Depth"] = _of_stacks(sorted(self.depths), stacks)
            found.append(_growth(sorted(self.depths), stacks))
            figures["speed_depth"] = _over_depth(tables["Depth"])
            text += (
                " Against depth: a stack of Video Swin blocks of width "
                f"{width} on {grid} tokens; its peak is that of all tensors, including parameters "
                "and gradients. PaReprop's (arXiv 2306.09342) overlap of one branch's "
                "recomputation with the next one's gradients on two CUDA streams is not tried: it "
                "can be judged only on a GPU."
            )
        metrics = {
            f"speed/{step.partition(',')[0]}/{row['training'].replace(',', '')}": row["of plain"]
            for step, of_step in rows.items()
            for row in of_step
        }
        return Section(
            title="What it costs in time",
            text=text,
            findings=found,
            tables=tables,
            figures=figures,
            metrics=metrics,
        )


def quick() -> Speed:
    """Configure a toy model and shallow stacks, only to show that everything runs."""
    return Speed(models=("toy_swin",), frames=8, size=32, depths=(4, 12), grid=(4, 8, 8), rounds=3)


# Jobs.


def steps(
    *, models: Sequence[str], frames: int | None, size: int | None, rounds: int
) -> dict[str, Any]:
    """Time a step of whole models; see `Speed` for the defaults.

    Returns:
        "device"; "times", the seconds of every round by step and way.
    """
    here, times = device(), {}
    on_gpu = here.type == "cuda"
    usual = replace(LONG, frames=256) if on_gpu else SMALL
    work = replace(usual, frames=frames or usual.frames, size=size or usual.size)
    for name in models or ("swin3d_t", "slowfast_101" if on_gpu else "slowfast_50"):
        model, inputs = build(name).to(here), work.noise(here)
        step = lambda: work.step(model, *inputs)  # noqa: E731, B023
        times[f"{name}, {work}"] = paired(model, step, _PREPARE, rounds=rounds)
    return _told(here) | {"times": times}


def against_depth(*, depths: Sequence[int], grid: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measure times and peaks of a step of stacks of Swin blocks.

    Args:
        depths: numbers of residual branches.
        grid: tokens in time, height and width, if there is no GPU.
        rounds: number of turns of each way.

    Returns:
        "device"; "stage", the shape of the stack; and for each depth "times", the seconds of every
        round by way, "peaks", the bytes by way, and "parameters", the bytes of the parameters.
    """
    here = device()
    on_cpu = {"width": 64, "heads": 2, "grid": tuple(grid)}
    stage = _ON_GPU if here.type == "cuda" else on_cpu
    times, peaks, parameters = [], [], []
    for depth in depths:
        stack, x = swin_stack(depth, **stage)
        stack, x = stack.to(here), x.to(here)
        times.append(paired(stack, lambda: _step(stack, x), _PREPARE, rounds=rounds))  # noqa: B023
        peaks.append({name: _peak(stack, x, name) for name in WAYS})
        parameters.append(sum(p.nbytes for p in stack.parameters()))
    found = {"stage": stage, "times": times, "peaks": peaks, "parameters": parameters}
    return _told(here) | found


def _step(stack: nn.Module, x: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        output = stack(x)
    output.float().sum().backward()


def _peak(stack: nn.Module, x: Tensor, way: str) -> int:
    """Measure the peak bytes of tensors in a step, including parameters and gradients."""
    with prepared(stack, WAYS[way].prepare):
        if not x.is_cuda:
            return measure_activations(stack, x).peak
        stack.zero_grad(set_to_none=True)
        with MemoryMeter(x.device) as meter:
            _step(stack, x)
    assert meter.cuda_peak is not None
    return meter.cuda_peak


def _told(here: torch.device) -> dict[str, Any]:
    threads = "" if here.type == "cuda" else f", {torch.get_num_threads()} threads"
    return {"device": f"{name_of(here)}{threads}"}


# Tables and verdicts.


def of_models(times: Mapping[str, Times]) -> Tables:
    """Tabulate the times of each step, given by step and way."""
    return {step: _against_plain(of_ways) for step, of_ways in times.items()}


def _against_plain(times: Times) -> list[Row]:
    return [row | {"training": WAYS[row["training"]].title} for row in compared(times, PLAIN)]


def _of_stacks(depths: Sequence[int], stacks: Result) -> list[Row]:
    """Tabulate one row for each depth and way."""
    columns = zip(depths, stacks["times"], stacks["peaks"], stacks["parameters"], strict=True)
    return [
        {"branches": depth, **row, _PEAK: peaks[way] / _MB, _WEIGHTS: 2 * weights / _MB}
        for depth, times, peaks, weights in columns
        for way, row in zip(times, _against_plain(times), strict=True)
    ]


def verdicts(model: str, times: Times) -> list[Finding]:
    """Judge ours against checkpoints and plain training, by the seconds of every round."""
    more = f"{model}: ours costs at most one more forward pass, a third of plain training"
    return [
        _at_most(f"{model}: ours takes no longer than checkpoints", times, "checkpointed", 1),
        _at_most(more, times, PLAIN, _ONE_MORE_FORWARD),
    ]


def _at_most(claim: str, times: Times, reference: str, limit: float) -> Finding:
    """Judge, by the quartiles, whether ours takes at most `limit` times as long as a reference."""
    (row,) = [row for row in compared(times, reference) if row["training"] == "ours"]
    low, high = row["lower quartile"], row["upper quartile"]
    return Finding(
        claim=claim,
        holds=True if high <= limit else False if low > limit else None,
        evidence=(
            f"{row[f'of {reference}']:.2f} times {WAYS[reference].title} (quartiles {low:.2f} to "
            f"{high:.2f}, {row['rounds']} rounds)"
        ),
    )


def _growth(depths: Sequence[int], stacks: Result) -> Finding:
    """Judge the growth of memory from the shallowest stack to the deepest."""
    times, peaks, weights = stacks["times"], stacks["peaks"], stacks["parameters"]
    needed = 2 * (weights[-1] - weights[0]) / _MB
    ours, plain = ((peaks[-1][way] - peaks[0][way]) / _MB for way in ("ours", PLAIN))
    longer = {way: median(times[-1][way]) / median(times[0][way]) for way in ("ours", PLAIN)}
    return Finding(
        claim="In a deep stack memory grows by little more than parameters and their gradients",
        holds=ours - needed < _LITTLE * (plain - needed),
        evidence=(
            f"from {depths[0]} to {depths[-1]} branches these grow by {needed:.1f} MB, ours by "
            f"{ours:.1f} and plain by {plain:.1f}; a step of ours takes {longer['ours']:.1f} times "
            f"as long, of plain {longer[PLAIN]:.1f} times as long"
        ),
    )


# Pictures.


def _ratios(tables: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw times relative to plain training, with their quartiles, a panel for each step."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    panels = figure.subplots(1, len(tables), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (step, rows) in zip(panels, tables.items(), strict=True):
        for place, row in enumerate(rows):
            colour, middle = COLOURS[row["training"]], row["of plain"]
            sides = [[middle - row["lower quartile"]], [row["upper quartile"] - middle]]
            axes.errorbar(middle, place, xerr=sides, fmt="o", color=colour, capsize=3, markersize=7)
            axes.annotate(
                f"{middle:.2f}",
                (middle, place),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=colour,
            )
        axes.set_title(step, fontsize=10)
        axes.set_xlabel("time of a step, relative to plain training")
        tidy(axes)
    names = [row["training"] for row in next(iter(tables.values()))]
    panels[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.7))
    return figure


def _over_depth(rows: Sequence[Row]) -> Figure:
    """Draw time and memory against depth."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    depths = sorted({row["branches"] for row in rows})
    for axes, column, label, unit in (
        (left, "seconds", "time of a step, seconds", "s"),
        (right, _PEAK, "peak of a step, MB", "MB"),
    ):
        curves: dict[str, list[float]] = {}
        for row in rows:
            curves.setdefault(row["training"], []).append(row[column])
        lines(axes, depths, curves, unit=unit)
        axes.set(xlabel="residual branches", ylabel=label)
    return figure


# The experiment `operators`.


def measure_operators(*, bytes: int = 2**14) -> Tables:  # noqa: A002
    """Operators that a piece of a reversible branch calls on a CPU, and the bytes that they move.

    On a GPU each operator is at least one kernel launch. There, rounding, adding and (for windows)
    scattering are fused into one kernel, and fused attention replaces some of the operators counted
    here. Branches with BatchNorm in training mode have a single piece.

    Args:
        bytes: size of small pieces; counted is the work of each further piece of a branch, or of
            the whole branch if it runs in one piece.
    """
    rows: list[Row] = []
    for family in STACKS:
        model, x = stack(family, 4)
        rewire(model)
        work = work_of_pieces(model, x.requires_grad_(), few=2**30, many=bytes)
        for (branch, phase), pieces in work.items():
            rows.append(
                {
                    "stack": family,
                    "branch": branch,
                    "phase": phase,
                    "operators": round(pieces.calls_a_piece, 1),
                    "kilobytes": round(pieces.bytes_a_piece / 1e3, 1),
                }
            )
    return {"Operators a piece": rows}


# The experiment `verify`.

_CHECKS: tuple[tuple[type, str], ...] = ((Watch, "witness"), (Witness, "compare"))


def measure_verify(*, model: str = "swin3d_t", rounds: int = 25) -> Tables:
    """Time of comparing rebuilt inputs: from paired steps, and from the checks alone.

    Paired steps show only that `verify=True` costs little: with other jobs on the cores, the median
    ratio is accurate to about 1.5 %. So the checks are also timed alone, except for one subtraction
    per stage, of the streams at its bottom. The magnitudes of the streams on the grid are watched
    with and without `verify`.

    Args:
        model: network of `pipelines/experiments/models.py`.
        rounds: rounds of the larger step; the small step has four times as many.
    """
    ways = {"without": lambda model: rewire(model, verify=False), "with": rewire}
    sizes = {SMALL: rounds, replace(SMALL, frames=16, size=56): 4 * rounds}
    tables: Tables = {}
    for work, turns in sizes.items():
        network, inputs = build(model), work.noise()
        times = paired(network, lambda: work.step(network, *inputs), ways, rounds=turns)  # noqa: B023
        tables[f"With and without verification: {model}, {work}"] = compared(times, "without")
    tables["Time in the checks themselves"] = [checks_alone(model, w, rounds=15) for w in sizes]
    return tables


def checks_alone(model: str, work: Workload, rounds: int) -> Row:
    """Measure a step's seconds in checks, on a CPU, where a call returns when its work is done."""
    spent: list[float] = []
    steps: list[float] = []
    network, inputs = build(model), work.noise()
    with prepared(network, rewire):
        for _ in range(rounds + 1):
            with _stopwatch() as seconds:
                steps.append(timed(network, lambda: work.step(network, *inputs)))
            spent.append(sum(seconds))
    shares = ratios(spent[1:], steps[1:])
    return {
        "step": f"{model}, {work}",
        "seconds in checks": median(spent[1:]),
        "of the step": median(shares),
        "largest share": max(shares),
        "rounds": rounds,
    }


@contextmanager
def _stopwatch() -> Iterator[list[float]]:
    """Collect the seconds of every check while the block runs."""
    seconds: list[float] = []

    def watched(check: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return check(*args)
            finally:
                seconds.append(time.perf_counter() - start)

        return run

    found = [(owner, name, getattr(owner, name)) for owner, name in _CHECKS]
    for owner, name, check in found:
        setattr(owner, name, watched(check))
    try:
        yield seconds
    finally:
        for owner, name, check in found:
            setattr(owner, name, check)
