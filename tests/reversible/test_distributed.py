"""Two gloo processes under DDP and `fully_shard`, compared with a model that stores activations.

A sum over two ranks does not depend on their order, and halving is exact, so all is bit-equal.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from re2tal.reversible import (
    ReversibleError,
    ReversibleSequential,
    reconstruction_errors,
    reversible_stages,
    rewire,
    set_reversible,
    stage_modes,
    unwire,
)
from tests.ranks import Ranks
from tests.reversible.toy_blocks import MlpBlock, tiny_swin

CPU = torch.device("cpu")
PIECE = 2**14  # bytes; the branches below need up to eight pieces


def swin() -> nn.Module:
    """Two stages and a frozen stem."""
    torch.manual_seed(0)
    model = tiny_swin((2, 2), drop_path=0.3)
    model.patch_embed.requires_grad_(False)
    rewire(model, slice_bytes=PIECE)
    return model


def sharded_and_stored(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A Swin whose stages are sharded, and an unsharded copy that stores its activations."""
    model = swin()
    stored = stored_copy(model)
    shard_stages(model, **options)
    return model, stored


class Listed(nn.Module):
    """A stage in an `nn.ModuleList`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MlpBlock(dropout=0.3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def frames() -> Tensor:
    """A batch, different on each rank."""
    return torch.randn(2, 3, 4, 32, 32) + dist.get_rank()


def shard_stages(model: nn.Module, **options: Any) -> None:
    for _, stage in list(reversible_stages(model)):
        fully_shard(stage, **options)
    fully_shard(model, **options)


def stored_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    set_reversible(copied, False)
    return copied


def average(model: nn.Module) -> None:
    """Mean over ranks of all gradients, at least in float32."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(sharded: nn.Module, stored: nn.Module, *, tolerance: float = 0.0) -> None:
    names = [name for name, _ in stored.named_parameters()]
    assert [name for name, _ in sharded.named_parameters()] == names
    trained = 0
    pairs = zip(sharded.parameters(), stored.parameters(), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        assert isinstance(a, DTensor) or not isinstance(sharded, FSDPModule), name
        assert torch.equal(whole(a.detach()), b.detach()), name
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            off = (whole(a.grad) - b.grad).abs().max()
            assert off <= tolerance * b.grad.abs().max(), name
            trained += bool(b.grad.any())
    assert trained > len(names) // 2


def train(
    sharded: nn.Module, stored: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int = 2
) -> None:
    """Steps of both models. They stay equal only if every forward sees the updated parameters."""
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (sharded, stored)]
    for step in range(steps):
        losses = []
        for model in (sharded, stored):
            torch.manual_seed(100 + 2 * step + dist.get_rank())
            losses.append(loss(model))
            losses[-1].backward()
        assert torch.equal(*losses)
        average(stored)
        compare(sharded, stored)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def squares(model: nn.Module, x: Tensor | None = None) -> Tensor:
    result: Tensor = model(frames() if x is None else x).float().pow(2).sum()
    return result


def stages_and_root(**options: Any) -> None:
    model, stored = sharded_and_stored(**options)
    assert list(model.state_dict()) == list(stored.state_dict())
    stages = list(reversible_stages(model))
    assert [name for name, _ in stages] == ["features.0", "features.2"]
    for _, stage in stages:
        assert isinstance(stage, ReversibleSequential)
        assert isinstance(stage, FSDPModule)
    train(model, stored, squares)
    assert set(stage_modes(model).values()) == {"reversible"}
    assert list(reconstruction_errors(model).values()) == [0, 0]


def a_recomputed_layer_between_the_stages() -> None:
    model = swin()
    stored = stored_copy(model)
    fully_shard(model.get_submodule("features.1"))
    shard_stages(model)
    train(model, stored, squares)


def the_mode_can_still_be_changed() -> None:
    model, stored = sharded_and_stored()
    set_reversible(model, False)
    train(model, stored, squares, steps=1)
    assert all(mode.startswith("stored") for mode in stage_modes(model).values())
    set_reversible(model, True)
    train(model, stored, squares, steps=1)
    assert set(stage_modes(model).values()) == {"reversible"}


def two_forwards_before_one_backward() -> None:
    model, stored = sharded_and_stored()
    for each in (model, stored):
        torch.manual_seed(dist.get_rank())
        (each(frames()) * each(frames())).sum().backward()
    average(stored)
    # FSDP takes the mean over ranks of each forward's gradients before it sums them.
    compare(model, stored, tolerance=1e-6)


def accumulation() -> None:
    model, stored = sharded_and_stored()
    assert isinstance(model, FSDPModule)
    for synchronised in (False, True):
        model.set_requires_gradient_sync(synchronised)
        for each in (model, stored):
            torch.manual_seed(7 + synchronised + 2 * dist.get_rank())
            squares(each).backward()
    average(stored)
    compare(model, stored)


