"""torchvision's Vision Transformer: arXiv 2010.11929."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

from re2tal.reversible.branches import Branch, branches, has_hooks
from re2tal.reversible.families.vit import (
    SelfAttention,
    differentiable_path,
    mlp_cut,
    scores,
)


@branches.register
def _encoder(block: EncoderBlock) -> list[Branch]:
    def attention(x: Tensor) -> Tensor:
        result: Tensor = block.dropout(_attend(block.self_attention, block.ln_1(x)))
        return result

    channels, hidden = block.mlp[0].in_features, block.mlp[0].out_features
    return [
        Branch(
            "attention",
            (block.ln_1, block.self_attention, block.dropout),
            attention,
            # Kept: input, norm; q, k, v; result of attention and its gradient; gradients of q, k,
            # and v, or projection, dropout and its mask. Called as a module it keeps 3 C more.
            cut=SelfAttention(
                10 * channels,
                scores(block.num_heads, fused=True, dropout=block.self_attention.dropout),
            ),
        ),
        Branch("mlp", (block.ln_2, block.mlp), cut=mlp_cut(channels, hidden)),
    ]


def _attend(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Compute self-attention of ``(B, N, C)``, with the values and random numbers of the module.

    The module copies queries, keys and values apart. Their gradients, each as large as all three,
    are then added one by one. Here one operator joins them.
    """
    if type(module) is not nn.MultiheadAttention or has_hooks(module) or not module.batch_first:
        with differentiable_path():
            found: Tensor = module(x, x, x, need_weights=False)[0]
        return found
    x = x.transpose(0, 1)  # as the module: dropout draws in the order of memory
    qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    parts = qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(2)
    q, k, v = (part.permute(1, 2, 0, 3) for part in parts)  # (B, heads, N, C / heads)
    dropout = module.dropout if module.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).permute(2, 0, 1, 3).flatten(2)
    return F.linear(y, module.out_proj.weight, module.out_proj.bias).transpose(0, 1)
