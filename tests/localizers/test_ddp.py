"""Localizers under DDP in two gloo processes, which must agree whatever windows a rank meets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from re2tal.localizers.protocol import LocalizerConfig
from tests.localizers.small import ACTIONFORMER, ACTIONS, NOTHING, TRIDET, VSGN
from tests.ranks import Ranks

CONFIGS: list[LocalizerConfig] = [
    # Global attention, too: a window without a valid step leaves it nothing to attend to.
    replace(ACTIONFORMER, window=(5, 5, 0)),
    TRIDET,
    VSGN,
]
WHOLE = torch.ones(1, 32, dtype=torch.bool)
UNREADABLE = ~WHOLE
STITCHED = WHOLE.clone()
STITCHED[:, 21:24] = False
# Of each step what rank 0 and rank 1 have. Annotations outlive a window that cannot be decoded.
STEPS = {
    "actions on both ranks": ((WHOLE, ACTIONS[0]), (WHOLE, ACTIONS[0])),
    "no action on rank 1": ((WHOLE, ACTIONS[0]), (WHOLE, NOTHING)),
    "nothing decoded on rank 1": ((STITCHED, ACTIONS[0]), (UNREADABLE, ACTIONS[0])),
}


def state_of(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def gathered(mine: Any) -> list[Any]:
    """Objects of all ranks, on each rank."""
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def train(rank: int, config: LocalizerConfig) -> None:
    torch.manual_seed(rank)  # weights and features differ, of which DDP evens out the weights
    localizer = config.build(6, 4)
    assert isinstance(localizer, nn.Module)
    model = DistributedDataParallel(localizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    terms = None
    for step, windows in STEPS.items():
        what = f"{type(localizer).__name__}, {step}"
        mask, actions = windows[rank]
        before = state_of(localizer)
        features = torch.randn(1, 6, 32).masked_fill(~mask[:, None], torch.nan)
        losses: dict[str, Tensor] = model(features, mask, [actions])
        loss = torch.stack(list(losses.values())).sum()
        assert loss.isfinite(), f"{what}: {losses}"
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for name, parameter in localizer.named_parameters():
            assert parameter.grad is not None, f"{what}: {name} took no part in the loss"
            assert parameter.grad.isfinite().all(), f"{what}: gradient of {name} is not finite"
        optimizer.step()
        after = state_of(localizer)
        first, second = gathered(after)
        assert [name for name in after if first[name] != second[name]] == [], what
        # Every parameter learns in every step, and the mean of positives follows each batch.
        assert [name for name in after if after[name] == before[name]] == [], what
        terms = terms or losses.keys()
        assert gathered(list(losses)) == [list(terms)] * 2, what


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_ranks_agree_whatever_windows_they_have(config: LocalizerConfig, ranks: Ranks) -> None:
    ranks.run(train, config)
