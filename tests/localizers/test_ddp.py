"""Localizers under DDP in two gloo processes, which must agree whatever windows a rank meets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from re2tal.localizers import ActionFormerConfig, Targets
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.localizers.vsgn import VSGNConfig
from tests.ranks import Ranks

CONFIGS: list[LocalizerConfig] = [
    # Global attention, too: a window without a valid step leaves it nothing to attend to.
    ActionFormerConfig(width=16, head_width=16, heads=2, levels=3, window=(5, 5, 0), stem_layers=1),
    VSGNConfig(width=16, levels=3, stem_stride=1, head_layers=1, neighbours=4),
]
ACTIONS = Targets(segments=torch.tensor([[2.0, 6.5], [8.0, 20.0]]), labels=torch.tensor([1, 3]))
NOTHING = Targets(segments=torch.zeros(0, 2), labels=torch.zeros(0, dtype=torch.int64))
WHOLE = torch.ones(1, 32, dtype=torch.bool)
UNREADABLE = ~WHOLE
STITCHED = WHOLE.clone()
STITCHED[:, 21:24] = False
# Of each step what rank 0 and rank 1 have. Annotations outlive a window that cannot be decoded.
STEPS = {
    "actions on both ranks": ((WHOLE, ACTIONS), (WHOLE, ACTIONS)),
    "no action on rank 1": ((WHOLE, ACTIONS), (WHOLE, NOTHING)),
    "nothing decoded on rank 1": ((STITCHED, ACTIONS), (UNREADABLE, ACTIONS)),
}


def state_of(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def gathered(mine: Any) -> list[Any]:
    """What each rank has, on all ranks."""
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
