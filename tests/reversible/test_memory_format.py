"""Tensors reach a branch in the memory format that they would have without rewiring."""

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import BySample, rewire, set_reversible
from re2tal.reversible.branches import spans
from tests.reversible.toy_blocks import PairBlock


class Sees(nn.Module):
    """Scales each channel of (B, C, T, H, W), and notes the strides of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1, 1))
        self.strides: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.strides.append(x.stride())
        return x * self.scale


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("reversible", [True, False])
def test_of_a_stage(batch: int, exact: bool, reversible: bool) -> None:
    """The stride of a batch of one counts too: convolutions choose their format by it."""
    seeing = [Sees() for _ in range(4)]
    model = nn.Sequential(PairBlock(*seeing[:2]), PairBlock(*seeing[2:]))
    rewire(model, exact=exact)
    set_reversible(model, reversible)
    x = torch.randn(batch, 4, 2, 3, 5).to(memory_format=torch.channels_last_3d)
    y = model(x)
    y.sum().backward()
    assert [s.strides for s in seeing] == [[x.stride()] * (1 + reversible)] * 4
    assert y.stride() == x.stride()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last_3d])
def test_of_samples_in_pieces(batch: int, format_: torch.memory_format) -> None:
    x = torch.randn(batch, 4, 2, 3, 5).to(memory_format=format_)
    layout = BySample(1.0)(x)
    pieces = {span: layout.take(x, *span) for span in spans(layout, budget=1)}
    assert len(pieces) == batch
    joined = layout.new(pieces[0, 1], x.shape)
    for span, piece in pieces.items():
        assert piece.stride() == x.stride()
        layout.put(joined, *span, piece)
    assert torch.equal(joined, x)
    assert joined.stride() == x.stride()
