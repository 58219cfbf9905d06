"""Stems and the layers between stages: nothing is stored for them, and nothing else changes."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging
from torchvision.models.video.swin_transformer import SwinTransformer3d

from re2tal.memory import LiveBytes
from re2tal.reversible import (
    ReversibleError,
    rebuildable,
    recomputed,
    rewire,
    set_reversible,
    unwire,
)
from tests.reversible.toy_blocks import MlpBlock, assert_same_step, one_step, tiny_swin
from tests.reversible.zoo import ZOO, features

WIDTH = 8


class Stem(nn.Module):
    """Statistics, dropout and a parameter; counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.4)
        self.ran = 0

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Any:
        self.ran += 1
        return self.drop(torch.tanh(self.norm(self.linear(x)))) * scale


class PairStem(Stem):
    """Returns something beside its tensor."""

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Any:
        return super().forward(x, scale), (3, "rows")


@recomputed.register
def _stem(module: Stem) -> bool:
    return True


def network(stem: nn.Module | None = None, between: nn.Module | None = None) -> nn.Sequential:
    """A stem, a stage, what lies between, and a stage, on x (B, 8)."""
    torch.manual_seed(0)
    parts = [stem or Stem()]
    for part in (between or Stem(), None):
        parts.append(nn.Sequential(*(MlpBlock(WIDTH) for _ in range(3))))
        parts += [] if part is None else [part]
    return nn.Sequential(*parts)


def points(rows: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, WIDTH)


def stems(model: nn.Module) -> list[Stem]:
    return [m for m in model.modules() if isinstance(m, Stem)]


# What is stored


class Held:
    """The bytes that a forward has left alive."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def running(self, operator: Any, inputs: list[Tensor]) -> None:
        pass

    def made(self, storage: int, kind: str, size: int) -> None:
        self.sizes[storage] = size if kind == "activations" else 0

    def gone(self, storage: int) -> None:
        self.sizes.pop(storage, None)


SMALL = 2000
"""Bytes of the sums and largest values that stages keep of their streams."""


def held_after(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    held = Held()
    with LiveBytes(model, held):
        y = forward()
        gc.collect()
        kept = sum(held.sizes.values())
    assert y.requires_grad
    return kept


def swin_bytes(x: Tensor) -> tuple[int, int]:
    """Of a stream of the first stage of `tiny_swin`, and of the second."""
    first = x.numel() // 3 // 32 * 8 * 4
    return first, first // 2


@pytest.mark.parametrize("needs_input", [True, False])
def test_all_that_a_forward_keeps_are_the_streams(needs_input: bool) -> None:
    model = tiny_swin((1, 1)).eval()
    x = torch.randn(2, 3, 4, 64, 64, requires_grad=needs_input)
    rewire(model)
    one, two = swin_bytes(x)

    def forward() -> Tensor:
        result: Tensor = model.features(model.patch_embed(x))
        return result

    streams = 2 * one + 3 * two  # two of each stage, and the output
    assert streams <= held_after(model, forward) < streams + SMALL
    rewire(model, recompute=False)
    # Then the merged streams, which PatchMerging normalises, and the normalised are kept as well.
    assert held_after(model, forward) > streams + 2 * one


def test_frames_are_kept_as_bytes() -> None:
    model = tiny_swin((1, 1)).eval()
    rewire(model)
    frames = torch.randint(0, 256, (2, 3, 4, 64, 64), dtype=torch.uint8)
    one, two = swin_bytes(frames)

    def normalised() -> Tensor:
        return frames.float() / 255 - 0.5

    def kept(source: Callable[[], Tensor]) -> int:
        return held_after(model, lambda: model.features(model.patch_embed(source())))

    streams = 2 * one + 3 * two
    assert streams <= kept(lambda: rebuildable(normalised(), normalised)) < streams + SMALL
    assert kept(normalised) >= streams + 4 * frames.numel()

    def step(source: Callable[[], Tensor]) -> list[Tensor]:
        loss = model(source()).square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    rebuilt = step(lambda: rebuildable(normalised(), normalised))
    set_reversible(model, False)
    assert all(torch.equal(a, b) for a, b in zip(rebuilt, step(normalised), strict=True))


def test_what_is_rebuilt_is_asked_for_once_and_in_the_backward() -> None:
    model, asked = network(), []
    rewire(model)
    x = points()

    def again() -> Tensor:
        asked.append("source")
        return x.clone()

    loss = model(rebuildable(x.clone(), again)).sum()
    assert not asked
    loss.backward()
    assert asked == ["source"]


# Gradients


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("frozen", ["", "0.", "2.", "1.", "2.norm", "0.linear"])
def test_a_step_is_that_of_the_modules_themselves(needs_input: bool, frozen: str) -> None:
    model, x = network(), points().requires_grad_(needs_input)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    steps, buffers = [], []
    for recompute in (True, False):
        for stem in stems(model):
            stem.norm.reset_running_stats()
        rewire(model, recompute=recompute)
        steps.append(one_step(model, x))
        buffers.append([b.clone() for b in model.buffers()])
    assert_same_step(*steps)
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    assert int(stems(model)[0].norm.num_batches_tracked or 0) == 1
    for name, gradient in steps[0].gradients.items():
        if not name.startswith("input"):
            assert (gradient is None) == bool(frozen and name.startswith(frozen)), name


@pytest.mark.parametrize("name", ["swin3d", "swin2d", "mvit_v1", "mvit_v2", "r3d", "r2plus1d"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_of_the_libraries_models(name: str, bf16: bool) -> None:
    """MViT's blocks return their grid beside the tokens."""
    torch.manual_seed(0)
    model, inputs = ZOO[name](drop=0.2)
    inputs = tuple(x.requires_grad_() for x in inputs)

    class Tensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *given: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return features(self.inner(*given))

    outer, steps, left = Tensors().train(), [], []
    for recompute in (True, False):
        report = rewire(outer, recompute=recompute)
        left.append(sum(row.recomputed for row in report.left_out))
        steps.append(one_step(outer, *inputs))
    assert_same_step(*steps)
    assert left[0] > 0 == left[1]


