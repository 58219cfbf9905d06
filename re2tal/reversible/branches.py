"""How a residual block splits into the branches whose skip connections are moved.

A family of blocks is one function registered with `branches`. It says what is added to the skip
connection, and nothing else: the engine does the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch

from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock


class NotReversibleError(TypeError):
    """A block cannot become part of a reversible stage; the message says why."""


class NoFamilyError(NotReversibleError):
    """No registered family describes a block."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One residual branch ``F``, where the block computes ``x + F(x)``.

    Attributes:
        name: what errors and reports call it.
        modules: every module whose parameters and buffers the branch uses.
        function: ``F``, from a tensor to one of the same shape; without it, the modules in a row.
    """

    name: str
    modules: tuple[nn.Module, ...]
    function: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``F(x)``."""
        if self.function is not None:
            return self.function(x)
        for module in self.modules:
            x = module(x)
        return x


@singledispatch
def branches(block: nn.Module) -> list[Branch]:
    """The residual branches of a block, in the order in which it applies them.

    Register a function for a class of blocks to make the class rewirable. The function describes
    that class's own ``forward``; a subclass with another one needs a function of its own. It raises
    `NotReversibleError` for a block of the class that changes the shape of its input.
    """
    raise NoFamilyError(f"no family is registered for {type(block).__name__}")


@branches.register
def _swin(block: SwinTransformerBlock) -> list[Branch]:
    return [
        Branch("attention", (block.norm1, block.attn, block.stochastic_depth)),
        Branch("mlp", (block.norm2, block.mlp, block.stochastic_depth)),
    ]


def split(block: nn.Module) -> list[Branch]:
    """The branches of a block, once it is sure that running them replaces running the block.

    Raises:
        NotReversibleError: if no family describes the block, its ``forward`` is not the one that
            the family describes, or hooks hang on the block itself, where nothing calls them.
    """
    family = next(cls for cls in type(block).__mro__ if cls in branches.registry)
    found = branches(block)
    if type(block).forward is not getattr(family, "forward", None) or "forward" in vars(block):
        raise NotReversibleError(
            f"its forward is not that of {family.__name__}, which the family describes"
        )
    if _has_hooks(block):
        raise NotReversibleError(
            "it has hooks of its own, which would not be called: "
            "hook the stage or the modules inside the block instead"
        )
    return found


def check_complete(block: nn.Module, found: Sequence[Branch]) -> None:
    """Make sure that the branches name every module with parameters: the others would not train.

    Raises:
        NotReversibleError: naming the parameters that belong to no branch.
    """
    owned = {id(p) for branch in found for m in branch.modules for p in m.parameters()}
    missing = [name for name, p in block.named_parameters() if id(p) not in owned]
    if missing:
        raise NotReversibleError(f"no branch names the modules that hold {', '.join(missing)}")


def _has_hooks(block: nn.Module) -> bool:
    return bool(
        block._forward_hooks
        or block._forward_pre_hooks
        or block._backward_hooks
        or block._backward_pre_hooks
    )
