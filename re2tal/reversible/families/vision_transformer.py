"""torchvision's Vision Transformer: arXiv 2010.11929."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Tensor
from torchvision.models.vision_transformer import EncoderBlock

from re2tal.reversible.branches import Branch, branches
from re2tal.reversible.families.vit import SelfAttention, mlp_cut, scores


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