def test_draws_in_between_do_not_matter_and_the_generator_is_left_alone() -> None:
    model, x = network(), points()
    rewire(model)
    truth = one_step(model, x)

    def loss(y: Tensor) -> Tensor:
        torch.rand(50)
        return y.pow(2).sum()

    found = one_step(model, x, loss=loss)
    for name, gradient in truth.gradients.items():
        assert gradient is None or torch.equal(found.gradients[name], gradient)  # type: ignore[arg-type]
    total = model(x).sum()
    before = torch.get_rng_state()
    total.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mode_of_the_forward_counts() -> None:
    model, x = network(), points()
    rewire(model)
    truth = one_step(model, x)

    def loss(y: Tensor) -> Tensor:
        model.eval()
        return y.pow(2).sum()

    found = one_step(model, x, loss=loss)
    assert not any(m.training for m in model.modules())
    for name, gradient in truth.gradients.items():
        assert gradient is None or torch.equal(found.gradients[name], gradient)  # type: ignore[arg-type]


def test_other_arguments_and_other_results_are_passed_along() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = PairStem()
            self.blocks = nn.Sequential(MlpBlock(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            y, others = self.stem(x, scale=torch.full((), 3.0))
            assert others == (3, "rows")
            result: Tensor = self.blocks(y)
            return result

    torch.manual_seed(0)
    model, x, steps = Net(), points().requires_grad_(), []
    for recompute in (True, False):
        rewire(model, recompute=recompute)
        steps.append(one_step(model, x))
    assert_same_step(*steps)


def test_an_argument_that_needs_a_gradient_gets_it() -> None:
    model, x, gradients = network(), points(), []
    scale = torch.full((), 3.0, requires_grad=True)
    for recompute in (True, False):
        rewire(model, recompute=recompute)
        torch.manual_seed(0)
        loss = model[1:](model[0](x, scale=scale)).sum()
        gradients.append(torch.autograd.grad(loss, [scale, *model.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# When it is repeated


def test_it_runs_twice_where_it_is_recomputed_and_once_elsewhere() -> None:
    model, x = network(), points()

    def runs() -> list[int]:
        for stem in stems(model):
            stem.ran = 0
        model(x).sum().backward()
        return [stem.ran for stem in stems(model)]

    rewire(model)
    assert runs() == [2, 2]
    set_reversible(model, False)
    assert runs() == [1, 1]
    set_reversible(model, True)
    assert runs() == [2, 2]
    stems(model)[0].requires_grad_(False)  # nothing to differentiate: an input without gradient
    assert runs() == [1, 2]
    rewire(model, recompute=False)
    assert runs() == [1, 1]


def test_without_gradients_it_is_called_plainly() -> None:
    model, x = network().eval(), points()
    rewire(model)
    truth = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), truth)
    with torch.inference_mode():
        assert torch.equal(model(x), truth)
    assert [stem.ran for stem in stems(model)] == [3, 3]


def test_unwire_takes_it_back() -> None:
    model = network()
    rewire(model)
    assert all("forward" in vars(stem) for stem in stems(model))
    unwire(model)
    assert not any("forward" in vars(m) for m in model.modules())
    model(points()).sum().backward()
    assert [stem.ran for stem in stems(model)] == [1, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = network(), points()
    rewire(model)
    twin = copied(model)
    assert_same_step(one_step(twin, x), one_step(model, x))
    assert [stem.ran for stem in stems(twin)] == [stem.ran for stem in stems(model)] == [2, 2]
    set_reversible(twin, False)
    one_step(model, x)
    one_step(twin, x)
    assert [stem.ran for stem in stems(twin)] == [3, 3]
    assert [stem.ran for stem in stems(model)] == [4, 4]
    unwire(twin)
    assert all("forward" in vars(stem) for stem in stems(model))


def test_swin_and_resnets_have_their_stems_and_merging_recomputed() -> None:
    report = rewire(tiny_swin((2, 2)))
    found = [(row.name, row.kind) for row in report.left_out if row.recomputed]
    assert found == [("patch_embed", "PatchEmbed3d"), ("features.1", "PatchMerging")]
    model, _ = ZOO["r3d"]()
    report = rewire(model)
    found = [(row.name, row.kind) for row in report.left_out if row.recomputed]
    assert found == [("stem", "BasicStem"), ("layer2.0", "BasicBlock")]
    assert "recomputed: it has stride" in str(report)


# Refusals, and what must not go wrong silently


def test_an_input_that_was_modified_in_place() -> None:
    model, x = network(), points()
    rewire(model)
    loss = model(x).sum()
    x.zero_()
    with pytest.raises(ReversibleError, match=r"input was modified in place"):
        loss.backward()


def test_a_stages_output_that_is_modified_in_place_on_the_way() -> None:
    """The streams would yield what it was before."""
    model, steps = network(between=nn.Sequential(nn.ReLU(inplace=True), Stem())), []
    for recompute in (True, False):
        rewire(model, recompute=recompute)
        steps.append(one_step(model, points()))
    assert_same_step(*steps)


class Fork(nn.Module):
    """A stage whose output is read by a recomputed module, and doubled afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(MlpBlock(WIDTH), MlpBlock(WIDTH))
        self.stem = Stem()
        self.in_place = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.stage(x)
        z: Tensor = self.stem(y)
        return z + (y.mul_(2) if self.in_place else y * 2)


def test_a_stages_output_that_is_modified_in_place_afterwards() -> None:
    """The streams are not touched, and yield what the module has read."""
    torch.manual_seed(0)
    model = Fork()
    rewire(model)
    found = one_step(model, points())
    model.in_place = False
    assert_same_step(found, one_step(model, points()))


def test_a_step_of_the_optimizer_before_the_backward() -> None:
    model = network()
    rewire(model)
    loss = model(points()).sum()
    with torch.no_grad():
        stems(model)[1].linear.weight.add_(1)
    with pytest.raises(ReversibleError, match=r"2: a parameter .* modified in place"):
        loss.backward()


def test_a_second_backward_is_refused_where_the_streams_are_gone() -> None:
    model = network()
    rewire(model)
    loss = model(points()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(ReversibleError, match="second backward"):
        loss.backward()


def test_a_second_backward_of_the_module_alone() -> None:
    """Its source was kept, so that it can be repeated as often as is asked for."""
    model = network()
    rewire(model)
    y = model[0](points())
    parameters = list(model[0].parameters())
    first = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_gradients_are_refused() -> None:
    model, x = network(), points().requires_grad_()
    rewire(model)
    with pytest.raises(ReversibleError, match="gradients of gradients"):
        torch.autograd.grad(model[0](x).sum(), x, create_graph=True)


def test_torchvisions_merging_pads_odd_sizes_the_same() -> None:
    torch.manual_seed(0)
    model = SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=[2, 4, 4],
        num_classes=3,
    )
    x, steps = torch.randn(1, 3, 5, 27, 21, requires_grad=True), []
    assert isinstance(model.features[1], PatchMerging)
    for recompute in (True, False):
        rewire(model, recompute=recompute)
        steps.append(one_step(model, x))
    assert_same_step(*steps)


class Twofold(Stem):
    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Any:
        y = super().forward(x, scale)
        return y, y.sin()


@recomputed.register
def _twofold(module: Twofold) -> bool:
    return True


def test_a_second_result_that_needs_a_gradient_is_refused() -> None:
    model = nn.Sequential(MlpBlock(WIDTH), Twofold())
    rewire(model)
    with pytest.raises(ReversibleError, match=r"1 returns more than one tensor .*recompute=False"):
        model(points())
    rewire(model, recompute=False)
    assert len(model(points())) == 2


def test_the_input_is_freed_with_the_graph() -> None:
    model = network()
    rewire(model)
    x = points().clone()
    kept = weakref.ref(x.untyped_storage())
    loss = model(x).sum()
    del x
    loss.backward()
    assert kept() is None
