"""VSGN's cross-scale graph network: temporal convolution and graph convolution in parallel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.layers import zero_padding


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather the rows `index` `(B, M)` of `x` `(B, N, C)`: `(B, M, C)`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """Nodes of one level, N of them; each stands for a cell of `T / N` consecutive features.

    Attributes:
        valid: `(B, N)` bool, true if the cell has any feature that is not padding.
        parts: `(B, N)` int64, index of the run of valid features at the cell's end, from 0 on.
        stitched: `(B,)` bool, true if the sample has several such runs: a clip and, after a gap,
            its magnified copy (Zhao et al., ICCV 2021, section 3.2).
    """

    valid: Tensor
    parts: Tensor
    stitched: Tensor

    @staticmethod
    def of(mask: Tensor, stride: int) -> Nodes:
        """Make the nodes of a level whose cells hold `stride` features.

        Args:
            mask: `(B, T)` bool, T a multiple of `stride`.
            stride: number of features in a cell.
        """
        rising = mask.clone()
        rising[:, 1:] &= ~mask[:, :-1]  # true at the first feature of each run
        runs = rising.cumsum(dim=1)
        return Nodes(
            valid=mask.unflatten(1, (-1, stride)).any(dim=2),
            parts=runs[:, stride - 1 :: stride] - 1,
            stitched=runs[:, -1] > 1,
        )


@torch.no_grad()
def nearest(features: Tensor, nodes: Nodes, count: int) -> Tensor:
    """Find the neighbours of each node (Zhao et al., ICCV 2021, section 3.3).

    Half of them, the free edges, are the nodes with the most similar features, the node itself
    included. The other half are the most similar of the remaining nodes. In a stitched sample these
    are cross-scale edges: they lead only to the other part of the window, from the clip to its
    magnified copy and back. Padded nodes are never neighbours.

    Args:
        features: `(B, N, C)`.
        nodes: the N nodes.
        count: number of neighbours of a node, at least 2.

    Returns:
        `(B, N, k)` int64. If there are fewer than `count` neighbours, the nearest one is repeated.
        Rows of padded nodes are meaningless.
    """
    free = min(count // 2, features.shape[1])
    others = min(count - count // 2, features.shape[1])
    with torch.autocast(features.device.type, enabled=False):
        # |x_i - x_j|^2 by a matrix product, without |x_i|^2, which does not change the order in a
        # row. Features after a ReLU lie far from the origin; subtracting their mean loses fewer
        # digits to cancellation.
        x = features.float()
        x = x - x.mean(dim=1, keepdim=True)
        distance = x.square().sum(dim=2)[:, None] - 2 * x @ x.transpose(1, 2)
    distance = distance.masked_fill(~nodes.valid[:, None], torch.inf)
    first = distance.topk(free, largest=False)  # (B, N, free)
    rest = distance.scatter(2, first.indices, torch.inf)
    same_part = nodes.parts[:, :, None] == nodes.parts[:, None]
    rest = rest.masked_fill(nodes.stitched[:, None, None] & same_part, torch.inf)
    second = rest.topk(others, largest=False)
    found = torch.cat([first.indices, second.indices], dim=2)
    missing = torch.cat([first.values, second.values], dim=2).isposinf()
    return torch.where(missing, first.indices[..., :1], found)


def maximum(values: Tensor, neighbours: Tensor) -> Tensor:
    """Take the greatest value among the neighbours of each node, channel by channel.

    The indices of the maxima are found one neighbour at a time without gradients; then only the
    maxima are gathered. Neither pass holds a `(B, N, k, C)` tensor of edges.

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
    """xGN layer: convolution plus graph convolution, ReLU, then max pooling of stride 2.

    An edge from node j to node i carries `W [x_j; x_i] + b` (Zhao et al., ICCV 2021, equation 1).
    With `W = [N M]` this is `N x_j + (M x_i + b)`. So nodes are projected instead of edges, and the
    maximum is taken over the first summand, which alone depends on the neighbour.

    Args:
        channels: channels of the features.
        neighbours: number of neighbours of a node.
    """

    def __init__(self, channels: int, *, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.edge = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor, nodes: Nodes) -> Tensor:
        """Halve `x` `(B, C, N)`, zero where padded, to `(B, C, N / 2)`, zero where padded."""
        sequence = x.transpose(1, 2)
        from_neighbour, from_centre = self.edge.weight.chunk(2, dim=1)
        neighbours = nearest(sequence, nodes, self.neighbours)
        graph = maximum(F.linear(sequence, from_neighbour), neighbours)
        graph = graph + F.linear(sequence, from_centre, self.edge.bias)
        out = F.relu(self.conv(x) + graph.transpose(1, 2))
        return F.max_pool1d(zero_padding(out, nodes.valid, channels=1), 2)


