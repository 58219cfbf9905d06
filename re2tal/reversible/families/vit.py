"""Cuts of the branches of a vision transformer, whichever library it comes from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from re2tal.reversible.branches import BySample, ByToken, Cut, Layout, Whole

_COPIES = 4
"""Copies of an attention matrix that an unfused kernel keeps alive: the scores or their mask of
dropout, their softmax, and a gradient of each."""


def has_rows(x: Tensor, args: Any, kwargs: Any) -> bool:
    """Tell whether an argument seems to have a row for each sample, and would have to be cut."""
    given = tree_leaves((args, kwargs))
    return any(isinstance(value, Tensor) and value.shape[:1] == x.shape[:1] for value in given)


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """Cut for attention among the tokens of a sample, ``(B, N, C)``; a sample is a unit.

    An argument with a row for each sample, such as a mask of padding, would have to be cut along:
    with one, the branch runs whole.

    Attributes:
        width: elements that a token keeps alive, but for the attention matrices.
        scores: elements that a token keeps alive for each key, from the function `scores`.
        spread: tokens of a sample for each key that a token attends to.
    """

    width: int
    scores: int = 0
    spread: int = 1

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """Lay out the samples of ``(B, N, C)``."""
        if has_rows(x, args, kwargs):
            return Whole(args, kwargs)
        keys = x.shape[1] // self.spread + 1
        growth = (self.width + self.scores * keys) / x.shape[2]
        return BySample(growth)(x, *args, **kwargs)


def scores(heads: int, *, fused: bool = False, dropout: float = 0.0, more: int = 0) -> int:
    """Count the elements that an attention keeps alive for each pair of a token and a key.

    Args:
        heads: number of heads.
        fused: whether the scores are left to `scaled_dot_product_attention`, which never holds the
            matrix of all of them, except with dropout on a CPU.
        dropout: probability of dropout in the attention matrix.
        more: copies of the matrix beside those that every attention needs.
    """
    return 0 if fused and dropout == 0 else (_COPIES + more) * heads


def mlp_cut(channels: int, hidden: int, copies: int = 4) -> Cut:
    """Cut a norm and an MLP with one hidden layer into tokens.

    Args:
        channels: channels of the block.
        hidden: width of the hidden layer.
        copies: copies of the hidden layer that are kept alive. Four are for an activation with a
            kernel of its own: its input and output, a gradient, and the copy that dropout keeps.
    """
    return ByToken(4 * channels + copies * hidden)  # C: input, norm, output and a gradient


_fastpath_lock = RLock()


@contextmanager
def differentiable_path() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` from its path for inference, which rounds in another way.

    It would take it in eval mode wherever no gradient is asked for: in the forward of a reversible
    stage, but not in the replay.
    """
    with _fastpath_lock:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
