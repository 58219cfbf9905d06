"""timm's Vision Transformer block, from which many of its models are built."""

from typing import Any

from timm.layers import Attention, DiffAttention, GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor

from re2tal.reversible.branches import Branch, branches
from re2tal.reversible.families.vit import SelfAttention, mlp_cut, scores
from re2tal.reversible.layouts import Cut


@branches.register
def _block(block: Block) -> list[Branch]:
    def attention(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = block.attn(block.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        result: Tensor = block.ls1(x)
        return result

    def mlp(
        x: Tensor,
        attn_mask: Tensor | None = None,  # noqa: ARG001
        is_causal: bool = False,  # noqa: ARG001
    ) -> Tensor:
        result: Tensor = block.ls2(block.mlp(block.norm2(x)))
        return result

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
        return None  # how another attention treats its tokens is not known
    maps = 2 if type(attention) is DiffAttention else 1
    return SelfAttention(
        # Kept: norm; q, k, v, and again after their norms; result of attention with heads apart,
        # joined, normalised and gated; projection; scale; dropout mask; a gradient.
        width=16 * attention.qkv.in_features,
        scores=maps
        * scores(attention.num_heads, fused=attention.fused_attn, dropout=attention.attn_drop.p),
    )


def _mlp_cut(block: Block) -> Cut | None:
    mlp: Any = block.mlp
    if type(mlp) in (Mlp, GluMlp):
        return mlp_cut(mlp.fc1.in_features, mlp.fc1.out_features)
    if type(mlp) is SwiGLU:  # two hidden layers side by side
        return mlp_cut(mlp.fc1_g.in_features, 2 * mlp.fc1_g.out_features)
    return None  # another MLP may mix tokens