class PlainBlock(nn.Module):
    """Replacement of `GraphBlock` without a graph: a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, nodes: Nodes) -> Tensor:
        """Halve `x` `(B, C, N)`, zero where padded, to `(B, C, N / 2)`, zero where padded."""
        halved = nodes.valid.unflatten(1, (-1, 2)).any(dim=2)
        return zero_padding(F.relu(self.conv(x)), halved, channels=1)


class GraphPyramid(nn.Module):
    """VSGN's xGPN (Zhao et al., ICCV 2021, section 3.3).

    Level l has a node for each `2 * stem_stride * 2^l` features.

    Args:
        in_channels: channels C of the features.
        width: channels of all levels.
        stem_stride: stride of the first convolution.
        levels: number of levels.
        neighbours: number of neighbours of a node in the graph, 0 for no graph.
    """

    def __init__(
        self, in_channels: int, width: int, *, stem_stride: int, levels: int, neighbours: int
    ) -> None:
        super().__init__()

        def conv() -> nn.Conv1d:
            return nn.Conv1d(width, width, 3, padding=1)

        def block() -> nn.Module:
            return GraphBlock(width, neighbours=neighbours) if neighbours else PlainBlock(width)

        self.strides = tuple(2 * stem_stride * 2**level for level in range(levels))
        self.stem = nn.Conv1d(in_channels, width, 3, stride=stem_stride, padding=1)
        self.encoder = nn.ModuleList(block() for _ in range(levels))
        # The decoder's layers are ordered from the coarsest level to the finest.
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(width, width, 3, stride=2, padding=1, output_padding=1)
            for _ in range(levels - 1)
        )
        self.laterals = nn.ModuleList(conv() for _ in range(levels - 1))
        self.outs = nn.ModuleList(conv() for _ in range(levels))

    def forward(self, features: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Encode and decode features.

        Args:
            features: `(B, C, T)`.
            mask: `(B, T)` bool.

        Returns:
            Features of each level, the finest first, `(B, width, N)`, zero where padded, and masks
            `(B, N)` of the nodes that are not padding.

        Raises:
            ValueError: if T is not a multiple of the coarsest level's stride.
        """
        if features.shape[2] % self.strides[-1]:
            raise ValueError(
                f"The localizer got {features.shape[2]} features, but its pyramid of "
                f"{len(self.strides)} levels needs a multiple of {self.strides[-1]}: change the "
                "window's length, the number of levels or the stem's stride."
            )
        nodes = [Nodes.of(mask, stride) for stride in (self.strides[0] // 2, *self.strides)]
        x = features.masked_fill(~mask[:, None], 0)  # not by a product: padding may be NaN
        x = zero_padding(F.relu(self.stem(x)), nodes[0].valid, channels=1)
        encoded = []
        for block, before in zip(self.encoder, nodes, strict=False):
            x = block(x, before)
            encoded.append(x)
        valid = [level.valid for level in nodes[1:]]
        return self._decode(encoded, valid), valid

    def _decode(self, encoded: list[Tensor], valid: list[Tensor]) -> list[Tensor]:
        """Decode the levels; return the finest first."""
        x = zero_padding(F.relu(self.outs[0](encoded[-1])), valid[-1], channels=1)
        decoded = [x]
        for up, lateral, out, level, inside in zip(
            self.ups, self.laterals, self.outs[1:], encoded[-2::-1], valid[-2::-1], strict=True
        ):
            joined = F.relu(lateral(level)) + F.relu(up(x))
            joined = zero_padding(joined, inside, channels=1)
            x = zero_padding(F.relu(out(joined)), inside, channels=1)
            decoded.append(x)
        return decoded[::-1]
