"""Experiment on the paper's fourth claim: reversible gradients equal those of stored activations.

A reversible network rebuilds its activations. In floating point, as in the public libraries, the
rebuilt ones differ slightly, and so do the gradients. The difference grows with depth and with
lower precision. On this project's fixed-point grid they are equal to the bit. The experiment
`drift` measures more: several families of blocks, and several couplings (alpha, beta).
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from itertools import product
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
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
from pipelines.experiments.models import STACKS, MlpBlock, stack
from pipelines.experiments.pictures import COLOURS, End, label_ends, tidy
from re2tal.errors import UserError
from re2tal.precision import Precision, autocast
from re2tal.reversible import branches, reconstruction_errors, rewire, set_reversible

# Public libraries for reversible networks. Each builds a network of the same branches F, G, ... on
# two streams (x1, x2) that are concatenated along the channels: y1 = x1 + F(x2), y2 = x2 + G(y1).
# They are a dependency group of this project (`peers`), and imported only where they are used.

Branches = Sequence[nn.Module]


def stored(streams: Tensor, branches: Branches) -> Tensor:
    """Compute the equations directly on ``(B, 2 C)``; autograd stores all activations."""
    first, second = streams.chunk(2, dim=1)
    # Swapping the streams each time makes two branches one coupling: y1 = x1 + F(x2), and then
    # y2 = x2 + G(y1).
    for branch in branches:
        first, second = second, first + branch(second)
    return torch.cat([first, second], dim=1)


class Recomputing(nn.Module):
    """Network of one autograd function for all branches, which inverts them from its output.

    This is what minREV does ("Reversible Vision Transformers", Mangalam et al., CVPR 2022), except
    that parameters are inputs of the function here.
    """

    def __init__(self, branches: Branches) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, streams: Tensor) -> Tensor:
        """Map the streams through all branches."""
        result: Tensor = _Recompute.apply(streams, self.branches, *self.parameters())
        return result


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, branches: Branches, *_parameters: Tensor) -> Tensor:
        ctx.branches = branches
        output = stored(streams, branches)  # autograd stores nothing in a Function's forward
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors[0].chunk(2, dim=1)
        of_first, of_second = gradients[0].chunk(2, dim=1)
        of_parameters: list[Tensor] = []
        for branch in reversed(ctx.branches):
            with torch.enable_grad():
                given = first.detach().requires_grad_()
                result = branch(given)
            of_given, *found = torch.autograd.grad(result, [given, *branch.parameters()], of_second)
            of_parameters[:0] = found
            # Invert y = x1 + F(x2): x1 = y - F(x2). Gradients: x1 gets that of y, and x2 its own
            # plus F's.
            first, second = second - result.detach(), first
            of_first, of_second = of_second, of_first + of_given
        return torch.cat([of_first, of_second], dim=1), None, *of_parameters


def _memcnn(branches: Branches) -> nn.Module:
    library = import_module("memcnn")
    couplings = map(library.AdditiveCoupling, branches[::2], branches[1::2])
    return nn.Sequential(*map(library.InvertibleModuleWrapper, couplings))


def _revtorch(branches: Branches) -> nn.Module:
    library = import_module("revtorch.revtorch")
    blocks = nn.ModuleList(map(library.ReversibleBlock, branches[::2], branches[1::2]))
    network: nn.Module = library.ReversibleSequence(blocks)
    return network


def _revlib(branches: Branches) -> nn.Module:
    network: nn.Module = import_module("revlib").ReversibleSequential(*branches)
    return network


@dataclass(frozen=True, slots=True)
class Peer:
    """Another implementation: its package ("" for none), and a function that builds its network."""

    package: str
    build: Callable[[Branches], nn.Module]


PEERS: dict[str, Peer] = {
    "memcnn": Peer("memcnn", _memcnn),
    "RevTorch": Peer("revtorch", _revtorch),
    "revlib": Peer("revlib", _revlib),
    "minREV's form": Peer("", Recomputing),
}


OURS, FLOAT = "ours", "ours, float"

ERROR = "relative error of gradients"
NOT_INSTALLED = "not installed"

_FAMILY = "LayerNorm-MLP"  # its streams are (B, C), which all libraries can split

# Lines overlap, so the marker of each library leaves those below it visible.
_STYLES = {
    OURS: ("o", 6, COLOURS["ours"]),
    FLOAT: ("o", 13, COLOURS["ours, float"]),
    "memcnn": ("s", 9, "#2b7bba"),
    "RevTorch": ("D", 6, "#d98a1f"),
    "revlib": ("+", 11, "#3a9a5b"),
    "minREV's form": (".", 5, "#4d4d4d"),
}
_LABELS = {OURS: "ours, on the grid", FLOAT: "without the grid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Exactness:
    """Experiment that compares errors of gradients of this project and of other libraries.

    Attributes:
        depths: even numbers of residual branches.
        precisions: number formats in which the branches compute.
        libraries: libraries to compare. The report lists those that are not installed.
    """

    depths: tuple[int, ...] = (12, 24, 96)
    precisions: tuple[Precision, ...] = ("float32", "float16", "bfloat16")
    libraries: tuple[str, ...] = tuple(PEERS)

    def __post_init__(self) -> None:
        odd = [depth for depth in self.depths if depth % 2]
        if odd:
            raise UserError(f"Branches come in pairs, but a depth is {odd[0]}: give even depths.")
        refuse_unknown("library", self.libraries, PEERS)

    def jobs(self) -> Sequence[Job]:
        """List one job for this project, and one for each library."""
        cases = {"depths": sorted(self.depths), "precisions": list(self.precisions)}
        return [Job(name=OURS, work=our_errors, arguments=cases)] + [
            Job(name=library, work=errors_of, arguments={"library": library, **cases})
            for library in self.libraries
        ]

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report on errors of gradients."""
        rows = [row for name in (OURS, *self.libraries) for row in results[name]["rows"]]
        measured = [row for row in rows if not isinstance(row[ERROR], str)]
        largest: dict[str, float] = {}
        for row in measured:
            largest[row["library"]] = max(row[ERROR], largest.get(row["library"], 0.0))
        return Section(
            title="Gradients are those of stored activations",
            text=(
                "A stack of residual branches LayerNorm-Linear-GELU-Linear of width 64 on a batch "
                "of 64, random weights, seed 0; streams in float32, branches under autocast. The "
                "error is ||g - g_stored|| / ||g_stored||, where g are the gradients of all "
                "parameters and g_stored those of the same equations in the same precision with "
                "stored activations. All libraries run the same branches from the same input, on "
                f"{results[OURS]['device']}. Autocast is entered inside the branches, because not "
                "every library enters it again in its backward. In shallow stacks most errors "
                "vanish when the branches round their input to 16 bits. minREV's form is a "
                "reimplementation of its method, because minREV cannot be installed."
            ),
            findings=_findings(rows, largest),
            tables={"Errors of gradients": rows},
            figures={"exactness": _picture(measured)},
            metrics={
                f"exactness/{re.sub(r'[^a-zA-Z0-9]', '_', library)}": error
                for library, error in largest.items()
            },
        )


