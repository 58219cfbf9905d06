"""The branches of a residual block, whose skip connections are moved, and their pieces.

A family of blocks is one function registered with `branches`. It says what is added to the skip
connection, and nothing else: the engine does the rest. The families of other libraries are in
`families`.

A branch that treats the units of its input alike (the tokens of an MLP, the windows of a window
attention, the samples of a convolution) gives the same result piece by piece, so that the
activations of only one piece are in memory. The number of units in a piece follows from a budget of
bytes, and from shapes only: a forward and its replay cut alike, which bit-exact replays need.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import singledispatch
from importlib import import_module
from itertools import pairwise
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from re2tal.reversible.coupling import Grid, accumulate, fused

BYTES_PER_ELEMENT = 4
"""Counted for every element; under autocast a piece stays below its budget."""


class Layout(Protocol):
    """The units of one input."""

    @property
    def units(self) -> int:
        """Number of units; the same for each sample of the batch, sample by sample."""
        ...

    @property
    def elements(self) -> int:
        """Elements that a unit keeps alive while the branch is differentiated."""
        ...

    @property
    def contiguous(self) -> bool:
        """Whether the piece of all units is the input itself, in another shape."""
        ...

    @property
    def light(self) -> bool:
        """Whether its own tensors are few enough to be kept from the forward for the backward."""
        ...

    def share(self) -> tuple[Tensor, ...]:
        """Compute once, with gradients, what all pieces use: a relative position bias."""
        ...

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """Make an empty tensor of the input's shape, for `put` to fill with pieces like this."""
        ...

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return the units ``start:stop`` of a tensor shaped like the input; units come first."""
        ...

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write a piece to its place in a tensor that `new` has made."""
        ...

    def add(
        self,
        out: Tensor,
        start: int,
        stop: int,
        piece: Tensor,
        grid: Grid | None = None,
        sign: int = 1,
    ) -> None:
        """Add a piece to its place in any tensor shaped like the input, as `accumulate` does."""
        ...

    def run(
        self, branch: Any, piece: Tensor, start: int, stop: int, shared: Sequence[Tensor]
    ) -> Tensor:
        """Run the branch on a piece; the result has the piece's shape."""
        ...


class Cut(Protocol):
    """Function that lays out an input in units."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """Lay out an input; called with the arguments of the block's call."""
        ...