def bfloat16_parameters() -> None:
    model = swin()
    stored = stored_copy(model).bfloat16()
    shard_stages(
        model,
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    torch.manual_seed(dist.get_rank())
    loss = squares(model)
    loss.backward()
    torch.manual_seed(dist.get_rank())
    truth = stored(frames().bfloat16()).float().pow(2).sum()
    truth.backward()
    assert torch.equal(loss, truth)
    for a, b in zip(model.parameters(), stored.parameters(), strict=True):
        if b.grad is not None:
            mean = b.grad.float()
            dist.all_reduce(mean)
            assert a.grad is not None
            assert torch.equal(whole(a.grad), mean / dist.get_world_size())


def a_list_is_sharded_by_its_owner() -> None:
    torch.manual_seed(0)
    model = Listed()
    rewire(model)
    stored = stored_copy(model)
    fully_shard(model)
    train(model, stored, lambda m: m(torch.randn(4, 6)).pow(2).sum())


def blocks_of_a_list() -> None:
    model = Listed()
    rewire(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    with pytest.raises(
        ReversibleError, match=r"blocks\.0 was rewired.*on the owner of its ModuleL"
    ):
        model(torch.randn(4, 6))


def refused(
    sharded: Callable[[nn.Module], Iterable[nn.Module]], message: str, *, in_stored: bool
) -> None:
    """Sharding a module inside a stage raises an error in the first forward."""
    for reversible in (True, False):
        model = swin()
        set_reversible(model, reversible)
        stored = stored_copy(model)
        for module in sharded(model):
            fully_shard(module)
        fully_shard(model)
        if reversible or in_stored:
            with pytest.raises(ReversibleError, match=message):
                model(frames())
        else:
            train(model, stored, squares, steps=1)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for _, stage in reversible_stages(model) for block in stage.children()]


def mlps_of(model: nn.Module) -> list[nn.Module]:
    return [block.get_submodule("mlp") for block in blocks_of(model)]


def inside_a_recomputed_layer(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule("features.1.reduction")]


def the_older_wrapper() -> None:
    """`FullyShardedDataParallel` hides parameters, or replaces them by views."""
    for keeps, message in ((False, "has flattened the parameters"), (True, "it would get none")):
        inner = Listed()
        rewire(inner)
        model = FullyShardedDataParallel(inner, use_orig_params=keeps, device_id=CPU)
        with pytest.raises(ReversibleError, match=message):
            model(torch.randn(4, 6)).sum().backward()


def a_step_between_forward_and_backward() -> None:
    model, _ = sharded_and_stored()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    squares(model).backward()
    loss = squares(model)
    optimizer.step()
    with pytest.raises(ReversibleError, match="rebuilt input is not the one of the forward"):
        loss.backward()


def a_sharded_model_stays_rewired() -> None:
    model, _ = sharded_and_stored()
    with pytest.raises(ReversibleError, match=r"features\.0 has become a FSDPReversibleSequential"):
        unwire(model)
    with pytest.raises(ValueError, match="FSDPReversibleSequential is not rewired"):
        rewire(model)
    assert len(list(reversible_stages(model))) == 2


# DDP

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}


class Net(nn.Module):
    """A Swin and, optionally, a stage that only rank 0 uses."""

    def __init__(self, spare: bool) -> None:
        super().__init__()
        self.swin = swin()
        self.spare = nn.Sequential(MlpBlock(3), MlpBlock(3)) if spare else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.swin(x)
        if self.spare is not None and dist.get_rank() == 0:
            y = self.spare(y)
        return y


def in_parallel(mode: str) -> None:
    model = Net(spare=mode == "find_unused_parameters")
    rewire(model, slice_bytes=PIECE)
    stored = stored_copy(model)
    parallel = DistributedDataParallel(model, **MODES[mode])
    # A static graph behaves differently after its first step, and must be the same in every step.
    for batches in (1, 1, 1) if mode == "static_graph" else (1, 1, 1, 2):
        inputs = [frames() for _ in range(batches)]
        for network in (parallel, stored):
            network.zero_grad(set_to_none=True)
            torch.manual_seed(10 + dist.get_rank())
            for index, x in enumerate(inputs):
                last = network is stored or index == len(inputs) - 1
                with nullcontext() if last else parallel.no_sync():
                    squares(network, x).backward()
        if mode == "find_unused_parameters":  # the rank that does not use it contributes zeros
            for parameter in stored.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        average(stored)
        compare(model, stored)


SCENARIOS: dict[str, Callable[[], None]] = {
    "stages and root": stages_and_root,
    "never resharded": partial(stages_and_root, reshard_after_forward=False),
    "always resharded": partial(stages_and_root, reshard_after_forward=True),
    "recomputed": a_recomputed_layer_between_the_stages,
    "mode": the_mode_can_still_be_changed,
    "two forwards": two_forwards_before_one_backward,
    "accumulation": accumulation,
    "bfloat16": bfloat16_parameters,
    "list": a_list_is_sharded_by_its_owner,
    "blocks": partial(refused, blocks_of, "hooks of its own.*fully_shard", in_stored=True),
    "blocks of a list": blocks_of_a_list,
    "inside a block": partial(refused, mlps_of, r"\(mlp\): a FSDPMLP inside", in_stored=False),
    "inside recomputed": partial(
        refused, inside_a_recomputed_layer, r"features\.1: a FSDPLinear inside", in_stored=False
    ),
    "older wrapper": the_older_wrapper,
    "step between": a_step_between_forward_and_backward,
    "unwire": a_sharded_model_stays_rewired,
    **{f"DDP, {mode}": partial(in_parallel, mode) for mode in MODES},
}


def worker(rank: int, scenario: str) -> None:
    SCENARIOS[scenario]()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_step_on_two_ranks_is_that_of_the_plain_model(scenario: str, ranks: Ranks) -> None:
    ranks.run(worker, scenario)
