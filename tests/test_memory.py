"""The meters, against sizes that are known."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from re2tal.memory import LiveBytes, MemoryMeter, StepMemory, measure_activations, predict_peak
from re2tal.memory import live as meter_module
from re2tal.reversible import rewire, set_reversible
from tests.reversible.toy_blocks import MlpBlock, tiny_swin

CLIP = (1, 3, 4, 32, 32)


def under_bf16(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y: Tensor = model(x)
    return y


@dataclass(frozen=True)
class Truth:
    values: Tensor


class LossModule(nn.Module):
    """What a detector looks like to the meters: records among its inputs, a dict of losses."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(MlpBlock(16) for _ in range(3)))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor, truths: list[Truth]) -> dict[str, Tensor]:
        error = self.head(self.backbone(x)) - torch.stack([t.values for t in truths])
        return {"square": error.pow(2).mean(), "absolute": error.abs().mean()}


def assert_same(predicted: StepMemory, measured: StepMemory) -> None:
    for name in ("parameters", "buffers", "inputs", "gradients"):
        assert getattr(predicted, name) == getattr(measured, name), name
    assert predicted.activations == pytest.approx(measured.activations, rel=0.02)
    # A measured step also holds generator states, 5 kB a branch, which weigh at this size only.
    assert predicted.peak == pytest.approx(measured.peak, rel=0.1)


def test_every_byte_of_a_chain_is_known() -> None:
    """y = tanh(tanh(x w)): kept are both tanh and the gradient on its way."""
    model = nn.Sequential(nn.Linear(50, 100, bias=False), nn.Tanh(), nn.Tanh())
    x = torch.randn(200, 50)
    found = measure_activations(model, x)
    layer, weight = 200 * 100 * 4, 50 * 100 * 4
    assert found.parameters == found.gradients == weight
    assert found.inputs == 200 * 50 * 4
    # x w is freed once tanh has replaced it; in the backward of the last tanh its result, the one
    # before, the incoming gradient (expanded from a scalar) and the new gradient live.
    assert found.activations == pytest.approx(3 * layer, rel=0.01)
    assert predict_peak(model, x) == found


def test_views_and_shared_storages_count_once() -> None:
    model = nn.Linear(4, 4)
    with LiveBytes(model) as live:
        a = torch.zeros(1000)
        views = [a.view(10, 100), a[:5], a.detach()]
        b = torch.zeros(500)
        del b
        assert live.memory().activations == 6000
        del a
        c = torch.zeros(250)
        assert live.memory().activations == 6000  # the views keep the storage
        del views, c
        d = torch.zeros(1400)
    assert live.memory().activations == 6000
    del d


@pytest.mark.parametrize("step", [None, under_bf16])
@pytest.mark.parametrize("rewired", [False, True])
def test_prediction_equals_measurement(rewired: bool, step: Callable[..., Tensor] | None) -> None:
    torch.manual_seed(0)
    model = tiny_swin((1, 1), drop_path=0.2)
    if rewired:
        rewire(model)
    x = torch.randn(CLIP)
    assert_same(predict_peak(model, x, step=step), measure_activations(model, x, step=step))


def test_a_module_with_losses_and_records() -> None:
    torch.manual_seed(0)
    model = LossModule()
    rewire(model)
    inputs = torch.randn(8, 16), [Truth(torch.randn(1)) for _ in range(8)]
    assert_same(predict_peak(model, *inputs), measure_activations(model, *inputs))


def stage_memory(depth: int, *, rewired: bool) -> StepMemory:
    model = nn.Sequential(*(MlpBlock(64) for _ in range(depth)))
    if rewired:
        rewire(model)
    return predict_peak(model, torch.empty(512, 64))


def test_depth_costs_a_reversible_stage_nothing_but_parameters() -> None:
    plain = [stage_memory(depth, rewired=False).activations for depth in (6, 12)]
    rewired = [stage_memory(depth, rewired=True).activations for depth in (6, 12)]
    assert plain[1] > 1.8 * plain[0]
    assert rewired[1] <= 1.01 * rewired[0]
    assert rewired[0] < plain[0] / 3


def test_a_deep_rewired_swin_needs_less_than_the_plain_one() -> None:
    torch.manual_seed(0)
    model, x = tiny_swin((5,)), torch.randn(CLIP)
    plain = predict_peak(model, x).activations
    rewire(model)
    assert predict_peak(model, x).activations < plain / 2
    assert measure_activations(model, x).activations < plain / 2
    set_reversible(model, False)
    assert measure_activations(model, x).activations > 0.9 * plain


def test_prediction_leaves_the_model_alone_and_needs_no_memory() -> None:
    model = nn.Linear(8, 8)
    model.weight.grad = torch.ones(8, 8)
    state = torch.get_rng_state()
    predicted = predict_peak(model, torch.empty(1, 8).expand(10**9, 8))
    assert predicted.activations >= 10**9 * 8 * 4
    assert torch.equal(model.weight.grad, torch.ones(8, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_measurement_leaves_gradients_and_generators_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    model[0].weight.grad = torch.ones(8, 8)
    x, state = torch.randn(4, 8), torch.get_rng_state()
    measure_activations(model, x)
    assert torch.equal(model[0].weight.grad, torch.ones(8, 8))
    assert model[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_without_gradients_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing that needs a gradient"):
        predict_peak(model, torch.ones(1, 2))


def test_shapes_that_depend_on_values_are_refused() -> None:
    class Picks(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            y = super().forward(input)
            return y[y > 0]

    with pytest.raises(ValueError, match="cannot be predicted"):
        predict_peak(Picks(2, 2), torch.ones(1, 2))


def allocate(megabytes: int) -> np.ndarray:
    return np.ones(megabytes * 10**6, dtype=np.uint8)


@pytest.mark.parametrize("kernel", [True, False])
def test_the_host_peak_is_seen_after_it_was_freed(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(meter_module, "_reset_high_water_mark", lambda: False)
    before = psutil.Process().memory_info().rss
    with MemoryMeter() as outer:
        with MemoryMeter("cpu") as inner:
            held = allocate(150)
            for _ in range(20):  # long enough for the sampling thread to look
                held += 1
            del held
        with MemoryMeter() as quiet:
            allocate(1)
    for meter in (outer, inner):
        assert meter.rss_peak - before > 140e6
    assert quiet.rss_peak - before < 70e6
    assert inner.metrics()["rss_peak_mb"] == inner.rss_peak / 1e6
    assert set(inner.metrics()) == {"rss_mb", "rss_peak_mb"}
    assert inner.rss == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