def quick() -> Exactness:
    """Configure shallow stacks, only to show that everything runs."""
    return Exactness(depths=(4, 12))


def _findings(rows: Sequence[Row], largest: Mapping[str, float]) -> list[Finding]:
    errors = [row[ERROR] for row in rows if row["library"] == OURS]
    exact = sum(error == 0 for error in errors)
    others = {library: error for library, error in largest.items() if library != OURS}
    versions = {row["library"]: row["version"] for row in rows}
    silent = {row["library"] for row in rows} - largest.keys()
    listed = [
        f"{library}{'' if library == FLOAT else f' ({versions[library]})'} {error:.1e}"
        for library, error in others.items()
    ]
    listed += [f"{library}: {versions[library]}" for library in sorted(silent)]
    return [
        Finding(
            claim="On the grid gradients equal those of stored activations bit for bit",
            holds=exact == len(errors),
            evidence=f"{exact} of {len(errors)} cases of depth and precision have an error of 0",
        ),
        Finding(
            claim="In floating point they drift, in the public libraries as well",
            holds=all(error > 0 for error in others.values()),
            evidence=f"largest errors: {', '.join(listed)}",
        ),
    ]


# The work.


def our_errors(*, depths: Sequence[int], precisions: Sequence[Precision]) -> dict[str, Any]:
    """Measure the errors of this project, on the grid and in floating point."""
    here = device()
    rows = []
    for depth, precision in product(depths, precisions):
        errors = drift(_FAMILY, depth, precision, here)
        for library, column in ((OURS, "gradients, grid"), (FLOAT, "gradients, float")):
            rows.append(_row(library, "this one", depth, precision, errors[column]))
    return {"device": name_of(here), "rows": rows}


