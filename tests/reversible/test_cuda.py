"""Tests on a GPU, where there is one: equal bits, predicted memory, no synchronisation."""

import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.experiments.models import build
from pipelines.training.workload import Workload
from re2tal.memory import predict_peak
from re2tal.memory.ways import WAYS, prepared
from re2tal.reversible import ReversibleError, check, rewire
from re2tal.reversible.coupling import Budget, Grid, accumulate
from re2tal.reversible.layouts import Places
from tests.reversible.test_exact import assert_bit_equal
from tests.reversible.toy_blocks import MlpBlock
from tests.reversible.zoo import ZOO, Precision, both_precisions, built

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

POOLED = ("mvit_v1", "mvit_v2")
"""Their maximum pooling sums its gradient in any order, before rewiring as well."""


@pytest.fixture
def _in_one_order() -> Iterator[None]:
    """Allow only kernels that sum in a fixed order; the others raise an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [n for n in ZOO if n not in POOLED and "slowfast" not in n])
@both_precisions
@pytest.mark.parametrize("budget", ["auto", 1])
@pytest.mark.usefixtures("_in_one_order")
def test_a_step_of_a_rewired_model(
    name: str, bf16: bool, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = built(name, bf16=bf16, device="cuda")
    report = rewire(model, slice_bytes=budget)
    assert_bit_equal(model, inputs, len(report.stages), monkeypatch)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("bits", ["auto", 14, None])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("padded", [None, False, True])
def test_pieces_are_added_alike_in_every_run_and_on_the_cpu(
    kernel: bool, bits: Any, sign: int, padded: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `use_deterministic_algorithms`; `padded` is None for values without an index."""
    torch.manual_seed(0)
    x = torch.randn(3000, 96) * 10 ** (8 * torch.rand(3000, 96) - 6)
    grid = None if bits is None else Grid.of(bits, torch.randn(5))
    out = torch.randn(x.shape)
    if grid is not None:
        out = grid.round(out)
    elif kernel or padded is None:  # atomic additions flush these to zero
        x[:50] *= 1e-39
        out[:] *= 1e-39
    index = torch.randperm(len(x))
    padding = (torch.rand(len(x), 1) < 0.3) if padded else None
    if not kernel:
        for module in ("coupling", "layouts"):
            monkeypatch.setattr(
                import_module(f"re2tal.reversible.{module}"), "fused", lambda *_: None
            )

    def added(device: str) -> Tensor:
        result, values, on = out.to(device, copy=True), x.to(device), grid
        if on is not None:
            on = Grid(*(torch.as_tensor(n, device=device) for n in (on.scale, on.spacing)))
        if padded is None:
            accumulate(result, values, on, sign)
        else:
            where = None if padding is None else padding.to(device)
            Places(index.to(device), where).add(result, values, on, sign)
        return result.cpu()

    first = added("cuda")
    assert torch.equal(first, added("cuda"))
    assert torch.equal(first, added("cpu"))


@pytest.mark.parametrize("name", POOLED)
@both_precisions
def test_streams_are_rebuilt_whatever_gradients_do(name: str, bf16: bool) -> None:
    model, inputs = built(name, bf16=bf16, device="cuda")
    rewire(model)
    for _ in range(5):
        model(*inputs).float().pow(2).sum().backward()
    check(model)  # raises if any bit differs


def test_a_branch_that_is_not_repeated_alike_is_found_without_waiting_for_it() -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    block = MlpBlock()
    block.add_module("drop", Drifting())
    model = nn.Sequential(MlpBlock(), block, MlpBlock()).cuda()
    rewire(model)
    model(torch.randn(4, 6, device="cuda", requires_grad=True)).sum().backward()
    with pytest.raises(ReversibleError, match="the rebuilt input is not the one of the forward"):
        check(model)


@pytest.mark.parametrize("batch", [1, 3])
@both_precisions
def test_convolutions_get_the_memory_format_that_they_had(batch: int, bf16: bool) -> None:
    """Otherwise cuDNN would transpose every input, and its result back."""
    model, (x,) = built("r3d", bf16=bf16, device="cuda")
    model.eval()  # small, so that a batch is cut
    x = x.detach()[:1].repeat(batch, 1, 1, 1, 1).to(memory_format=torch.channels_last_3d)

    def last() -> list[bool]:
        seen: list[bool] = []
        hooks = [
            m.register_forward_pre_hook(
                lambda _, args: seen.append(
                    args[0].stride(1) == 1 and args[0].stride(0) >= args[0].stride(2)
                )
            )
            for m in model.modules()
            if isinstance(m, nn.Conv3d)
        ]
        model(x)
        for hook in hooks:
            hook.remove()
        return seen

    assert all(last())
    rewire(model, slice_bytes=1)
    assert all(last())


@pytest.mark.parametrize("way", ["plain", "ours", "ours, float"])
def test_the_peak_is_what_was_predicted(way: str) -> None:
    """Up to workspaces of cuBLAS; materialised attention takes more than its kernels report."""
    work = Workload(frames=128, size=224, precision="bfloat16")
    model, inputs = build("swin3d_t").cuda(), work.noise("cuda")
    with prepared(model, WAYS[way].prepare):
        predicted = predict_peak(model, *inputs, step=work.forward).peak
        work.step(model, *inputs)
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work.step(model, *inputs)
    measured = torch.cuda.max_memory_allocated()
    assert 0.9 * predicted < measured < 1.1 * predicted + 128 * 2**20


def test_a_gradient_scaler_sees_the_overflow_of_a_reversible_step() -> None:
    torch.manual_seed(0)
    model, inputs = built("swin3d", bf16=False, device="cuda")
    assert isinstance(model, Precision)
    rewire(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cuda", torch.float16):
        loss = model.inner(*inputs).float().pow(2).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
