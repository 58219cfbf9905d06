"""Rewire the residual blocks of a model in place, and take it back."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from torch import nn

from re2tal.reversible.branches import (
    ChangesShapeError,
    NoFamilyError,
    NotReversibleError,
    check_complete,
    recomputed,
    split,
)
from re2tal.reversible.containers import ReversibleModuleList, ReversibleSequential, Rewired
from re2tal.reversible.families import load_families
from re2tal.reversible.recompute import Recomputed
from re2tal.reversible.replay import ReversibleError
from re2tal.reversible.report import LeftOut, RewireReport, Stage, joined
from re2tal.reversible.settings import Budget, Settings
from re2tal.reversible.streams import GRID_BITS, Coupling

_CONTAINERS: dict[type[nn.Module], type[Rewired]] = {
    nn.Sequential: ReversibleSequential,
    nn.ModuleList: ReversibleModuleList,
}


def rewire(
    model: nn.Module,
    *,
    alpha: float = 0.0,
    beta: float = 1.0,
    exact: bool = True,
    grid: int = GRID_BITS,
    slice_bytes: Budget = "auto",
    recompute: bool = True,
    verify: bool = True,
) -> RewireReport:
    """Make the residual blocks of a model reversible, in place and without touching a parameter.

    Every maximal run of consecutive blocks in an `nn.Sequential` or `nn.ModuleList` for which a
    family is registered (see `branches`) becomes one reversible stage. Names and order of
    parameters and buffers do not change, so state dicts load strictly in both directions. The
    function computed does change, except for (1, 0); hence the finetuning that both papers
    describe.

    Forward hooks of a rewired block would not be called, so blocks that have some are left out;
    hooks of modules inside a block are called in the forward and again in the replay, once for
    every piece.

    Rewiring a model again finds its stages again and changes how they run.

    Args:
        model: any module that contains residual blocks, or a container of them.
        alpha: weight of the pretrained skip connection.
        beta: weight of the reversible skip connection. (0, 1) is Re2TAL (arXiv 2211.14053), other
            values are Dr2Net (arXiv 2401.04105), (1, 0) is the network as it was.
        exact: round the streams to a fixed-point grid, so that activations are rebuilt bit for bit
            and gradients are those of stored activations. Needs ``beta=1`` to be reversible.
        grid: fractional bits of that grid: streams are multiples of ``2**-grid`` and must stay
            below ``2**(24 - grid)``.
        slice_bytes: branches run in pieces of about this many bytes, where their family says how.
            "auto" takes as many as one of the streams; None runs branches whole, by the blocks' own
            code.
        recompute: also recompute stems and the layers between stages instead of storing their
            activations.
        verify: compare the rebuilt input of every stage with what it was; see `check` and
            `reconstruction_errors`.

    Returns:
        What became reversible, what did not, and why.

    Raises:
        ValueError: if the coefficients are invalid or nothing in the model can be rewired.
    """
    settings = Settings(
        coupling=Coupling(alpha=alpha, beta=beta),
        grid=grid if exact else None,
        slice_bytes=slice_bytes,
        verify=verify,
    )
    plan = _Plan()
    for name, module in model.named_modules():
        plan.consider(name, module)
    if recompute:
        plan.find_recomputed(model)
    report = RewireReport(
        coupling=settings.coupling,
        exact=settings.grid is not None,
        stages=tuple(stage for *_, stages in plan.containers for stage in stages),
        left_out=_left_out(model, plan),
    )
    if not plan.containers:
        raise ValueError(
            f"Nothing in this {type(model).__name__} can be rewired:\n"
            + "\n".join(f"  {left.name} ({left.kind}): {left.reason}" for left in report.left_out)
            + "\nRegister a family for its blocks: see re2tal/reversible/README.md."
        )
    unwire(model)
    for module, name, stages in plan.containers:
        blocks = frozenset(block for stage in stages for block in stage.blocks)
        _CONTAINERS[type(module)].adopt(module, settings=settings, rewired=blocks, place=name)
    for name, module in plan.recomputed.items():
        vars(module)["forward"] = Recomputed(module, name)
    return report


def unwire(model: nn.Module) -> None:
    """Give the model back as it was before `rewire`, with the parameters that it has now.

    Raises:
        ReversibleError: if the class of a stage was changed since, as `fully_shard` does.
    """
    found = list(reversible_stages(model))
    for name, stage in found:
        if type(stage) not in _CONTAINERS.values():
            raise ReversibleError(
                f"{name or 'The model'} has become a {type(stage).__name__}, and cannot be given "
                "back as it was. Call rewire and unwire before fully_shard."
            )
    for _, stage in found:
        stage.restore()
    for module in _recomputed_modules(model):
        del vars(module)["forward"]


def reversible_stages(model: nn.Module) -> Iterator[tuple[str, Rewired]]:
    """The rewired containers of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Rewired):
            yield name, module


def set_reversible(model: nn.Module, reversible: bool) -> None:
    """Choose whether the rewired stages rebuild their activations or store them.

    Both compute the same function: storing is for debugging, for what a replay cannot do
    (`torch.func`, double backward), and for measuring.

    Raises:
        ValueError: if the model has no rewired stage.
    """
    _change(model, reversible=reversible)
    for module in _recomputed_modules(model):
        vars(module)["forward"].active = reversible