def errors_of(
    *, library: str, depths: Sequence[int], precisions: Sequence[Precision]
) -> dict[str, Any]:
    """Measure the errors of one of `PEERS`. If it is not installed or fails, the rows say so."""
    package = PEERS[library].package
    try:
        version = metadata.version(package) if package else "this one"
    except metadata.PackageNotFoundError:
        rows = [_row(library, NOT_INSTALLED, "", "", NOT_INSTALLED)]
    else:
        rows = [
            _row(library, version, depth, precision, _error(library, depth, precision))
            for depth, precision in product(depths, precisions)
        ]
    return {"device": name_of(device()), "rows": rows}


def _row(library: str, version: str, depth: int | str, precision: str, error: float | str) -> Row:
    # The norm is exactly 0 if and only if all differences are.
    equal = "" if isinstance(error, str) else "yes" if error == 0 else "no"
    return {
        "library": library,
        "version": version,
        "branches": depth,
        "precision": precision,
        ERROR: error,
        "bit for bit": equal,
    }


def _error(library: str, depth: int, precision: Precision) -> float | str:
    """Compute the error against stored activations; return a failure as one line of text."""
    blocks, x = stack(_FAMILY, depth)
    blocks, x = blocks.to(device()), x.to(device())
    branches = [_Branch(block, precision) for block in blocks]
    wanted = _gradients(branches, lambda streams: stored(streams, branches), x)
    try:
        # Ignore the libraries' warnings about deprecated parts of PyTorch.
        with warnings.catch_warnings(action="ignore"):
            found = _gradients(branches, PEERS[library].build(branches), x)
    except Exception as problem:  # any failure of a library is a result of the report
        return f"{type(problem).__name__}: {problem}".splitlines()[0]
    return relative_error(found, wanted)


class _Branch(nn.Module):
    """Residual branch ``F`` of a block, without its skip connection.

    It enters autocast itself, because not every library enters it again in its backward.
    """

    def __init__(self, block: nn.Module, precision: Precision) -> None:
        super().__init__()
        assert isinstance(block, MlpBlock)
        self.block = block
        self.precision: Precision = precision

    def forward(self, x: Tensor) -> Tensor:
        with autocast(x.device.type, self.precision):
            return self.block.branch(x).to(x.dtype)


def _gradients(
    branches: Sequence[nn.Module], network: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """Compute the gradients of all parameters as one vector, with ``x`` as both input streams."""
    parameters = [p for branch in branches for p in branch.parameters()]
    for parameter in parameters:
        parameter.grad = None
    streams = torch.cat([x, x], dim=1).requires_grad_()
    # A copy, because a library may free the memory of its input.
    first, second = network(streams.clone()).chunk(2, dim=1)
    ((first + second) / 2).pow(2).mean().backward()
    found = [p.grad for p in parameters if p.grad is not None]
    if len(found) < len(parameters):
        raise RuntimeError(f"{len(parameters) - len(found)} parameters have no gradient")
    return torch.cat([gradient.flatten() for gradient in found])


# The picture.


def _picture(rows: Sequence[Row]) -> Figure:
    """Draw errors against depth, for each precision and library."""
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    floor = _scale(panels[0], rows)
    panels[0].set_ylabel("relative error of gradients")
    for axes, precision in zip(panels, precisions, strict=True):
        ends = _lines(axes, [row for row in rows if row["precision"] == precision], floor)
        axes.set_title(f"branches in {precision}", fontsize=10)
    label_ends(panels[-1], ends)
    return figure


def _scale(axes: Axes, rows: Sequence[Row]) -> float:
    """Set a logarithmic scale with a tick for zero below it; return the position of that tick."""
    errors = [row[ERROR] for row in rows if row[ERROR] > 0]
    low, high = (math.floor(math.log10(limit)) for limit in (min(errors), max(errors)))
    decades = range(low, high + 2)
    floor: float = 10.0 ** (low - 1.5)
    axes.set(yscale="log", ylim=(10.0 ** (low - 2), 10.0 ** (high + 1)))
    axes.set_yticks(
        [floor, *(10.0**n for n in decades)], ["exactly 0", *(f"$10^{{{n}}}$" for n in decades)]
    )
    axes.yaxis.set_minor_locator(NullLocator())
    return floor


def _lines(axes: Axes, rows: Sequence[Row], floor: float) -> list[End]:
    """Draw a line for each library, and return the ends of the lines."""
    ends = []
    for library in dict.fromkeys(row["library"] for row in rows):
        mark, size, colour = _STYLES[library]
        points = [(r["branches"], r[ERROR] or floor) for r in rows if r["library"] == library]
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=mark,
            markersize=size,
            markerfacecolor=colour if library == OURS else "none",
            linewidth=2.6 if library == OURS else 1.2,
            clip_on=False,
        )
        ends.append(End(*points[-1], _LABELS.get(library, library), colour))
    depths = sorted({row["branches"] for row in rows})
    axes.set(xscale="log", xlabel="residual branches")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    tidy(axes)
    return ends


