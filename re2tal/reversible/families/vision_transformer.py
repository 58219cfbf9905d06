"""torchvision's Vision Transformer: arXiv 2010.11929."""

from torch import Tensor
from torchvision.models.vision_transformer import EncoderBlock

from re2tal.reversible.branches import Branch, branches
from re2tal.reversible.families.vit import (
    SelfAttention,
    differentiable_path,
    mlp_cut,
    scores,
)


@branches.register
def _encoder(block: EncoderBlock) -> list[Branch]:
    def attention(x: Tensor) -> Tensor:
        x = block.ln_1(x)
        with differentiable_path():
            x = block.self_attention(x, x, x, need_weights=False)[0]
        result: Tensor = block.dropout(x)
        return result

    channels, hidden = block.mlp[0].in_features, block.mlp[0].out_features
    return [
        Branch(
            "attention",
            (block.ln_1, block.self_attention, block.dropout),
            attention,
            # Kept: norm; q, k, v, and again with heads apart; result of attention with heads apart
            # and joined; projection; dropout and its mask; a gradient.
            cut=SelfAttention(
                14 * channels,
                scores(block.num_heads, fused=True, dropout=block.self_attention.dropout),
            ),
        ),
        Branch("mlp", (block.ln_2, block.mlp), cut=mlp_cut(channels, hidden)),
    ]
