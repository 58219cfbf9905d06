from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from re2tal.localizers import transformer
from re2tal.localizers.transformer import local_attention


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
def test_equals_softmax_over_the_band(
    window: int, length: int, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_blocks:
        monkeypatch.setattr(transformer, "DENSE_LENGTH", 0)
    query, key, value = torch.randn(3, 2, 2, length, 4, dtype=torch.float64)
    mask = torch.rand(2, length) < 0.7
    mask[1] = False  # a sample that is all padding has finite results too
    out = local_attention(query, key, value, mask, window)
    torch.testing.assert_close(out, slow_attention(query, key, value, mask, window))


def test_long_sequences_go_in_blocks_with_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = torch.randn(3, 1, 2, 150, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(150)[None] < 140
    weights = torch.randn(1, 2, 150, 4, dtype=torch.float64)

    def gradient() -> Tensor:
        out = local_attention(inputs[0], inputs[1], inputs[2], mask, 7)
        return torch.autograd.grad((out * weights).sum(), inputs)[0]

    in_blocks = gradient()
    monkeypatch.setattr(transformer, "DENSE_LENGTH", 1000)
    torch.testing.assert_close(in_blocks, gradient())


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_gradients_are_those_of_the_definition_and_finite_at_gaps_and_padding(
    window: int, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_blocks:
        monkeypatch.setattr(transformer, "DENSE_LENGTH", 0)
    inputs = torch.randn(3, 3, 1, 44, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 44, dtype=torch.bool)
    mask[0, 15:29] = False  # a stitched window; the gap is wider than the attention
    mask[1] = False
    mask[2, 40:] = False
    weights = torch.randn(3, 1, 44, 4, dtype=torch.float64)
    query, key, value = inputs
    gradients = [
        torch.autograd.grad((attend(query, key, value, mask, window) * weights).sum(), inputs)[0]
        for attend in (local_attention, slow_attention)
    ]
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(gradients[0], gradients[1])
