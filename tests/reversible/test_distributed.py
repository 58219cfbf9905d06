"""Two gloo processes under DDP, against the mean over ranks of steps without DDP: bit-equal.

Of two ranks the sum does not depend on the order, and halving is exact.
"""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from re2tal.reversible import rewire, set_reversible
from tests.ranks import Ranks
from tests.reversible.toy_blocks import MlpBlock, tiny_swin

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}

PIECE = 2**14  # bytes, of which the branches below have up to eight


class Net(nn.Module):
    """A Swin with a frozen stem, and, where asked for, a stage that only rank 0 uses."""

    def __init__(self, spare: bool) -> None:
        super().__init__()
        self.swin = tiny_swin((2, 2), drop_path=0.3)
        self.swin.patch_embed.requires_grad_(False)
        self.spare = nn.Sequential(MlpBlock(3), MlpBlock(3)) if spare else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.swin(x)
        if self.spare is not None and dist.get_rank() == 0:
            y = self.spare(y)
        return y


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def expected(model: nn.Module, batches: list[Tensor], seed: int) -> dict[str, Tensor]:
    """The mean over ranks of the gradients with stored activations, without DDP."""
    local = copy.deepcopy(model)
    set_reversible(local, False)
    torch.manual_seed(seed)
    for batch in batches:
        local(batch).pow(2).sum().backward()
    result = gradients_of(local)
    for gradient in result.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return result


def compare(found: dict[str, Tensor], truth: dict[str, Tensor], what: str) -> None:
    assert found.keys() == truth.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, truth[name]), f"{what}: {name}"
    assert sum(float(g.abs().sum()) for g in found.values()) > 0


def worker(rank: int, mode: str) -> None:
    torch.manual_seed(0)
    model = Net(spare=mode == "find_unused_parameters")
    rewire(model, slice_bytes=PIECE)
    batches = list(torch.randn(2, 2, 3, 4, 32, 32) + rank)
    seed = 10 + rank
    truth = expected(model, batches[:1], seed)
    parallel = DistributedDataParallel(model, **MODES[mode])
    for step in range(3):  # static_graph changes its ways after the first step
        parallel.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        parallel(batches[0]).pow(2).sum().backward()
        compare(gradients_of(model), truth, f"{mode}, step {step}")
    if mode == "static_graph":
        return  # DDP itself wants the same synchronisation in every step there
    truth = expected(model, batches, seed)
    parallel.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with parallel.no_sync():
        parallel(batches[0]).pow(2).sum().backward()
    parallel(batches[1]).pow(2).sum().backward()
    compare(gradients_of(model), truth, f"{mode}, accumulated")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_ddp_gradients_are_the_mean_over_ranks(mode: str, ranks: Ranks) -> None:
    ranks.run(worker, mode)