# The experiment `drift`.

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16")

COUPLINGS = ((0.0, 1.0), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (0.9, 0.1), (1.0, 0.1))
"""Pairs (alpha, beta): Re2TAL's (0, 1), and some from Dr2Net's schedule that leads to it."""

COARSE: tuple[Precision, ...] = ("float32", "bfloat16")


def measure_drift(*, depths: Sequence[int] = (12, 24, 96)) -> Tables:
    """Drift of gradients when activations are rebuilt: none on the grid, some in floating point.

    Errors are ``||found - wanted|| / ||wanted||``, with random weights, streams in float32 and
    branches under autocast; "overflow" means that nothing finite was rebuilt.

    Args:
        depths: even numbers of residual branches.
    """
    return {
        "Relative errors of what is rebuilt and of gradients": [
            drift(family, count, precision)
            for family in STACKS
            for count in depths
            for precision in PRECISIONS
        ],
        "Relative error of the rebuilt input of a stack, by coupling": [
            coupling_row(family, precision, alpha, beta, depths)
            for family in ("LayerNorm-MLP", "Video Swin")
            for precision in COARSE
            for alpha, beta in COUPLINGS
        ],
    }


def drift(family: str, count: int, precision: Precision, device: torch.device | str = "cpu") -> Row:
    """Measure the errors of a stack with `count` branches, with the grid and without.

    For comparison, "precision alone" is the error of the gradients of stored activations in this
    precision against those in float32.
    """
    model, x = stack(family, count)
    model, x = model.to(device), x.to(device)
    rewire(model, exact=False)
    output, rebuilt = _trained(model, x, precision)
    rebuilt_error = max(reconstruction_errors(model).values())
    set_reversible(model, False)
    _, stored = _trained(model, x, precision)
    _, precise = _trained(model, x, "float32")
    rewire(model)
    output_on_grid, rebuilt_on_grid = _trained(model, x, precision)
    set_reversible(model, False)
    _, stored_on_grid = _trained(model, x, precision)
    return {
        "family": family,
        "branches": count,
        "precision": precision,
        "rebuilt input, float": rebuilt_error,
        "gradients, float": relative_error(rebuilt, stored),
        "gradients, grid": relative_error(rebuilt_on_grid, stored_on_grid),
        "gradients, precision alone": relative_error(stored, precise),
        "output, grid against float": relative_error(output_on_grid, output),
    }


def coupling_row(
    family: str, precision: Precision, alpha: float, beta: float, depths: Iterable[int]
) -> Row:
    """Make a row of `rebuilt_error` for several depths."""
    row: Row = {"family": family, "precision": precision, "alpha": alpha, "beta": beta}
    for count in depths:
        model, x = stack(family, count)
        with autocast(x.device.type, precision):
            error = rebuilt_error(model, x, alpha, beta)
        row[f"{count} branches"] = error if math.isfinite(error) else "overflow"
    return row


@torch.no_grad()
def rebuilt_error(model: nn.Sequential, x: Tensor, alpha: float, beta: float) -> float:
    """Run a stack forward and backwards in floating point, without the engine.

        forward     x_i = F_i(x_{i-1}) + alpha x_{i-1} + beta x_{i-2}
        backwards   x_{i-2} = (x_i - F_i(x_{i-1}) - alpha x_{i-1}) / beta

    Returns:
        The larger relative error of the two rebuilt streams; NaN or infinity after an overflow.
    """
    functions = [branch for block in model for branch in branches(block)]
    current = previous = x
    for function in functions:
        current, previous = function(current) + alpha * current + beta * previous, current
    for function in reversed(functions):
        before = (current - function(previous) - alpha * previous) / beta
        current, previous = previous, before
    return max(relative_error(current, x), relative_error(previous, x))


def _trained(model: nn.Module, x: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Return the output, and the gradients of all parameters as one vector."""
    with autocast(x.device.type, precision):
        output = model(x)
    found = torch.autograd.grad(output.float().pow(2).mean(), list(model.parameters()))
    return output.detach(), torch.cat([gradient.flatten() for gradient in found])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Compute ``||found - wanted|| / ||wanted||``."""
    return float((found - wanted).double().norm() / wanted.double().norm())
