"""Layers of localizers: attention in windows, dropout and positions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from re2tal.localizers import layers
from re2tal.localizers.layers import Embedding, TransformerBlock, local_attention
from tests.localizers.small import ACTIONFORMER, built, sample


def slow_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, window: int) -> Tensor:
    """Softmax over an explicit list of steps, one query at a time."""
    out = torch.zeros_like(query)
    batch, heads, length, size = query.shape
    for b in range(batch):
        for i in range(length):
            near = [
                j
                for j in range(length)
                if i == j or (bool(mask[b, j]) and (window == 0 or abs(i - j) <= window // 2))
            ]
            for h in range(heads):
                weights = (key[b, h, near] @ query[b, h, i] / math.sqrt(size)).softmax(0)
                out[b, h, i] = weights @ value[b, h, near]
    return out


@pytest.mark.parametrize("window", [0, 1, 3, 9])
@pytest.mark.parametrize("length", [1, 4, 70])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_attention_and_its_gradients_are_those_of_the_definition(
    window: int, length: int, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_blocks:
        monkeypatch.setattr(layers, "DENSE_LENGTH", 0)
    inputs = torch.randn(3, 3, 2, length, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, length) < 0.7
    mask[1] = False  # a sample that is all padding has finite results too
    mask[2] = True
    mask[2, 15:29] = False  # a stitched window; the gap is wider than the attention
    weights = torch.randn(3, 2, length, 4, dtype=torch.float64)
    results = []
    for attend in (local_attention, slow_attention):
        query, key, value = inputs
        out = attend(query, key, value, mask, window)
        results.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    assert all(tensor.isfinite().all() for tensor in results[0])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_dropout_leaves_the_skip_connections_alone() -> None:
    block = TransformerBlock(
        4, heads=2, window=3, stride=1, residual_scale=1.0, dropout=1.0, drop_path=0.0
    )
    x, mask = torch.randn(2, 8, 4), torch.ones(2, 8, dtype=torch.bool)
    assert torch.equal(block(x, mask)[0], x)
    assert not torch.allclose(block.eval()(x, mask)[0], x)
    block.train()
    second, last = block.mlp[3], block.mlp[4]
    assert isinstance(second, nn.Linear)
    assert isinstance(last, nn.Dropout)
    block.attn.drop.p = last.p = 0.0  # what is left lies between the layers of the MLP
    nn.init.ones_(second.bias)
    torch.testing.assert_close(block(x, mask)[0], x + block.attn(block.ln1(x), mask) + 1)


def test_input_dropout_leaves_out_whole_channels() -> None:
    embed = Embedding(32, 32, streams=(), layers=0, positions=0, dropout=0.5)
    x, mask = torch.ones(4, 8, 32), torch.ones(4, 8, dtype=torch.bool)
    dropped = embed(x, mask)
    assert torch.equal(dropped, dropped[:, :1].expand(4, 8, 32))
    assert dropped.unique().tolist() == [0, 2]
    assert torch.equal(embed.eval()(x, mask), x)


def test_positions_are_stretched_over_longer_sequences() -> None:
    config = replace(ACTIONFORMER, positions=16)
    features, mask = sample([32, 32])
    embed = built(config).pyramid.embed
    plain = built(replace(config, positions=0)).pyramid.embed
    plain.load_state_dict(embed.state_dict())
    x = features.transpose(1, 2)
    assert embed.positions is not None
    added = embed(x[:, :8], mask[:, :8]) - plain(x[:, :8], mask[:, :8])
    torch.testing.assert_close(added[0], embed.positions[:8])
    stretched = embed(x, mask) - plain(x, mask)
    between = embed.positions[:2].lerp(embed.positions[1:3], 0.25)
    torch.testing.assert_close(stretched[0, 1], between[0], atol=1e-6, rtol=1e-5)
