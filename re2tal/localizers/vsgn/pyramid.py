"""The cross-scale graph pyramid: down through graph layers, up again with lateral connections."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.vsgn.geometry import Nodes, zero_padding
from re2tal.localizers.vsgn.graph import GraphBlock, PlainBlock


class GraphPyramid(nn.Module):
    """VSGN's xGPN (Zhao et al., ICCV 2021, section 3.3).

    Level l has a node for each `2 * stem_stride * 2^l` features.

    Args:
        in_channels: of the features.
        width: channels of all levels.
        stem_stride: of the first convolution.
        levels: of the pyramid.
        neighbours: of a node in the graph, 0 for no graph.
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
        # Of the decoder the first is that of the coarsest level.
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(width, width, 3, stride=2, padding=1, output_padding=1)
            for _ in range(levels - 1)
        )
        self.laterals = nn.ModuleList(conv() for _ in range(levels - 1))
        self.outs = nn.ModuleList(conv() for _ in range(levels))

    def forward(self, features: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Encodes and decodes.

        Args:
            features: `(B, C, T)`.
            mask: `(B, T)` bool.

        Returns:
            Of each level, the finest first, features `(B, width, N)`, zero where padded, and
            which nodes are no padding `(B, N)`.

        Raises:
            ValueError: If T is not a multiple of the coarsest level's stride.
        """
        if features.shape[2] % self.strides[-1]:
            raise ValueError(
                f"The localizer got {features.shape[2]} features, but its pyramid of "
                f"{len(self.strides)} levels needs a multiple of {self.strides[-1]}: change the "
                "window's length, the number of levels or the stem's stride."
            )
        nodes = [Nodes.of(mask, stride) for stride in (self.strides[0] // 2, *self.strides)]
        x = features.masked_fill(~mask[:, None], 0)  # padding may hold anything, NaN too
        x = zero_padding(F.relu(self.stem(x)), nodes[0].valid)
        encoded = []
        for block, before in zip(self.encoder, nodes, strict=False):
            x = block(x, before)
            encoded.append(x)
        valid = [level.valid for level in nodes[1:]]
        return self._decode(encoded, valid), valid

    def _decode(self, encoded: list[Tensor], valid: list[Tensor]) -> list[Tensor]:
        """The decoder's levels, the finest first."""
        x = zero_padding(F.relu(self.outs[0](encoded[-1])), valid[-1])
        decoded = [x]
        for up, lateral, out, level, inside in zip(
            self.ups, self.laterals, self.outs[1:], encoded[-2::-1], valid[-2::-1], strict=True
        ):
            joined = F.relu(lateral(level)) + F.relu(up(x))
            x = zero_padding(F.relu(out(zero_padding(joined, inside))), inside)
            decoded.append(x)
        return decoded[::-1]
