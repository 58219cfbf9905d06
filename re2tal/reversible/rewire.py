"""Rewire the residual blocks of a model in place, and undo it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import nn

from re2tal.reversible.branches import (
    Branch,
    ChangesShapeError,
    NoFamilyError,
    NotReversibleError,
    check_complete,
    described,
    load_families,
    recomputed,
    split,
)
from re2tal.reversible.containers import (
    dotted,
    first_to_last,
    rewired_class,
)
from re2tal.reversible.controls import recomputed_modules, reversible_stages
from re2tal.reversible.coupling import Bits, Budget, Coupling, Settings
from re2tal.reversible.recompute import Recomputed
from re2tal.reversible.replay import ReversibleError, takes_statistics


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Run of consecutive blocks that became one reversible stage.

    Attributes:
        container: name of the container in the model; "" is the model itself.
        blocks: names of the blocks in the container, in order.
        kind: class or classes of the blocks.
        branches: number of residual branches.
        cut: whether every branch can run in pieces in training.
        gradients: bytes of the parameters' gradients of the branch with most parameters.
    """

    container: str
    blocks: tuple[str, ...]
    kind: str
    branches: int
    cut: bool = True
    gradients: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Module with parameters that is in no reversible stage.

    Attributes:
        name: name in the model.
        kind: class of the module.
        reason: reason why it is in no stage.
        recomputed: whether it is recomputed in the backward pass instead of stored.
    """

    name: str
    kind: str
    reason: str
    recomputed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RewireReport:
    """Result of `rewire`; ``print(report)`` is a table.

    Attributes:
        coupling: alpha and beta of the stages.
        exact: whether streams are on the fixed-point grid.
        stages: the reversible stages.
        left_out: modules that are in none; of nested modules only the outermost.
    """

    coupling: Coupling
    exact: bool
    stages: tuple[Stage, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def gradients(self) -> int:
        """Bytes of the parameters' gradients of the branch with most parameters."""
        return max(stage.gradients for stage in self.stages)

    def __str__(self) -> str:
        rows = [("module", "class", "result"), *map(_stage_row, self.stages)]
        rows += map(_left_row, self.left_out)
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        # Plain training hands each gradient to its parameter layer by layer; a step of a reversible
        # stage returns all gradients of its branch together.
        lines.append(
            f"the gradients of a branch's parameters come together, {self.gradients / 1e6:.3g} MB "
            "at most: on inputs whose stored activations take less, rewiring costs memory"
        )
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        weights = f"alpha = {self.coupling.alpha:g}, beta = {self.coupling.beta:g}"
        if not self.coupling.invertible:
            return f"{weights}: not invertible, so activations are stored and no memory is saved"
        if not self.exact:
            return f"{weights}: activations are rebuilt in the backward pass, up to rounding"
        if self.coupling.beta == 1:
            return f"{weights}: activations are rebuilt in the backward pass, bit for bit"
        return f"{weights}: activations are stored, for exact streams need beta = 1"


def _left_row(left: LeftOut) -> tuple[str, str, str]:
    result = "recomputed" if left.recomputed else "as it was"
    return left.name, left.kind, f"{result}: {left.reason}"


ALONE = "alone, it saves no memory in its own backward"
"""Remark of the report on a stage of one branch that is not cut. Its replay keeps the activations
that the plain block would keep, and in addition there are the streams and their gradients."""


def _stage_row(stage: Stage) -> tuple[str, str, str]:
    count, branches = len(stage.blocks), stage.branches
    alone = f"; {ALONE}" if branches == 1 and not stage.cut else ""
    result = (
        f"reversible: {count} block{'s' * (count > 1)}, "
        f"{branches} branch{'es' * (branches > 1)}{alone}"
    )
    return dotted(stage.container, first_to_last(stage.blocks)), stage.kind, result


def _is_cut(branch: Branch) -> bool:
    parts = (module for top in branch.modules for module in top.modules())
    return branch.cut is not None and not any(map(takes_statistics, parts))


def _bytes(branch: Branch) -> int:
    return sum(p.nbytes for p in {p for top in branch.modules for p in top.parameters()})


