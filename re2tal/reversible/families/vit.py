"""How the branches of a vision transformer are cut, whichever library it comes from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from timm.layers import Attention, DiffAttention, GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor
from torchvision.models.vision_transformer import EncoderBlock

from re2tal.reversible.branches import Branch, BySample, ByToken, Cut, Layout, Whole, branches

_COPIES = 4
"""Of an attention matrix, kept alive without a fused kernel: the scores or their mask of dropout,
their softmax, and a gradient of each."""


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """For attention among the tokens of a sample, ``(B, N, C)``; a sample is a unit.

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
        """The samples of ``(B, N, C)``."""
        given = (*args, *kwargs.values())
        if any(isinstance(value, Tensor) and value.shape[:1] == x.shape[:1] for value in given):
            return Whole(args, kwargs)
        keys = x.shape[1] // self.spread + 1
        growth = (self.width + self.scores * keys) / x.shape[2]
        return BySample(growth)(x, *args, **kwargs)


def scores(heads: int, *, fused: bool = False, dropout: float = 0.0, more: int = 0) -> int:
    """Elements that an attention keeps alive for each pair of a token and a key.

    Args:
        heads: of the attention.
        fused: whether the scores are left to `scaled_dot_product_attention`, which never holds the
            matrix of all of them, except with dropout on a CPU.
        dropout: its probability in the attention matrix.
        more: copies of the matrix beside those that every attention needs.
    """
    return 0 if fused and dropout == 0 else (_COPIES + more) * heads


def mlp_cut(channels: int, hidden: int, copies: int = 4) -> Cut:
    """The tokens of a norm and an MLP with one hidden layer.

    Args:
        channels: C of the block.
        hidden: width of the hidden layer.
        copies: of the hidden layer that are kept alive. Four are for an activation with a kernel of
            its own: before and after it, a gradient of the one, and what dropout keeps.
    """
    return ByToken(4 * channels + copies * hidden)  # C: input, norm, output and a gradient


@branches.register
def _encoder(block: EncoderBlock) -> list[Branch]:
    def attention(x: Tensor) -> Tensor:
        x = block.ln_1(x)
        with _differentiable_path():
            x = block.self_attention(x, x, x, need_weights=False)[0]
        result: Tensor = block.dropout(x)
        return result

    channels, hidden = block.mlp[0].in_features, block.mlp[0].out_features
    return [
        Branch(
            "attention",
            (block.ln_1, block.self_attention, block.dropout),
            attention,
            # norm; q, k and v, once more with the heads apart; the result of attention, once more
            # with the heads joined; projection, dropout and its mask, and a gradient
            cut=SelfAttention(
                14 * channels,
                scores(block.num_heads, fused=True, dropout=block.self_attention.dropout),
            ),
        ),
        Branch("mlp", (block.ln_2, block.mlp), cut=mlp_cut(channels, hidden)),
    ]


_fastpath_lock = RLock()


@contextmanager
def _differentiable_path() -> Iterator[None]:
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


@branches.register
def _block(block: Block) -> list[Branch]:
    def attention(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = block.attn(block.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return block.ls1(x)

    def mlp(
        x: Tensor,
        attn_mask: Tensor | None = None,  # noqa: ARG001
        is_causal: bool = False,  # noqa: ARG001
    ) -> Tensor:
        return block.ls2(block.mlp(block.norm2(x)))

    return [
        Branch(
            "attention",
            (block.norm1, block.attn, block.ls1),
            attention,
            drop_path=block.drop_path1,
            cut=_attention_cut(block),
        ),
        Branch(
            "mlp",
            (block.norm2, block.mlp, block.ls2),
            mlp,
            drop_path=block.drop_path2,
            cut=_mlp_cut(block),
        ),
    ]


def _attention_cut(block: Block) -> Cut | None:
    attention: Any = block.attn
    if type(attention) not in (Attention, DiffAttention):
        return None  # what it does to its tokens is not known
    maps = 2 if type(attention) is DiffAttention else 1
    return SelfAttention(
        # norm; q, k and v, once more normalised; the result of attention, once more with the heads
        # joined, normalised, gated; projection, scale, a mask of dropout, and a gradient
        width=16 * attention.qkv.in_features,
        scores=maps
        * scores(attention.num_heads, fused=attention.fused_attn, dropout=attention.attn_drop.p),
    )


def _mlp_cut(block: Block) -> Cut | None:
    mlp: Any = block.mlp
    if type(mlp) in (Mlp, GluMlp):
        return mlp_cut(mlp.fc1.in_features, mlp.fc1.out_features)
    if type(mlp) is SwiGLU:  # two layers side by side
        return mlp_cut(mlp.fc1_g.in_features, 2 * mlp.fc1_g.out_features)
    return None  # it may mix tokens
