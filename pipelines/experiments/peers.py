"""Public libraries for reversible networks, each building a network of the same branches.

A network is a row of branches F1, G1, F2, G2, ... on two streams that lie beside each other in the
channels:

    y1 = x1 + F(x2),    y2 = x2 + G(y1)

The libraries are an extra of this project (`peers`); each is imported where it is used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Branches = Sequence[nn.Module]


def stored(streams: Tensor, branches: Branches) -> Tensor:
    """Compute the equations themselves; autograd stores all activations.

    Args:
        streams: x1 and x2, ``(B, 2 C)``.
        branches: an even number of branches.

    Returns:
        y1 and y2 of the last pair, ``(B, 2 C)``.
    """
    first, second = streams.chunk(2, dim=1)
    for branch in branches:
        first, second = second, first + branch(second)
    return torch.cat([first, second], dim=1)


class Recomputing(nn.Module):
    """One autograd function for all branches, run backwards from its output, as in minREV.

    See "Reversible Vision Transformers" (Mangalam et al., CVPR 2022); here parameters are among the
    function's inputs.

    Args:
        branches: an even number of branches.
    """

    def __init__(self, branches: Branches) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, streams: Tensor) -> Tensor:
        """Map the streams ``(B, 2 C)`` through all branches."""
        result: Tensor = _Recompute.apply(streams, self.branches, *self.parameters())
        return result


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, branches: Branches, *_parameters: Tensor) -> Tensor:
        ctx.branches = branches
        output = stored(streams, branches)  # autograd stores nothing in a Function's forward
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors[0].chunk(2, dim=1)
        of_first, of_second = gradients[0].chunk(2, dim=1)
        of_parameters: list[Tensor] = []
        for branch in reversed(ctx.branches):
            with torch.enable_grad():
                given = first.detach().requires_grad_()
                result = branch(given)
            of_given, *found = torch.autograd.grad(result, [given, *branch.parameters()], of_second)
            of_parameters[:0] = found
            first, second = second - result.detach(), first
            of_first, of_second = of_second, of_first + of_given
        return torch.cat([of_first, of_second], dim=1), None, *of_parameters


def _memcnn(branches: Branches) -> nn.Module:
    library = import_module("memcnn")
    pairs = zip(branches[::2], branches[1::2], strict=True)
    couplings = (library.AdditiveCoupling(f, g) for f, g in pairs)
    return nn.Sequential(*map(library.InvertibleModuleWrapper, couplings))


def _revtorch(branches: Branches) -> nn.Module:
    library = import_module("revtorch.revtorch")
    pairs = zip(branches[::2], branches[1::2], strict=True)
    blocks = nn.ModuleList(library.ReversibleBlock(f, g) for f, g in pairs)
    network: nn.Module = library.ReversibleSequence(blocks)
    return network


def _revlib(branches: Branches) -> nn.Module:
    network: nn.Module = import_module("revlib").ReversibleSequential(*branches)
    return network


@dataclass(frozen=True, slots=True)
class Peer:
    """Another implementation.

    Attributes:
        package: package that has to be installed; empty for none.
        build: function that makes a network of branches, from streams ``(B, 2 C)`` to streams.
    """

    package: str
    build: Callable[[Branches], nn.Module]


PEERS: dict[str, Peer] = {
    "memcnn": Peer("memcnn", _memcnn),
    "RevTorch": Peer("revtorch", _revtorch),
    "revlib": Peer("revlib", _revlib),
    "minREV's form": Peer("", Recomputing),
}
"""By the names under which they are known."""