@dataclass
class _Plan:
    """Stages, and modules to recompute, that were found in a model.

    Attributes:
        containers: containers with stages, each with its name and its stages.
        recomputed: modules to recompute, by name.
        refused: errors that say why blocks and containers are left out, by name.
    """

    containers: list[tuple[nn.Module, str, list[Stage]]] = field(default_factory=list)
    recomputed: dict[str, nn.Module] = field(default_factory=dict)
    refused: dict[str, NotReversibleError] = field(default_factory=dict)

    @property
    def blocks(self) -> set[str]:
        """Names of all blocks in a stage."""
        return {
            dotted(name, block)
            for _, name, stages in self.containers
            for stage in stages
            for block in stage.blocks
        }

    def consider(self, model: nn.Module) -> None:
        """Find stages among the children of all containers, inner containers first.

        A module without a family that holds a stage of two blocks or more is not a block itself; a
        module of a family is one whatever it holds. Stages inside a block are dropped, unless
        families describe all children of their container.
        """
        # named_modules() lists parents before children.
        for name, module in reversed(list(model.named_modules())):
            if not isinstance(module, (nn.Sequential, nn.ModuleList)):
                continue
            stages = self._stages(name, module)
            if stages and rewired_class(module) is None:
                self.refused[name] = NotReversibleError(
                    f"{type(module).__name__} is not rewired, because it is a subclass of "
                    f"nn.{'Sequential' if isinstance(module, nn.Sequential) else 'ModuleList'} "
                    "that has methods of its own"
                )
            elif stages:
                self.containers.insert(0, (module, name, stages))

    def _stages(self, container: str, module: nn.Module) -> list[Stage]:
        """Find the maximal runs of reversible children, and record why the others are in none."""
        found: dict[str, list[Branch]] = {}
        for name, child in module._modules.items():
            try:
                found[name] = self._branches(dotted(container, name), child)
            except NotReversibleError as error:
                found[name] = []
                self.refused.setdefault(dotted(container, name), error)
        stages = []
        for reversible, run in groupby(found, key=lambda name: len(found[name]) > 0):
            if reversible:
                blocks = tuple(run)
                branches = [branch for name in blocks for branch in found[name]]
                kinds = dict.fromkeys(type(module._modules[name]).__name__ for name in blocks)
                stages.append(
                    Stage(
                        container=container,
                        blocks=blocks,
                        kind=", ".join(kinds),
                        branches=len(branches),
                        cut=all(map(_is_cut, branches)),
                        gradients=max(map(_bytes, branches)),
                    )
                )
        return stages

    def _branches(self, name: str, block: nn.Module | None) -> list[Branch]:
        inside = [entry for entry in self.containers if entry[1].startswith(dotted(name, ""))]
        tried_out = block is not None and not described(block)
        if tried_out and block is not None and recomputed(block):
            raise NoFamilyError(f"no family is registered for {type(block).__name__}")
        if tried_out and any(len(stage.blocks) > 1 for _, _, found in inside for stage in found):
            raise NoFamilyError("the blocks inside it are rewired instead")
        found = split(block)
        assert block is not None
        check_complete(block, found)
        for entry in inside:
            if not all(described(child) for child in entry[0].children()):
                self.containers.remove(entry)
        return found

    def find_recomputed(self, model: nn.Module) -> None:
        """Find the modules to recompute: stems, and blocks that change the shape."""
        blocks = self.blocks

        def visit(name: str, module: nn.Module) -> None:
            if name in blocks:
                return
            load_families(type(module))
            if isinstance(self.refused.get(name), ChangesShapeError) or recomputed(module):
                self.recomputed[name] = module
                return
            for child, submodule in module.named_children():
                visit(dotted(name, child), submodule)

        visit("", model)


def _left_out(model: nn.Module, plan: _Plan) -> tuple[LeftOut, ...]:
    """List the outermost modules with parameters that hold nothing rewired, and the reasons.

    A block that was refused for a reason of its own gets a row of its own.
    """
    rewired, refused = plan.blocks, plan.refused
    own = {n for n, e in refused.items() if not isinstance(e, NoFamilyError)}
    rows: list[LeftOut] = []

    def visit(name: str, module: nn.Module) -> None:
        if name in rewired:
            return
        named = rewired | plan.recomputed.keys() | (set() if name in own else own)
        inside = dotted(name, "")
        if any(inside != other and other.startswith(inside) for other in named):
            for child, submodule in module.named_children():
                visit(dotted(name, child), submodule)
        elif any(True for _ in module.parameters()):
            kind = type(module).__name__
            reason = str(refused.get(name, f"no family is registered for {kind}"))
            again = name in plan.recomputed
            rows.append(LeftOut(name=name, kind=kind, reason=reason, recomputed=again))

    visit("", model)
    return tuple(_together(rows))


def _together(rows: Sequence[LeftOut]) -> Iterator[LeftOut]:
    """Merge the rows of neighbours that are left out for the same reason."""

    def alike(row: LeftOut) -> tuple[str, str, str, bool]:
        return row.name.rpartition(".")[0], row.kind, row.reason, row.recomputed

    for (parent, kind, reason, again), run in groupby(rows, key=alike):
        names = [row.name.rpartition(".")[2] for row in run]
        yield LeftOut(
            name=dotted(parent, first_to_last(names)), kind=kind, reason=reason, recomputed=again
        )


