"""The tape of one forward, rewound branch by branch, and tensors that can be rebuilt from it."""

from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from re2tal.reversible.replay import ReversibleError


class Tape:
    """The two streams of one forward at the depth which its backward has reached."""

    def __init__(self) -> None:
        self.bottom = 0  # the first branch that has a backward: nothing below it needs rebuilding
        self._depth = 0
        self._streams: tuple[Tensor, Tensor] | None = None
        self._versions: tuple[int, int] = (0, 0)

    def hold(self, depth: int, current: Tensor, previous: Tensor) -> None:
        """Hold ``x_depth`` and ``x_{depth-1}``, and let go of what was held."""
        # Detached: a stream that knew its node would keep the node, and thus this tape, alive.
        self._depth = depth
        self._streams = current.detach(), previous.detach()
        self._versions = current._version, previous._version

    def release(self) -> None:
        """Let go of the streams: no branch needs them any more."""
        self._streams = None

    def at(self, depth: int, where: str) -> tuple[Tensor, Tensor]:
        """``x_depth`` and ``x_{depth-1}``.

        Raises:
            ReversibleError: if the tape is elsewhere, which a second backward brings about, or if
                a stream was modified in place.
        """
        if self._streams is None or self._depth != depth:
            raise ReversibleError(
                f"{where} was asked for a second backward of one forward, but a reversible stage "
                "rebuilds its activations once. Run the forward again, ask for all gradients in "
                "one call, or call set_reversible(model, False) to store activations."
            )
        current, previous = self._streams
        if (current._version, previous._version) != self._versions:
            raise ReversibleError(
                f"{where}: the input of the stage was modified in place after its forward. "
                "Use the out-of-place form of that operation."
            )
        return current, previous


# Beside the tensors, not on them: a tensor that is pickled or sent takes its attributes along.
_REBUILDS: MutableMapping[Tensor, tuple[Callable[[], Tensor], int]] = WeakTensorKeyDictionary()


def rebuildable(tensor: Tensor, rebuild: Callable[[], Tensor]) -> Tensor:
    """Note on a tensor how its values can be had again, so that a stage need not keep them.

    Modules that are recomputed in the backward pass ask for their input in this way: the merged
    streams of the stage before, or frames that are normalised anew from ``uint8``.

    Args:
        tensor: what was computed.
        rebuild: returns the same values, bit for bit, until the backward pass has passed here. It
            does not count once the tensor is modified in place.

    Returns:
        ``tensor`` itself.
    """
    _REBUILDS[tensor] = rebuild, version_of(tensor)
    return tensor


def rebuild_of(tensor: Tensor) -> Callable[[], Tensor] | None:
    """How the values of a tensor can be had again; None if they have to be kept."""
    rebuild, version = _REBUILDS.get(tensor, (None, 0))
    return rebuild if version == version_of(tensor) else None


def version_of(tensor: Tensor) -> int:
    """Counts modifications in place, except of tensors that know no gradients at all."""
    return 0 if tensor.is_inference() else tensor._version


def no_gradients_of_gradients(where: str) -> None:
    """Refuse a backward that is recorded itself.

    Raises:
        ReversibleError: if gradients are on.
    """
    if torch.is_grad_enabled():
        raise ReversibleError(
            f"{where}: gradients of gradients (create_graph=True) do not pass "
            "through a reversible stage. Call set_reversible(model, False)."
        )
