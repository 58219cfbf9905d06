"""Branches of residual blocks, and the families that describe them.

A family of blocks is one function registered with `branches`. It returns the functions ``F`` that
its blocks add to their skip connections; the engine does the rest. The families of other libraries
are in `families`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from re2tal.reversible.layouts import Cut, Wider


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
        name: name in errors and reports.
        modules: every module whose parameters and buffers the branch uses.
        function: ``F``, which returns a tensor of the shape of ``x``. It is called as
            ``function(x, *args, **kwargs)`` with the other arguments of the block's call. None
            calls the modules one after the other on ``x`` alone.
        activation: activation after the addition, for a block that computes
            ``activation(x + F(x))``. It moves into the branch.
        drop_path: stochastic depth of the whole branch, which scales the result sample by sample:
            ``F(x) * drop_path(ones)``. ``function`` must not apply it itself.
        cut: cut into pieces; None runs the branch whole.
    """

    name: str
    modules: tuple[nn.Module, ...]
    function: Callable[..., Tensor] | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    drop_path: nn.Module | None = None
    cut: Cut | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute ``F(x)``, before stochastic depth and activation."""
        if self.function is not None:
            return self.function(x, *args, **kwargs)
        for module in self.modules:
            x = module(x)
        return x


@singledispatch
def branches(block: nn.Module) -> list[Branch]:
    """List the residual branches of a block, in the order in which its forward applies them.

    Register a function for a class of blocks to make the class rewirable. The function describes
    the ``forward`` of that class; a subclass that overrides ``forward`` needs a function of its
    own. It raises `ChangesShapeError` for a block that changes the shape of its input.
    """
    raise NoFamilyError(f"no family is registered for {type(block).__name__}")


@singledispatch
def returned(block: nn.Module, y: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wrap the result ``y`` as the block's ``forward`` would return it: by default ``y`` itself.

    Register a function for blocks that return more, such as ``(y, thw)``. It is called with the
    block, ``y`` and the other arguments of the block's call.
    """
    if not described(block):
        return import_module(_PATTERN).returned(block, y, *args, **kwargs)
    return y


@dataclass(frozen=True, slots=True)
class Leading:
    """Recomputation in pieces, for a module that treats its leading dimensions as one batch.

    Attributes:
        inner: number of trailing dimensions, of input and output, that are not batch dimensions.
        growth: number of elements kept alive in the backward per element of input.
    """

    inner: int
    growth: float


@singledispatch
def recomputed(module: nn.Module) -> bool | Leading:  # noqa: ARG001
    """Tell whether the backward pass recomputes a module between stages instead of storing it.

    Register a function that returns True for stems and down-sampling layers: modules that map one
    tensor to one tensor, and are cheap compared with the stages around them. It returns `Leading`
    for a module that may run in pieces.
    """
    return False


@singledispatch
def kept_beside(module: nn.Module) -> int:  # noqa: ARG001
    """Count the elements that a token keeps alive in a module beyond those that its family counts.

    Register a function for layers that replace a block's own and compute more, such as LoRA's. The
    modules inside such a layer are counted separately.
    """
    return 0


_FAMILIES = "re2tal.reversible.families"
_PATTERN = f"{_FAMILIES}.pattern"

# Files in `families`, by the library whose blocks they describe.
_FILES = {
    "torchvision.models": ("mvit", "swin", "video_resnet", "vision_transformer"),
    "timm.models": ("timm",),
    "transformers.models": ("transformers",),
}


def load_families(cls: type) -> None:
    """Register the families of the library that defines a class or one of its base classes.

    Call it before `branches`, `returned` or `recomputed` is asked about a module of the class.
    Further calls cost nothing.

    Args:
        cls: class of a module.
    """
    for base in cls.__mro__:
        package = ".".join(base.__module__.split(".")[:2])
        for name in _FILES.get(package, ()):
            import_module(f"{_FAMILIES}.{name}")
        if package == "transformers.models":
            import_module(f"{_FAMILIES}.transformers").register(base)


def split(block: nn.Module | None) -> list[Branch]:
    """List the branches of a block, after checking that they may replace its forward.

    Raises:
        NotReversibleError: if no family describes the block, if its ``forward`` is not the one that
            the family describes, or if the block itself has hooks, which a stage would not call.
    """
    if block is None:
        raise NoFamilyError("it is None")
    if _own_forward(block):
        raise NotReversibleError(
            f"its forward is not that of {type(block).__name__}, but was set on this object"
        )
    if not described(block):
        found: list[Branch] = import_module(_PATTERN).split(block)
    else:
        found = [_widened(branch) for branch in branches(block)]
    if has_hooks(block):
        raise NotReversibleError(
            "it has hooks of its own, which would not be called: "
            "hook the stage or the modules inside the block instead, and call fully_shard on "
            "the stage's Sequential or on the owner of its ModuleList"
        )
    return found


def _widened(branch: Branch) -> Branch:
    """Add to a branch's cut the elements that its family does not count; see `kept_beside`."""
    more = sum(kept_beside(module) for top in branch.modules for module in top.modules())
    if branch.cut is None or more == 0:
        return branch
    return replace(branch, cut=Wider(branch.cut, more))


def described(block: nn.Module) -> bool:
    """Tell whether a family describes the forward of a block's class; others are tried out."""
    load_families(type(block))
    family = next(cls for cls in type(block).__mro__ if cls in branches.registry)
    return family is not object and type(block).forward is getattr(family, "forward", None)


def _own_forward(block: nn.Module) -> bool:
    """Tell whether the block's ``__dict__`` has a ``forward`` that is not from `rewire`."""
    forward = vars(block).get("forward")
    return forward is not None and not type(forward).__module__.startswith(__package__ or "")


def check_complete(block: nn.Module, found: Sequence[Branch]) -> None:
    """Check that the branches name every module with parameters; unnamed ones would not train.

    Raises:
        NotReversibleError: if parameters belong to no branch; the message names them.
    """
    owned = {id(p) for branch in found for m in branch.modules for p in m.parameters()}
    missing = [name for name, p in block.named_parameters() if id(p) not in owned]
    if missing:
        raise NotReversibleError(f"no branch names the modules that hold {', '.join(missing)}")


def has_hooks(module: nn.Module) -> bool:
    """Tell whether the module itself has forward or backward hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