def rewire(
    model: nn.Module,
    *,
    alpha: float = 0.0,
    beta: float = 1.0,
    exact: bool = True,
    grid: Bits = "auto",
    slice_bytes: Budget = "auto",
    recompute: bool = True,
    verify: bool = True,
) -> RewireReport:
    """Make the residual blocks of a model reversible, in place and without touching a parameter.

    Every maximal run of consecutive residual blocks in an `nn.Sequential` or `nn.ModuleList`
    becomes one reversible stage, which computes

        x_i = a_i(F_i(x_{i-1}) + alpha x_{i-1}) + beta x_{i-2}

    (see `coupling`). Blocks are recognised by a registered family (see `branches`), or by what
    their forward does. Names and order of parameters and buffers do not change, so state dicts load
    strictly in both directions. The function that the model computes does change, except for
    ``alpha=1, beta=0``; hence the finetuning that both papers describe.

    A stage would not call hooks of its blocks, so blocks with hooks are left out. Hooks of modules
    inside a block are called in the forward and again in the replay, once for every piece.

    Rewiring a model again replaces its stages and their settings.

    Args:
        model: any module that contains residual blocks, or a container of them.
        alpha: weight of the pretrained skip connection.
        beta: weight of the reversible skip connection. (0, 1) is Re2TAL (arXiv 2211.14053), other
            values are Dr2Net (arXiv 2401.04105), (1, 0) is the pretrained network.
        exact: round the streams to a fixed-point grid, so that activations are rebuilt bit for bit
            and gradients are those of stored activations. A stage is then reversible only with
            ``beta=1``.
        grid: fractional bits of that grid: streams are multiples of ``2**-grid`` and must stay
            below ``2**(24 - grid)``. "auto" chooses the bits in every forward of a stage such that
            streams may grow to 256 times its input.
        slice_bytes: bytes of a piece, for branches whose family says how to cut them. "auto" takes
            the bytes of one stream, but at least 8 MiB on a CPU (more for large weights) and 2 GiB
            on a GPU (see `AtLeast`); None runs branches whole, by the blocks' own code.
        recompute: also recompute stems and the layers between stages instead of storing their
            activations.
        verify: compare the rebuilt input of every stage with that of the forward; see `check` and
            `reconstruction_errors`.

    Returns:
        A report of the modules that became reversible, and why the others did not.

    Raises:
        TypeError: if the model is not an `nn.Module`.
        ValueError: if the coefficients are invalid or nothing in the model can be rewired.
    """
    _require_module(model)
    settings = Settings(
        coupling=Coupling(alpha=alpha, beta=beta),
        grid=grid if exact else None,
        slice_bytes=slice_bytes,
        verify=verify,
    )
    plan = _considered(model)
    if recompute:
        plan.find_recomputed(model)
    report = RewireReport(
        coupling=settings.coupling,
        exact=settings.grid is not None,
        stages=tuple(stage for *_, stages in plan.containers for stage in stages),
        left_out=_left_out(model, plan),
    )
    if not plan.containers:
        raise ValueError(_refusal(model, plan, report.left_out))
    unwire(model)  # only now, so that a refusal leaves the model as it was
    for module, name, stages in plan.containers:
        blocks = frozenset(block for stage in stages for block in stage.blocks)
        adopting = rewired_class(module)
        assert adopting is not None
        adopting.adopt(module, settings=settings, rewired=blocks, where=name)
    for name, module in plan.recomputed.items():
        vars(module)["forward"] = Recomputed(module, name, slice_bytes)
    return report


def _require_module(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    got = getattr(model, "__name__", None) or f"an object of the class {type(model).__name__}"
    first = f" Call it first: {got}(...)." if callable(model) else ""
    raise TypeError(f"A model is a torch.nn.Module, which {got} is not.{first}")


def _refusal(model: nn.Module, plan: _Plan, left_out: Sequence[LeftOut]) -> str:
    """Explain why nothing in a model can be rewired, and what to do."""
    start = f"Nothing in this {type(model).__name__} can be rewired"
    readme = "see re2tal/reversible/README.md"
    if all(isinstance(error, NoFamilyError) for error in plan.refused.values()):
        return (
            f"{start}: no child of an nn.Sequential or nn.ModuleList in it is a residual block, "
            "which adds what it computes to its input. Give a model that has such blocks, or put "
            f"them into one of the two ({readme})."
        )
    listed = "\n".join(f"  {left.name} ({left.kind}): {left.reason}" for left in left_out)
    return f"{start}:\n{listed}\nRegister a family for its blocks: {readme}."


def _considered(model: nn.Module) -> _Plan:
    plan = _Plan()
    plan.consider(model)
    return plan


def reversible_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Find the blocks that `rewire` would make reversible, by name, in order of the model."""
    names = (
        dotted(name, block)
        for _, name, stages in _considered(model).containers
        for stage in stages
        for block in stage.blocks
    )
    return {name: model.get_submodule(name) for name in names}


def unwire(model: nn.Module) -> None:
    """Undo `rewire` in place. The parameters keep the values that they have now.

    Raises:
        ReversibleError: if the class of a stage was changed since, as `fully_shard` does, or if a
            check of an earlier backward has failed.
        TypeError: if the model is not an `nn.Module`.
    """
    _require_module(model)
    found = list(reversible_stages(model))
    # All checks before the first change, so that an error leaves the model as it was.
    for name, stage in found:
        if rewired_class(stage) is not type(stage):
            raise ReversibleError(
                f"{name or 'The model'} has become a {type(stage).__name__}, and cannot be given "
                "back as it was. Call rewire and unwire before fully_shard."
            )
    for _, stage in found:
        stage.watch.poll(wait=True)
    for _, stage in found:
        stage.restore()
    for module in recomputed_modules(model):
        del vars(module)["forward"]
