"""Layers of Hugging Face transformers: VideoMAE, ViViT, TimeSformer and V-JEPA 2.

The layers are looked up by name, so that this file imports nothing from the library.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from re2tal.reversible.branches import Branch, branches, returned
from re2tal.reversible.families.vit import SelfAttention, mlp_cut, scores
from re2tal.reversible.layouts import Cut


def register(cls: type) -> None:
    """Register the family of a class, if this file describes one.

    Args:
        cls: class of a layer.
    """
    name = f"{cls.__module__.removeprefix('transformers.models.')}.{cls.__qualname__}"
    if name in _BRANCHES and cls not in branches.registry:
        branches.register(cls, _BRANCHES[name])
        if name in _RETURNED:
            returned.register(cls, _RETURNED[name])


def _videomae(block: Any) -> list[Branch]:
    """VideoMAELayer: arXiv 2203.12602."""

    def attention(x: Tensor, **kwargs: Any) -> Tensor:
        result: Tensor = block.attention(block.layernorm_before(x), **kwargs)
        return result

    def mlp(x: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG001
        # `block.output` as a whole would add the skip connection.
        hidden = block.intermediate(block.layernorm_after(x))
        result: Tensor = block.output.dropout(block.output.dense(hidden))
        return result

    dense, inner = block.intermediate.dense, block.attention.attention
    return [
        Branch(
            "attention",
            (block.layernorm_before, block.attention),
            attention,
            cut=_attention_cut(inner, dense.in_features, inner.dropout_prob),
        ),
        Branch(
            "mlp",
            (block.layernorm_after, block.intermediate, block.output),
            mlp,
            cut=_mlp_cut(dense, block.intermediate.intermediate_act_fn),
        ),
    ]


def _vivit(block: Any) -> list[Branch]:
    """VivitLayer: arXiv 2103.15691, its model 1."""

    def attention(x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = block.attention(block.layernorm_before(x), attention_mask, **kwargs)[0]
        result: Tensor = block.dropout(x)
        return result

    def mlp(x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # noqa: ARG001
        result: Tensor = block.dropout(block.mlp(block.layernorm_after(x)))
        return result

    fc1 = block.mlp.fc1
    return [
        Branch(
            "attention",
            (block.layernorm_before, block.attention, block.dropout),
            attention,
            cut=_attention_cut(block.attention, fc1.in_features, block.attention.attention_dropout),
        ),
        Branch(
            "mlp",
            (block.layernorm_after, block.mlp, block.dropout),
            mlp,
            cut=_mlp_cut(fc1, block.mlp.activation_fn),
        ),
    ]


def _vjepa2(block: Any) -> list[Branch]:
    """VJEPA2Layer, of the encoder and the predictor: arXiv 2506.09985."""

    def attention(x: Tensor, position_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # noqa: ARG001
        result: Tensor = block.attention(block.norm1(x), position_mask=position_mask)[0]
        return result

    def mlp(x: Tensor, position_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # noqa: ARG001
        result: Tensor = block.mlp(block.norm2(x))
        return result

    fc1 = block.mlp.fc1
    rotated = 10  # copies of queries and keys that the rotary embedding keeps
    return [
        Branch(
            "attention",
            (block.norm1, block.attention),
            attention,
            drop_path=block.drop_path,
            cut=_attention_cut(
                block.attention, fc1.in_features, block.attention.dropout_prob, more=rotated
            ),
        ),
        Branch(
            "mlp",
            (block.norm2, block.mlp),
            mlp,
            drop_path=block.drop_path,
            cut=_mlp_cut(fc1, block.mlp.activation),
        ),
    ]


def _timesformer(block: Any) -> list[Branch]:
    """TimesformerLayer: arXiv 2102.05095."""
    dense, heads = block.intermediate.dense, block.attention.attention.num_heads
    channels, frames = dense.in_features, block.config.num_frames
    norm, attention = block.layernorm_before, block.attention

    def mlp(x: Tensor, output_attentions: bool = False) -> Tensor:  # noqa: ARG001
        result: Tensor = block.output(block.intermediate(block.layernorm_after(x)))
        return result

    def at_once(x: Tensor, output_attentions: bool = False) -> Tensor:  # noqa: ARG001
        result: Tensor = attention(norm(x))[0]
        return result

    last = Branch(
        "mlp",
        (block.layernorm_after, block.intermediate, block.output),
        mlp,
        drop_path=block.drop_path,
        cut=_mlp_cut(dense, block.intermediate.intermediate_act_fn),
    )
    if block.attention_type != "divided_space_time":
        cut = SelfAttention(_WIDTH * channels, scores=scores(heads))
        return [
            Branch("attention", (norm, attention), at_once, drop_path=block.drop_path, cut=cut),
            last,
        ]
    # Both attentions apply stochastic depth inside: to single places (temporal) or frames (spatial)
    # of a sample, before `temporal_dense` or the mean over frames.
    return [
        Branch(
            "temporal attention",
            (block.temporal_layernorm, block.temporal_attention, block.temporal_dense),
            _temporal(block, frames),
            cut=SelfAttention((_WIDTH + 2) * channels + scores(heads) * frames),
        ),
        Branch(
            "spatial attention",
            (norm, attention),
            _spatial(block, frames),
            cut=SelfAttention((_WIDTH + 4) * channels, scores=scores(heads), spread=frames),
        ),
        last,
    ]


def _temporal(block: Any, frames: int) -> Callable[..., Tensor]:
    """Make the attention among the frames at one place, which adds nothing to the class token."""

    def temporal(x: Tensor, output_attentions: bool = False) -> Tensor:  # noqa: ARG001
        batch, tokens, channels = x.shape
        # (B, 1 + H W T, C) without the class token, to (B H W, T, C): frames vary fastest.
        y = x[:, 1:].reshape(-1, frames, channels)
        y = block.drop_path(block.temporal_attention(block.temporal_layernorm(y))[0])
        y = block.temporal_dense(y.reshape(batch, tokens - 1, channels))
        return nn.functional.pad(y, (0, 0, 1, 0))

    return temporal


def _spatial(block: Any, frames: int) -> Callable[..., Tensor]:
    """Make the attention among the tokens of one frame and the class token.

    The class token gets the mean of its results over the frames.
    """

    def spatial(x: Tensor, output_attentions: bool = False) -> Tensor:  # noqa: ARG001
        batch, _, channels = x.shape
        # (B, T, H W, C), and the class token in front of each frame: (B T, 1 + H W, C).
        patches = x[:, 1:].reshape(batch, -1, frames, channels).transpose(1, 2)
        first = x[:, None, :1].expand(-1, frames, -1, -1)
        y = torch.cat((first, patches), dim=2).flatten(0, 1)
        y = block.drop_path(block.attention(block.layernorm_before(y))[0])
        y = y.reshape(batch, frames, -1, channels)
        patches = y[:, :, 1:].transpose(1, 2).flatten(1, 2)
        return torch.cat((y[:, :, 0].mean(1, keepdim=True), patches), dim=1)

    return spatial


_WIDTH = 13
"""Elements per channel that a token keeps alive in an attention: norm; q, k, v; result with heads
apart and joined; projection, dropout and masks; gradients of q, k, v."""


def _attention_cut(attention: Any, channels: int, dropout: float, more: int = 0) -> SelfAttention:
    fused = attention.config._attn_implementation != "eager"
    return SelfAttention(
        (_WIDTH + more) * channels,
        scores(attention.num_attention_heads, fused=fused, dropout=dropout),
    )


def _mlp_cut(first: nn.Linear, activation: Any) -> Cut:
    # Most of the library's activations consist of elementary operators, whose results are all kept.
    one_kernel = type(activation).__name__ in {"GELUActivation", "ReLU", "SiLUActivation"}
    return mlp_cut(first.in_features, first.out_features, copies=4 if one_kernel else 12)


def _one_tuple(block: nn.Module, y: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:  # noqa: ARG001
    return (y,)


def _without_attentions(
    block: nn.Module,  # noqa: ARG001
    y: Tensor,
    *args: Any,  # noqa: ARG001
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    return y, None


_BRANCHES: dict[str, Callable[[Any], list[Branch]]] = {
    "videomae.modeling_videomae.VideoMAELayer": _videomae,
    "vivit.modeling_vivit.VivitLayer": _vivit,
    "timesformer.modeling_timesformer.TimesformerLayer": _timesformer,
    "vjepa2.modeling_vjepa2.VJEPA2Layer": _vjepa2,
}
_RETURNED: dict[str, Callable[..., Any]] = {
    "timesformer.modeling_timesformer.TimesformerLayer": _one_tuple,
    "vjepa2.modeling_vjepa2.VJEPA2Layer": _without_attentions,
}
