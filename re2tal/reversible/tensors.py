"""Facts of a tensor beside its values: who holds its memory, and whether its values are needed.

Memory that nobody else holds may be changed in place. Values that can be computed again need not be
kept for the backward, and those that nothing reads any more are freed.
"""

import math
from collections.abc import Callable, MutableMapping
from functools import partial

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def alone(x: Tensor) -> bool:
    """Tell whether no other tensor shares this one's memory: a view, or one saved by autograd.

    Only tensors count, not Python names: a second name of the same tensor goes unnoticed.
    """
    count: int = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    return count <= 2  # the tensor, and the object that asks


def version_of(tensor: Tensor) -> int:
    """Return autograd's count of in-place changes; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


PartOf = Callable[[Callable[[Tensor], Tensor]], Tensor]
"""Function that returns ``take(tensor)`` for a given ``take``, and rebuilds only that part."""

# A dictionary, not an attribute of the tensor: pickling or sending a tensor includes attributes.
_REBUILDS: MutableMapping[Tensor, tuple[Callable[[], Tensor], int, PartOf | None]] = (
    WeakTensorKeyDictionary()
)


def rebuildable(
    tensor: Tensor, rebuild: Callable[[], Tensor], part: PartOf | None = None
) -> Tensor:
    """Register a function that computes a tensor's values again, so that they need not be kept.

    Modules that are recomputed in the backward pass get their input in this way: the merged streams
    of the stage before, or frames that are normalised again from ``uint8``.

    Args:
        tensor: the tensor. An in-place change of it cancels the registration.
        rebuild: function that returns the same values, bit for bit, as long as the backward pass
            has not gone further back than this tensor.
        part: function that rebuilds the part that `part_of` takes; by default the whole tensor is
            rebuilt and the part taken from it.

    Returns:
        ``tensor`` itself.
    """
    _REBUILDS[tensor] = rebuild, version_of(tensor), part
    return tensor


def rebuild_of(tensor: Tensor) -> Callable[[], Tensor] | None:
    """Look up the function given to `rebuildable`; None if the tensor's values must be kept."""
    rebuild, version, _ = _REBUILDS.get(tensor, (None, 0, None))
    return rebuild if version == version_of(tensor) else None


def part_of(tensor: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
    """Take a part of a tensor. If the tensor is `rebuildable`, so is the part.

    Args:
        tensor: the tensor.
        take: function that returns the part, such as a slice.
    """
    rebuild = rebuild_of(tensor)
    part = take(tensor)
    if rebuild is None:
        return part
    rebuild_part = _REBUILDS[tensor][2]
    if rebuild_part is None:
        return rebuildable(part, lambda: take(rebuild()))
    return rebuildable(part, partial(rebuild_part, take))


# Callers' local variables refer to a tensor until they return, so its memory cannot be freed by
# dropping our own reference.
_SPENT: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()


def spent(tensor: Tensor) -> Tensor:
    """Promise that nothing reads a tensor after the stage or recomputed module that gets it next.

    That module frees the tensor's memory as soon as it does not need it any more, and leaves NaN in
    its place. Without the promise, the callers' variables would keep the memory.

    Args:
        tensor: the tensor. Its next module must have no hooks, which could read it.

    Returns:
        ``tensor`` itself.
    """
    if isinstance(tensor, Tensor):
        _SPENT[tensor] = version_of(tensor)
    return tensor


def give_up(tensor: Tensor) -> None:
    """Free the memory of a `spent` tensor; do nothing for others."""
    if _SPENT.pop(tensor, None) == version_of(tensor):
        # The shape stays, in one element of memory; a forbidden read gives NaN, not stale values.
        tensor.data = tensor.new_full((), math.nan).expand(tensor.shape)
