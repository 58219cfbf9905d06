"""The cross-scale graph network: a convolution beside a convolution over neighbours in a graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.vsgn.geometry import Nodes, rows, zero_padding


@torch.no_grad()
def nearest(features: Tensor, nodes: Nodes, count: int) -> Tensor:
    """The neighbours of each node (Zhao et al., ICCV 2021, section 3.3).

    Half of them are the nodes with the most similar features, itself included: free edges. The
    other half are the most similar of the rest; in a stitched sample, of the rest's nodes in
    another part of the window, so that the clip learns from its magnified copy and the copy from
    the clip: cross-scale edges. Padded nodes are nobody's neighbours.

    Args:
        features: `(B, N, C)`.
        nodes: the N nodes.
        count: neighbours of a node, at least 2.

    Returns:
        `(B, N, k)` int64. Where there are fewer than `count` neighbours the nearest one is
        repeated. Rows of padded nodes mean nothing.
    """
    free = min(count // 2, features.shape[1])
    others = min(count - count // 2, features.shape[1])
    with torch.autocast(features.device.type, enabled=False):
        # |x_i - x_j|^2 by a matrix product, without |x_i|^2, which no order depends on. Features
        # behind a ReLU lie far from the origin: around their mean fewer digits cancel.
        x = features.float()
        x = x - x.mean(dim=1, keepdim=True)
        distance = x.square().sum(dim=2)[:, None] - 2 * x @ x.transpose(1, 2)
    distance = distance.masked_fill(~nodes.valid[:, None], torch.inf)
    first = distance.topk(free, largest=False)
    rest = distance.scatter(2, first.indices, torch.inf)
    same_part = nodes.parts[:, :, None] == nodes.parts[:, None]
    rest = rest.masked_fill(nodes.stitched[:, None, None] & same_part, torch.inf)
    second = rest.topk(others, largest=False)
    found = torch.cat([first.indices, second.indices], dim=2)
    missing = torch.cat([first.values, second.values], dim=2).isposinf()
    return torch.where(missing, first.indices[..., :1], found)


def maximum(values: Tensor, neighbours: Tensor) -> Tensor:
    """Of each node and channel the greatest value among the node's neighbours.

    The winners are searched one neighbour at a time and without gradients; only they are then
    gathered. Neither pass holds a tensor with a value for each edge and channel.

    Args:
        values: `(B, N, C)`.
        neighbours: `(B, N, k)` indices of nodes.

    Returns:
        `(B, N, C)`.
    """
    with torch.no_grad():
        candidates = neighbours.unbind(dim=2)
        greatest = rows(values, candidates[0])
        winner = candidates[0][..., None].expand_as(values)
        for candidate in candidates[1:]:
            value = rows(values, candidate)
            winner = torch.where(value > greatest, candidate[..., None], winner)
            greatest = torch.maximum(value, greatest)
    return values.gather(1, winner)


class GraphBlock(nn.Module):
    """An xGN layer: convolution and graph convolution side by side, ReLU, halved by a maximum.

    An edge from node j to node i carries `W [x_j; x_i] + b` (Zhao et al., ICCV 2021, equation 1).
    With `W = [N M]` that is `N x_j + (M x_i + b)`: each node is projected once in place of each
    edge, and only the first summand depends on the neighbour.

    Args:
        channels: of the features.
        neighbours: of each node.
    """

    def __init__(self, channels: int, *, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.edge = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor, nodes: Nodes) -> Tensor:
        """`x` `(B, C, N)`, zero where padded, to `(B, C, N / 2)`, zero where padded."""
        sequence = x.transpose(1, 2)
        from_neighbour, from_centre = self.edge.weight.chunk(2, dim=1)
        neighbours = nearest(sequence, nodes, self.neighbours)
        graph = maximum(F.linear(sequence, from_neighbour), neighbours)
        graph = graph + F.linear(sequence, from_centre, self.edge.bias)
        out = F.relu(self.conv(x) + graph.transpose(1, 2))
        return F.max_pool1d(zero_padding(out, nodes.valid), 2)


class PlainBlock(nn.Module):
    """What stands in for a `GraphBlock` when there is no graph: a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, nodes: Nodes) -> Tensor:
        """`x` `(B, C, N)`, zero where padded, to `(B, C, N / 2)`, zero where padded."""
        halved = nodes.valid.unflatten(1, (-1, 2)).any(dim=2)
        return zero_padding(F.relu(self.conv(x)), halved)