@dataclass(frozen=True, slots=True)
class _Called:
    """Parts that layouts share whose pieces the branch itself is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    contiguous = True
    light = True

    def share(self) -> tuple[Tensor, ...]:
        """Share nothing."""
        return ()

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """Make an empty tensor, contiguous."""
        return piece.new_empty(shape)

    def run(
        self,
        branch: Callable[..., Tensor],
        piece: Tensor,
        start: int,  # noqa: ARG002
        stop: int,  # noqa: ARG002
        shared: Sequence[Tensor],  # noqa: ARG002
    ) -> Tensor:
        """Call the branch."""
        return branch(piece, *self.args, **self.kwargs)


@dataclass(frozen=True, slots=True)
class Whole(_Called):
    """One unit: the branch runs on the whole input."""

    units = 1
    elements = 0

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:  # noqa: ARG002
        """Return the input itself."""
        return x

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:  # noqa: ARG002
        """Write all of it."""
        out.copy_(piece)

    def add(
        self,
        out: Tensor,
        start: int,  # noqa: ARG002
        stop: int,  # noqa: ARG002
        piece: Tensor,
        grid: Grid | None = None,
        sign: int = 1,
    ) -> None:
        """Add all of it."""
        accumulate(out, piece, grid, sign)


@dataclass(frozen=True, slots=True)
class Tokens(_Called):
    """Vectors along the last dimension."""

    units: int
    elements: int

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return a view, where the input is contiguous."""
        return x.reshape(self.units, x.shape[-1])[start:stop]

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write some rows."""
        out.view(self.units, out.shape[-1])[start:stop] = piece

    def add(
        self,
        out: Tensor,
        start: int,
        stop: int,
        piece: Tensor,
        grid: Grid | None = None,
        sign: int = 1,
    ) -> None:
        """Add to some rows."""
        with in_rows(out) as rows:
            accumulate(rows[start:stop], piece, grid, sign)


@dataclass(frozen=True, slots=True)
class Samples(_Called):
    """Samples of a batch, in the memory format that they have: convolutions are chosen by it."""

    units: int
    elements: int

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """Make an empty tensor, its samples laid out as those of the piece."""
        inner = sorted(range(1, piece.ndim), key=piece.stride, reverse=True)
        return torch.empty_permuted(shape, (0, *inner), dtype=piece.dtype, device=piece.device)

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return a view."""
        return x[start:stop]

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write some samples."""
        out[start:stop] = piece

    def add(
        self,
        out: Tensor,
        start: int,
        stop: int,
        piece: Tensor,
        grid: Grid | None = None,
        sign: int = 1,
    ) -> None:
        """Add to some samples."""
        accumulate(out[start:stop], piece, grid, sign)


@dataclass(frozen=True, slots=True)
class ByToken:
    """Cut for a branch that treats all positions alike: LayerNorm over the last dimension, an MLP.

    The branch is called with ``(tokens, C)``.

    Attributes:
        width: elements that one token keeps alive while the branch is differentiated, roughly the
            sum of the widths of all its intermediate results.
    """

    width: int

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """Make every vector along the last dimension a unit."""
        return Tokens(args, kwargs, prod(x.shape[:-1]), self.width)


@dataclass(frozen=True, slots=True)
class BySample:
    """Cut for a branch that treats the samples of a batch alike: convolutions, global attention.

    Batch statistics tie samples together: a branch with a BatchNorm in training mode is not cut.

    Attributes:
        growth: elements that are kept alive in the backward per element of input.
    """

    growth: float

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """Make every sample of the batch a unit."""
        return Samples(args, kwargs, x.shape[0], int(self.growth * prod(x.shape[1:])))


def spans(layout: Layout, budget: int) -> list[tuple[int, int]]:
    """Cut the units into pieces of as many as the budget of bytes holds, at least one each.

    The pieces are of equal size up to one unit, so that none is left with a handful of units.
    """
    fitting = max(1, budget // max(1, layout.elements * BYTES_PER_ELEMENT))
    count = -(-layout.units // fitting)
    edges = [layout.units * i // count for i in range(count + 1)]
    return list(pairwise(edges))


_ONE_HOLDER = 2
"""Count of a storage that only one tensor holds, beside the object that asks for it."""


def alone(x: Tensor, *, beside: int = 0) -> bool:
    """Tell whether no other tensor holds this one's memory, a view or what autograd keeps.

    Args:
        x: the tensor.
        beside: number of other tensors that may hold it.
    """
    count: int = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    return count <= _ONE_HOLDER + beside


@contextmanager
def in_rows(out: Tensor) -> Iterator[Tensor]:
    """Change a tensor as a matrix of vectors along its last dimension, in any memory format."""
    rows = out.reshape(-1, out.shape[-1])
    yield rows
    if rows.untyped_storage()._cdata != out.untyped_storage()._cdata:  # no view of it was possible
        out.copy_(rows.view(out.shape))


@dataclass(frozen=True, slots=True)
class Places:
    """Rows of a tensor that some vectors along its last dimension come from, and go to.

    Attributes:
        index: row of each vector, ``(..., n)``, in int64; each row once, but for padding, whose
            number is any.
        padding: ``(..., n, 1)``, true at padding; None if there is none.
    """

    index: Tensor
    padding: Tensor | None = None

    def __getitem__(self, chosen: slice) -> "Places":
        padding = None if self.padding is None else self.padding[chosen]
        return Places(self.index[chosen], padding)

    @classmethod
    def behind(cls, index: Tensor, end: int) -> "Places":
        """Take rows of which those behind an end stand for padding."""
        return cls(index.clamp(max=end - 1), (index >= end).unsqueeze(-1))

    def take(self, x: Tensor) -> Tensor:
        """Gather the vectors, zero at padding."""
        rows = x.reshape(-1, x.shape[-1])
        # Several times as fast as rows[index].
        taken = rows.index_select(0, self.index.reshape(-1)).view(*self.index.shape, -1)
        return taken if self.padding is None else taken.masked_fill(self.padding, 0)

    def add(self, out: Tensor, added: Tensor, grid: Grid | None = None, sign: int = 1) -> None:
        """Add vectors to their rows, as `accumulate` does."""
        index, values = self.index.reshape(-1), added.reshape(-1, out.shape[-1])
        padding = None if self.padding is None else self.padding.reshape(-1)
        with in_rows(out) as rows:
            dense = rows.is_contiguous() and values.is_contiguous()
            kernels = fused(rows, values) if dense else None
            if kernels is not None:
                kernels.add(rows, values, grid, sign, index, padding)
                return
            if grid is not None:
                values = grid.round(values, sign)
            elif sign < 0:
                values = -values
            if padding is not None:
                values = values.masked_fill(padding.unsqueeze(1), 0)
            if rows.device.type == "cpu":  # there twice as fast as index_add_
                rows.scatter_add_(0, index.unsqueeze(1).expand(-1, rows.shape[1]), values)
            else:
                # In any order, on a GPU. But nothing but zeros is added to a row twice, so that
                # the order does not matter: float32's atomic additions round as others do. They
                # make subnormal numbers zero, which the kernel above does not.
                rows.index_add_(0, index, values)


def per_unit(factor: Tensor, layout: Layout, start: int, stop: int, dims: int) -> Tensor:
    """Spread a factor a sample, ``(B, 1)``, to one a unit of a piece, ``(n, 1, ..., 1)``."""
    if layout.units > 1:
        per_sample = layout.units // factor.shape[0]
        first, last = start // per_sample, (stop - 1) // per_sample
        factor = factor.reshape(-1)
        if first == last:
            factor = factor[first : first + 1]
        else:
            index = torch.arange(start, stop, device=factor.device) // per_sample
            factor = factor[index]
    return factor.view(-1, *(1,) * (dims - 1))


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
        function: ``F``, from a tensor to one of the same shape, called as
            ``function(x, *args, **kwargs)`` with whatever else the block is called with; without
            it, the modules in a row on ``x`` alone.
        activation: activation after the addition, where the block computes
            ``activation(x + F(x))``. It moves into the branch.
        drop_path: stochastic depth of the whole branch, which scales the result sample by sample
            (``F(x) * drop_path(ones)``). Not to be applied by ``function``.
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
    """List the residual branches of a block, in the order in which it applies them.

    Register a function for a class of blocks to make the class rewirable. The function describes
    that class's own ``forward``; a subclass with another one needs a function of its own. It raises
    `ChangesShapeError` for a block of the class that changes the shape of its input.
    """
    raise NoFamilyError(f"no family is registered for {type(block).__name__}")


@singledispatch
def returned(block: nn.Module, y: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return what the block's ``forward`` would for a result ``y``: by default ``y`` itself.

    Register a function for blocks that return more, such as ``(y, thw)``; it is called with the
    block, ``y`` and whatever else the block was called with.
    """
    if not described(block):
        return import_module(_PATTERN).returned(block, y, *args, **kwargs)
    return y


