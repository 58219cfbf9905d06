"""What the modules of a model can become: blocks of a stage, recomputed, or as they are."""

from dataclasses import dataclass, field
from itertools import groupby

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
from re2tal.reversible.report import LeftOut, Stage, joined

CONTAINERS: dict[type[nn.Module], type[Rewired]] = {
    nn.Sequential: ReversibleSequential,
    nn.ModuleList: ReversibleModuleList,
}
"""What the containers of blocks become."""


@dataclass
class Plan:
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
        own = type(module) not in (*CONTAINERS, *CONTAINERS.values())
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


def left_out(model: nn.Module, plan: Plan) -> tuple[LeftOut, ...]:
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
