"""Rewire the residual blocks of a model in place, and take it back."""

from collections.abc import Iterator, Mapping
from itertools import groupby

from torch import nn

from re2tal.reversible.branches import (
    NoFamilyError,
    NotReversibleError,
    check_complete,
    split,
)
from re2tal.reversible.engine import ReversibleSequential
from re2tal.reversible.report import LeftOut, RewireReport, Stage, joined
from re2tal.reversible.streams import Coupling


def rewire(model: nn.Module, *, alpha: float = 0.0, beta: float = 1.0) -> RewireReport:
    """Make the residual blocks of a model reversible, in place and without touching a parameter.

    Every maximal run of consecutive blocks in an `nn.Sequential` for which a family is registered
    (see `branches`) becomes one reversible stage. Names and order of parameters and buffers do not
    change, so state dicts load strictly in both directions. The function computed does change,
    except for (1, 0); hence the finetuning that both papers describe.

    Forward hooks of a rewired block would not be called, so blocks that have some are left out;
    hooks of modules inside a block are called in the forward and again in the replay.

    Rewiring a model again finds its stages again and sets their coupling.

    Args:
        model: any module that contains residual blocks, or a sequential container of them.
        alpha: weight of the pretrained skip connection.
        beta: weight of the reversible skip connection. (0, 1) is Re2TAL (arXiv 2211.14053), other
            values are Dr2Net (arXiv 2401.04105), (1, 0) is the network as it was.

    Returns:
        What became reversible, what did not, and why.

    Raises:
        ValueError: if the coefficients are invalid or nothing in the model can be rewired.
    """
    coupling = Coupling(alpha=alpha, beta=beta)
    refused: dict[str, NotReversibleError] = {}
    plan: list[tuple[nn.Sequential, str, list[Stage]]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        stages = _stages(name, module, refused)
        if stages and type(module) not in (nn.Sequential, ReversibleSequential):
            refused[name] = NotReversibleError(
                f"only nn.Sequential itself is rewired, not its subclass {type(module).__name__}"
            )
        elif stages:
            plan.append((module, name, stages))
    report = RewireReport(
        coupling=coupling,
        stages=tuple(stage for *_, stages in plan for stage in stages),
        left_out=_left_out(model, plan, refused),
    )
    if not plan:
        raise ValueError(
            f"Nothing in this {type(model).__name__} can be rewired:\n"
            + "\n".join(f"  {left.name} ({left.kind}): {left.reason}" for left in report.left_out)
            + "\nRegister a family for its blocks: see re2tal/reversible/README.md."
        )
    for module, name, stages in plan:
        blocks = frozenset(block for stage in stages for block in stage.blocks)
        ReversibleSequential.adopt(module, coupling=coupling, rewired=blocks, place=name)
    return report


def unwire(model: nn.Module) -> None:
    """Give the model back as it was before `rewire`, with the parameters that it has now."""
    for _, stage in list(reversible_stages(model)):
        stage.restore()


def reversible_stages(model: nn.Module) -> Iterator[tuple[str, ReversibleSequential]]:
    """The rewired containers of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, ReversibleSequential):
            yield name, module


def set_reversible(model: nn.Module, reversible: bool) -> None:
    """Choose whether the rewired stages rebuild their activations or store them.

    Both compute the same function: storing is for debugging, for what a replay cannot do
    (`torch.func`, double backward), and for measuring.

    Raises:
        ValueError: if the model has no rewired stage.
    """
    for stage in _required_stages(model):
        stage.reversible = reversible


def set_coupling(model: nn.Module, *, alpha: float, beta: float) -> None:
    """Change alpha and beta of all rewired stages; takes effect in the next forward.

    Raises:
        ValueError: if the coefficients are invalid or the model has no rewired stage.
    """
    coupling = Coupling(alpha=alpha, beta=beta)
    for stage in _required_stages(model):
        stage.coupling = coupling


def _required_stages(model: nn.Module) -> list[ReversibleSequential]:
    found = [stage for _, stage in reversible_stages(model)]
    if not found:
        raise ValueError(f"This {type(model).__name__} has no reversible stage: call rewire first.")
    return found


def _stages(
    container: str, module: nn.Sequential, refused: dict[str, NotReversibleError]
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
    if block is None:
        raise NoFamilyError("the place is empty")
    found = split(block)
    check_complete(block, found)
    return len(found)


def _left_out(
    model: nn.Module,
    plan: list[tuple[nn.Sequential, str, list[Stage]]],
    refused: Mapping[str, NotReversibleError],
) -> tuple[LeftOut, ...]:
    """The outermost modules with parameters that hold nothing rewired, and why.

    A block that was refused for a reason of its own is named itself, not by what holds it.
    """
    rewired = {
        joined(name, block)
        for _, name, stages in plan
        for stage in stages
        for block in stage.blocks
    }
    named = rewired | {n for n, e in refused.items() if not isinstance(e, NoFamilyError)}
    rows: list[LeftOut] = []

    def visit(name: str, module: nn.Module) -> None:
        if name in rewired:
            return
        if any(joined(name, "") != other and other.startswith(joined(name, "")) for other in named):
            for child, submodule in module.named_children():
                visit(joined(name, child), submodule)
        elif any(True for _ in module.parameters()):
            kind = type(module).__name__
            reason = str(refused.get(name, f"no family is registered for {kind}"))
            rows.append(LeftOut(name=name, kind=kind, reason=reason))

    visit("", model)
    return tuple(rows)
