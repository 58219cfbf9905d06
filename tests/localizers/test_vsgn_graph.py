"""VSGN's graph layers and heads, against slow definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.layers import MaskedGroupNorm
from re2tal.localizers.vsgn.graph import GraphBlock, Nodes, maximum, nearest


def runs(*pieces: tuple[int, bool]) -> list[bool]:
    return [value for length, value in pieces for _ in range(length)]


# Whole; padded behind; a clip, a gap and its copy, twice; padded before and between; nothing.
MASKS = torch.tensor(
    [
        runs((32, True)),
        runs((13, True), (19, False)),
        runs((9, True), (3, False), (20, True)),
        runs((6, True), (1, False), (5, True), (20, False)),
        runs((3, False), (4, True), (6, False), (2, True), (1, False), (16, True)),
        runs((32, False)),
    ]
)


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_nodes_know_their_part(stride: int) -> None:
    nodes = Nodes.of(MASKS, stride)
    for sample, mask in enumerate(MASKS.tolist()):
        groups = [value for value, _ in itertools.groupby(mask)]
        assert nodes.stitched[sample].item() == (groups.count(True) > 1)
        for node in range(32 // stride):
            cell = mask[node * stride : (node + 1) * stride]
            seen = [value for value, _ in itertools.groupby(mask[: (node + 1) * stride])]
            assert nodes.valid[sample, node].item() == any(cell)
            assert nodes.parts[sample, node].item() == seen.count(True) - 1
    assert nodes.stitched.tolist() == [False, False, True, True, True, False]


def slow_neighbours(features: Tensor, nodes: Nodes, sample: int, node: int, count: int) -> set[int]:
    """The published rule, one edge at a time."""
    x, part = features[sample].detach().double(), nodes.parts[sample]
    others = [j for j in range(len(x)) if nodes.valid[sample, j]]
    others.sort(key=lambda j: float((x[node] - x[j]).square().sum()))
    if not nodes.stitched[sample]:
        return set(others[:count])
    free = others[: count // 2]
    crossing = [j for j in others if part[j] != part[node] and j not in free]
    return set(free + crossing[: count - count // 2])


@pytest.mark.parametrize("count", [2, 5, 12, 99])
@pytest.mark.parametrize("stride", [1, 4])
def test_neighbours_are_those_of_the_definition(count: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(count)
    nodes = Nodes.of(MASKS, stride)
    features = 5 + torch.randn(len(MASKS), 32 // stride, 4, generator=generator)
    found = nearest(features, nodes, count)
    crossings = {False: 0, True: 0}
    for sample, node in nodes.valid.nonzero().tolist():
        neighbours = set(found[sample, node].tolist())
        assert neighbours == slow_neighbours(features, nodes, sample, node, count)
        assert node in neighbours
        part = nodes.parts[sample]
        if nodes.stitched[sample]:
            for other in neighbours:
                crossings[bool(part[other] > part[node])] += bool(part[other] != part[node])
    assert min(crossings.values()) > 0  # from clip to copy and back


def slow_block(block: GraphBlock, x: Tensor, nodes: Nodes) -> Tensor:
    """Edge by edge with the whole matrix, as equation 1 has it."""
    batch, channels, length = x.shape
    out = torch.zeros(batch, channels, length)
    convolved = F.conv1d(x, block.conv.weight, block.conv.bias, padding=1)
    for i, t in nodes.valid.nonzero().tolist():
        edges = [
            block.edge(torch.cat([x[i, :, j], x[i, :, t]]))
            for j in slow_neighbours(x.transpose(1, 2), nodes, i, t, block.neighbours)
        ]
        out[i, :, t] = F.relu(convolved[i, :, t] + torch.stack(edges).amax(dim=0))
    return torch.maximum(out[..., ::2], out[..., 1::2])


def test_a_block_and_its_gradients_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    block = GraphBlock(4, neighbours=6)
    nodes = Nodes.of(MASKS, 2)
    x = (torch.randn(len(MASKS), 4, 16) * nodes.valid[:, None]).requires_grad_()
    weight = torch.randn(len(MASKS), 4, 8)
    results = []
    for out in (block(x, nodes), slow_block(block, x, nodes)):
        inputs = [x, *block.parameters()]
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    padded = ~Nodes.of(MASKS, 4).valid[:, None]
    assert not block(x, nodes).masked_select(padded).any()


def test_neighbours_are_found_far_from_the_origin_and_under_autocast() -> None:
    torch.manual_seed(0)
    features = 1000 + torch.randn(1, 64, 4)  # squares have steps of 1/8 there, and bfloat16 of 4
    nodes = Nodes.of(torch.ones(1, 64, dtype=torch.bool), 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest(features, nodes, 12)
    assert torch.equal(found, nearest(features, nodes, 12))
    distance = torch.cdist(features.double(), features.double())
    expected = distance.topk(12, largest=False).indices
    assert torch.equal(found.sort(dim=2).values, expected.sort(dim=2).values)


def test_no_edge_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def count(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    values = torch.randn(2, 32, 8, requires_grad=True)
    neighbours = torch.randint(0, 32, (2, 32, 12))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        out = maximum(values, neighbours)
    assert max(kept) <= values.numel()
    expected = torch.stack([values[i][neighbours[i]].amax(dim=1) for i in range(2)])
    assert torch.equal(out, expected)


def test_group_norm_leaves_padding_out() -> None:
    torch.manual_seed(0)
    norm = MaskedGroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    plain = nn.GroupNorm(4, 8)
    plain.load_state_dict(norm.state_dict())
    x = 3 + torch.randn(len(MASKS), 8, 32)
    out = norm(x, MASKS)
    assert not out.masked_select(~MASKS[:, None]).any()
    for sample, mask in enumerate(MASKS[:-1]):
        expected = plain(x[sample : sample + 1, :, mask])[0]
        torch.testing.assert_close(out[sample][:, mask], expected, atol=1e-5, rtol=1e-5)
