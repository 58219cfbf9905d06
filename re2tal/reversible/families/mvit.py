"""torchvision's Multiscale Vision Transformers: arXiv 2104.11227 (v1) and 2112.01526 (v2).

Blocks exchange ``(x, thw)``: tokens ``(B, 1 + T H W, C)``, the class token first, and their grid.
"""

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor
from torchvision.models.video.mvit import MultiscaleAttention, MultiscaleBlock

from re2tal.reversible.branches import Branch, ChangesShapeError, branches, returned
from re2tal.reversible.families.vit import SelfAttention, mlp_cut, scores
from re2tal.reversible.layouts import BySample, Cut


@branches.register
def _mvit(block: MultiscaleBlock) -> list[Branch]:
    _check_shape(block)

    def normed(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if block.needs_transposal:
            return norm(x.transpose(1, 2)).transpose(1, 2)
        return norm(x)

    def attention(x: Tensor, thw: tuple[int, int, int]) -> Tensor:
        result: Tensor = block.attn(normed(block.norm1, x), thw)[0]
        return result

    def mlp(x: Tensor, thw: tuple[int, int, int]) -> Tensor:  # noqa: ARG001
        result: Tensor = block.mlp(normed(block.norm2, x))
        return result

    return [
        Branch(
            "attention",
            (block.norm1, block.attn),
            attention,
            drop_path=block.stochastic_depth,
            cut=_attention_cut(block.attn),
        ),
        Branch(
            "mlp",
            (block.norm2, block.mlp),
            mlp,
            drop_path=block.stochastic_depth,
            cut=_mlp_cut(block),
        ),
    ]


@returned.register
def _with_grid(block: MultiscaleBlock, y: Tensor, thw: tuple[int, int, int]) -> Any:  # noqa: ARG001
    return y, thw


def _check_shape(block: MultiscaleBlock) -> None:
    changes = []
    if block.pool_skip is not None:
        stride = " x ".join(str(step) for step in block.pool_skip.pool.stride)
        changes.append(f"pools its tokens with stride {stride}")
    if block.project is not None:
        project = block.project
        changes.append(f"projects {project.in_features} channels to {project.out_features}")
    if changes:
        raise ChangesShapeError(f"it {' and '.join(changes)}")


def _attention_cut(attention: MultiscaleAttention) -> Cut:
    pools = [p for p in (attention.pool_q, attention.pool_k, attention.pool_v) if p is not None]
    return SelfAttention(
        # Kept: norm; q, k, v; result of attention; projection; gradients of q, k, v. Each pool
        # keeps four more: transposed channels, convolution, joined class token, norm.
        width=(11 + 4 * len(pools)) * attention.output_dim,
        # Relative positions keep two more matrices: their bias and one of its summands.
        scores=scores(attention.num_heads, more=0 if attention.rel_pos_h is None else 2),
        spread=prod(attention.pool_k.pool.stride) if attention.pool_k is not None else 1,
    )


def _mlp_cut(block: MultiscaleBlock) -> Cut:
    channels, hidden = block.mlp[0].in_features, block.mlp[0].out_features
    if block.needs_transposal:  # its norm is a BatchNorm1d, which needs whole samples
        return BySample((4 * channels + 4 * hidden) / channels)
    return mlp_cut(channels, hidden)
