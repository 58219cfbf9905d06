"""Cuts of the branches of vision transformers, shared by the families of several libraries."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from re2tal.reversible.layouts import BySample, ByToken, Cut, Layout, Whole

_COPIES = 4
"""Copies of the attention matrix that unfused attention keeps alive: the scores (or the dropout
mask), their softmax, and a gradient of each."""


def has_rows(x: Tensor, args: Any, kwargs: Any) -> bool:
    """Tell whether an argument seems to have a row per sample, and so would have to be cut too."""
    given = tree_leaves((args, kwargs))
    return any(isinstance(value, Tensor) and value.shape[:1] == x.shape[:1] for value in given)


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """Cut of attention among the tokens of a sample, ``(B, N, C)``; a sample is a unit.

    An argument with a row for each sample, such as a padding mask, would have to be cut as well.
    With such an argument the branch runs whole.

    Attributes:
        width: elements that a token keeps alive without the attention matrices.
        scores: elements that a token keeps alive per key, from the function `scores`.
        spread: ratio of tokens to keys: a token attends to ``N / spread`` keys.
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
        fused: whether `scaled_dot_product_attention` computes them. It never holds the whole
            matrix, except with dropout on a CPU.
        dropout: probability of dropout in the attention matrix.
        more: copies of the matrix in addition to those that every attention keeps.
    """
    return 0 if fused and dropout == 0 else (_COPIES + more) * heads


def mlp_cut(channels: int, hidden: int, copies: int = 4) -> Cut:
    """Cut a norm and an MLP with one hidden layer into tokens.

    Args:
        channels: channels of the block.
        hidden: width of the hidden layer.
        copies: copies of the hidden layer that are kept alive. An activation with a kernel of its
            own keeps four: its input and output, a gradient, and the copy of dropout.
    """
    return ByToken(4 * channels + copies * hidden)  # 4: input, norm, output and a gradient


_fastpath_lock = RLock()


@contextmanager
def differentiable_path() -> Iterator[None]:
    """Disable the inference fast path of `nn.MultiheadAttention`, which rounds differently.

    In eval mode PyTorch takes it wherever no gradient is needed: in the forward of a reversible
    stage, but not in its replay.
    """
    with _fastpath_lock:  # the switch is global to the process
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