@dataclass(frozen=True, slots=True)
class Leading:
    """Recomputation in pieces, of a module that treats alike all that its first dimensions number.

    Attributes:
        inner: number of last dimensions that belong together, of the input and of the output.
        growth: elements that are kept alive in the backward per element of input.
    """

    inner: int
    growth: float


@singledispatch
def recomputed(module: nn.Module) -> bool | Leading:  # noqa: ARG001
    """Tell whether a module between stages is recomputed in the backward pass instead of stored.

    Register a function that returns True for stems and down-sampling layers: modules that turn one
    tensor into one tensor, cheaply compared with the stages around them. It returns `Leading` for
    one that may run in pieces.
    """
    return False


_FAMILIES = "re2tal.reversible.families"
_PATTERN = f"{_FAMILIES}.pattern"

# Files with the families of a library.
_FILES = {
    "torchvision.models": ("mvit", "swin", "video_resnet", "vision_transformer"),
    "timm.models": ("timm",),
    "transformers.models": ("transformers",),
}


def load_families(cls: type) -> None:
    """Register the families of the library that a class, or one that it derives from, belongs to.

    To be called before asking `branches`, `returned` or `recomputed` about a module of the class.
    Calling it again costs nothing.

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
    """List the branches of a block, once it is sure that running them replaces its forward.

    Raises:
        NotReversibleError: if no family describes the block, its ``forward`` is not the one that
            the family describes, or hooks hang on the block itself, where nothing calls them.
    """
    if block is None:
        raise NoFamilyError("the place is empty")
    if _own_forward(block):
        raise NotReversibleError(
            f"its forward is not that of {type(block).__name__}, but was given to it alone"
        )
    if not described(block):
        found: list[Branch] = import_module(_PATTERN).split(block)
    else:
        found = branches(block)
    if has_hooks(block):
        raise NotReversibleError(
            "it has hooks of its own, which would not be called: "
            "hook the stage or the modules inside the block instead, and call fully_shard on "
            "the stage's Sequential or on the owner of its ModuleList"
        )
    return found


def described(block: nn.Module) -> bool:
    """Tell whether a family describes the forward of a block's class, or it has to be tried out."""
    load_families(type(block))
    family = next(cls for cls in type(block).__mro__ if cls in branches.registry)
    return family is not object and type(block).forward is getattr(family, "forward", None)


def _own_forward(block: nn.Module) -> bool:
    """Tell whether somebody else than `rewire` has given this very block a forward."""
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
    """Tell whether something is called when the module is."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
