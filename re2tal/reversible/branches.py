"""How a residual block splits into the branches whose skip connections are moved.

A family of blocks is one function registered with `branches`. It says what is added to the skip
connection, and nothing else: the engine does the rest. The families of other libraries are in
`families`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from torch import Tensor, nn

from re2tal.reversible.cuts import Cut
from re2tal.reversible.families import load_families


class NotReversibleError(TypeError):
    """A block cannot become part of a reversible stage; the message says why."""


class NoFamilyError(NotReversibleError):
    """No registered family describes a block."""


class ChangesShapeError(NotReversibleError):
    """A block of a known family turns its input into another shape; the message says how."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One residual branch ``F``, where the block computes ``x + F(x)``.

    Attributes:
        name: what errors and reports call it.
        modules: every module whose parameters and buffers the branch uses.
        function: ``F``, from a tensor to one of the same shape, called as
            ``function(x, *args, **kwargs)`` with whatever else the block is called with; without
            it, the modules in a row on ``x`` alone.
        activation: what the block applies after adding its skip connection, where it computes
            ``activation(x + F(x))``. It moves into the branch.
        drop_path: stochastic depth of the whole branch, which scales the result sample by sample
            (``F(x) * drop_path(ones)``). Not to be applied by ``function``.
        cut: how the branch runs in pieces; None runs it whole.
    """

    name: str
    modules: tuple[nn.Module, ...]
    function: Callable[..., Tensor] | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    drop_path: nn.Module | None = None
    cut: Cut | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``F(x)`` before stochastic depth and activation."""
        if self.function is not None:
            return self.function(x, *args, **kwargs)
        for module in self.modules:
            x = module(x)
        return x


@singledispatch
def branches(block: nn.Module) -> list[Branch]:
    """The residual branches of a block, in the order in which it applies them.

    Register a function for a class of blocks to make the class rewirable. The function describes
    that class's own ``forward``; a subclass with another one needs a function of its own. It raises
    `ChangesShapeError` for a block of the class that changes the shape of its input.
    """
    raise NoFamilyError(f"no family is registered for {type(block).__name__}")


@singledispatch
def returned(block: nn.Module, y: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
    """What the block's ``forward`` returns when its result is ``y``: by default ``y`` itself.

    Register a function for blocks that return more, such as ``(y, thw)``; it is called with the
    block, ``y`` and whatever else the block was called with.
    """
    return y


@singledispatch
def recomputed(module: nn.Module) -> bool:  # noqa: ARG001
    """Whether a module between stages is recomputed in the backward pass instead of stored.

    Register a function that returns True for stems and down-sampling layers: modules that turn one
    tensor into one tensor, cheaply compared with the stages around them.
    """
    return False


def split(block: nn.Module | None) -> list[Branch]:
    """The branches of a block, once it is sure that running them replaces running the block.

    Raises:
        NotReversibleError: if no family describes the block, its ``forward`` is not the one that
            the family describes, or hooks hang on the block itself, where nothing calls them.
    """
    if block is None:
        raise NoFamilyError("the place is empty")
    load_families(type(block))
    family = next(cls for cls in type(block).__mro__ if cls in branches.registry)
    found = branches(block)
    if type(block).forward is not getattr(family, "forward", None) or _own_forward(block):
        raise NotReversibleError(
            f"its forward is not that of {family.__name__}, which the family describes"
        )
    if has_hooks(block):
        raise NotReversibleError(
            "it has hooks of its own, which would not be called: "
            "hook the stage or the modules inside the block instead, and call fully_shard on "
            "the stage's Sequential or on the owner of its ModuleList"
        )
    return found


def _own_forward(block: nn.Module) -> bool:
    """Whether somebody else than `rewire` has given this very block a forward."""
    forward = vars(block).get("forward")
    return forward is not None and not type(forward).__module__.startswith(__package__ or "")


def check_complete(block: nn.Module, found: Sequence[Branch]) -> None:
    """Make sure that the branches name every module with parameters: the others would not train.

    Raises:
        NotReversibleError: naming the parameters that belong to no branch.
    """
    owned = {id(p) for branch in found for m in branch.modules for p in m.parameters()}
    missing = [name for name, p in block.named_parameters() if id(p) not in owned]
    if missing:
        raise NotReversibleError(f"no branch names the modules that hold {', '.join(missing)}")


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called when the module is."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