def set_coupling(model: nn.Module, *, alpha: float, beta: float) -> None:
    """Change alpha and beta of all rewired stages; takes effect in the next forward.

    Raises:
        ValueError: if the coefficients are invalid or the model has no rewired stage.
    """
    _change(model, coupling=Coupling(alpha=alpha, beta=beta))


def check(model: nn.Module) -> None:
    """Wait for the checks of all backward passes so far.

    On a GPU a check is read without waiting, at a later forward; call this before what cannot be
    taken back, such as writing a checkpoint.

    Raises:
        ReversibleError: if a stream left the grid, or a rebuilt input was not the forward's.
    """
    for _, stage in reversible_stages(model):
        stage.watch.poll(wait=True)


def reconstruction_errors(model: nn.Module) -> dict[str, float]:
    """The relative error (root mean square, over a sample) of the last input that was rebuilt.

    Returns:
        By the name of the container; those that rebuilt nothing are left out. 0 in exact mode.
    """
    return {
        name: float(stage.watch.error)
        for name, stage in reversible_stages(model)
        if stage.watch.error is not None
    }


def stage_modes(model: nn.Module) -> dict[str, str]:
    """How each stage ran last: "reversible", or "stored: " and the reason."""
    return {
        where: mode
        for _, stage in reversible_stages(model)
        for where, mode in stage.watch.modes.items()
    }


def _change(model: nn.Module, **changes: Any) -> None:
    found = [stage for _, stage in reversible_stages(model)]
    if not found:
        raise ValueError(f"This {type(model).__name__} has no reversible stage: call rewire first.")
    for stage in found:
        stage.settings = replace(stage.settings, **changes)


def _recomputed_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(vars(m).get("forward"), Recomputed)]


@dataclass
class _Plan:
    """What a model's modules can become.

    Attributes:
        containers: those with stages, with their name and their stages.
        recomputed: modules to recompute, by name.
        refused: why blocks and containers are left out, by name.
    """

    containers: list[tuple[nn.Module, str, list[Stage]]] = field(default_factory=list)
    recomputed: dict[str, nn.Module] = field(default_factory=dict)
    refused: dict[str, NotReversibleError] = field(default_factory=dict)

    @property
    def blocks(self) -> set[str]:
        """Names of all blocks in a stage."""
        return {
            joined(name, block)
            for _, name, stages in self.containers
            for stage in stages
            for block in stage.blocks
        }

    def consider(self, name: str, module: nn.Module) -> None:
        """Look for stages among the children of a module."""
        if not isinstance(module, (nn.Sequential, nn.ModuleList)):
            return
        stages = _stages(name, module, self.refused)
        own = type(module) not in (*_CONTAINERS, *_CONTAINERS.values())
        if stages and own:
            kind = nn.Sequential if isinstance(module, nn.Sequential) else nn.ModuleList
            self.refused[name] = NotReversibleError(
                f"only nn.{kind.__name__} itself is rewired, not its subclass "
                f"{type(module).__name__}"
            )
        elif stages:
            self.containers.append((module, name, stages))

    def find_recomputed(self, model: nn.Module) -> None:
        """Look for what can be recomputed: stems, and blocks that change the shape."""
        blocks = self.blocks

        def visit(name: str, module: nn.Module) -> None:
            if name in blocks:
                return
            load_families(type(module))
            if isinstance(self.refused.get(name), ChangesShapeError) or recomputed(module):
                self.recomputed[name] = module
                return
            for child, submodule in module.named_children():
                visit(joined(name, child), submodule)

        visit("", model)


def _stages(
    container: str, module: nn.Module, refused: dict[str, NotReversibleError]
) -> list[Stage]:
    """The maximal runs of reversible children; notes in `refused` why the others are none."""
    counts: dict[str, int] = {}
    for name, child in module._modules.items():
        try:
            counts[name] = _count_branches(child)
        except NotReversibleError as error:
            counts[name] = 0
            refused[joined(container, name)] = error
    stages = []
    for reversible, run in groupby(counts, key=lambda name: counts[name] > 0):
        if reversible:
            blocks = tuple(run)
            kinds = dict.fromkeys(type(module._modules[name]).__name__ for name in blocks)
            stages.append(
                Stage(
                    container=container,
                    blocks=blocks,
                    kind=", ".join(kinds),
                    branches=sum(counts[name] for name in blocks),
                )
            )
    return stages


def _count_branches(block: nn.Module | None) -> int:
    found = split(block)
    assert block is not None
    check_complete(block, found)
    return len(found)


def _left_out(model: nn.Module, plan: _Plan) -> tuple[LeftOut, ...]:
    """The outermost modules with parameters that hold nothing rewired, and why.

    A block that was refused for a reason of its own is named itself, not by what holds it.
    """
    rewired, refused = plan.blocks, plan.refused
    named = rewired | plan.recomputed.keys()
    named |= {n for n, e in refused.items() if not isinstance(e, NoFamilyError)}
    rows: list[LeftOut] = []

    def visit(name: str, module: nn.Module) -> None:
        if name in rewired:
            return
        inside = joined(name, "")
        if any(inside != other and other.startswith(inside) for other in named):
            for child, submodule in module.named_children():
                visit(joined(name, child), submodule)
        elif any(True for _ in module.parameters()):
            kind = type(module).__name__
            reason = str(refused.get(name, f"no family is registered for {kind}"))
            again = name in plan.recomputed
            rows.append(LeftOut(name=name, kind=kind, reason=reason, recomputed=again))

    visit("", model)
    return tuple(rows)
