"""Stems and layers between stages: nothing is stored for them, and nothing else changes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from re2tal.memory import LiveBytes
from re2tal.reversible import (
    ReversibleError,
    rebuildable,
    recomputed,
    rewire,
    set_reversible,
    unwire,
)
from tests.reversible.toy_blocks import (
    MlpBlock,
    Stem,
    StepResult,
    assert_same_step,
    one_step,
    points,
    stems_and_stages,
    tiny_swin,
)
from tests.reversible.zoo import ZOO


def stems(model: nn.Module) -> list[Stem]:
    return [m for m in model.modules() if isinstance(m, Stem)]


def assert_recomputed_is_stored(model: nn.Module, *inputs: Tensor) -> StepResult:
    """Compare a step, and the buffers after it, with and without recomputation."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    steps, buffers = [], []
    for recompute in (True, False):
        model.load_state_dict(before, strict=False)
        report = rewire(model, recompute=recompute)
        assert any(row.recomputed for row in report.left_out) == recompute
        steps.append(one_step(model, *inputs))
        buffers.append([b.clone() for b in model.buffers()])
    assert_same_step(*steps)
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    return steps[0]


# What is stored


class Held:
    """Bytes that are still alive after a forward."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def running(self, operator: Any, inputs: list[Tensor]) -> None:
        """Ignore the operator."""

    def made(self, storage: int, kind: str, size: int) -> None:
        self.sizes[storage] = size if kind == "activations" else 0

    def gone(self, storage: int) -> None:
        self.sizes.pop(storage, None)


SMALL = 2000
"""Bytes of the sums of bits and largest values that stages keep of their streams."""


def held_after(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    held = Held()
    with LiveBytes(model, held):
        y = forward()
        gc.collect()
        kept = sum(held.sizes.values())
    assert y.requires_grad
    return kept


def swin_bytes(x: Tensor) -> tuple[int, int]:
    """Bytes of a stream in the first and in the second stage of `tiny_swin`."""
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

    streams = 2 * one + 3 * two  # two streams of each stage, and the output
    assert streams <= held_after(model, forward) < streams + SMALL
    rewire(model, recompute=False)
    # Otherwise the merged streams, which PatchMerging normalises, and its norm are kept too.
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


def test_a_source_is_asked_for_once_and_in_the_backward() -> None:
    model, asked, x = stems_and_stages(), list[str](), points()

    def again() -> Tensor:
        asked.append("source")
        return x.clone()

    loss = model(rebuildable(x.clone(), again)).sum()
    assert not asked
    loss.backward()
    assert asked == ["source"]


def test_the_input_is_freed_with_the_graph() -> None:
    x = points().clone()
    kept = weakref.ref(x.untyped_storage())
    loss = stems_and_stages()(x).sum()
    del x
    loss.backward()
    assert kept() is None


# Gradients


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("frozen", ["", "0.", "2.", "1.", "2.norm", "0.linear"])
def test_a_step_is_that_of_the_modules_themselves(needs_input: bool, frozen: str) -> None:
    model, x = stems_and_stages(), points(requires_grad=needs_input)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    step = assert_recomputed_is_stored(model, x)
    assert int(stems(model)[0].norm.num_batches_tracked or 0) == 1
    for name, gradient in step.gradients.items():
        if not name.startswith("input"):
            assert (gradient is None) == bool(frozen and name.startswith(frozen)), name


class PairStem(Stem):
    """Stem that returns something besides its tensor."""

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Any:
        return super().forward(x, scale), (3, "rows")


@pytest.mark.parametrize("needs_scale", [True, False])
def test_other_arguments_and_other_results_are_passed_along(needs_scale: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = PairStem()
            self.blocks = nn.Sequential(MlpBlock())

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            y, others = self.stem(x, scale=scale)
            assert others == (3, "rows")
            result: Tensor = self.blocks(y)
            return result

    torch.manual_seed(0)
    scale = torch.full((), 3.0, requires_grad=needs_scale)
    step = assert_recomputed_is_stored(Net(), points(requires_grad=True), scale)
    assert (step.gradients["input 1"] is not None) == needs_scale


def test_a_stages_output_that_is_modified_in_place_on_the_way() -> None:
    """Rebuilding from the streams would yield the output as it was before the change."""
    model = stems_and_stages(nn.Sequential(nn.ReLU(inplace=True), Stem()))
    assert_recomputed_is_stored(model, points())


class Fork(nn.Module):
    """A stage whose output a recomputed module reads before it is doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(MlpBlock(), MlpBlock())
        self.stem = Stem()
        self.in_place = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.stage(x)
        z: Tensor = self.stem(y)
        return z + (y.mul_(2) if self.in_place else y * 2)


def test_a_stages_output_that_is_modified_in_place_afterwards() -> None:
    """The streams are unchanged, and yield the values that the module has read."""
    torch.manual_seed(0)
    model = Fork()
    rewire(model)
    found = one_step(model, points())
    model.in_place = False
    assert_same_step(found, one_step(model, points()))


# When the module is replayed


def test_it_runs_twice_where_it_is_recomputed_and_once_elsewhere() -> None:
    model, x = stems_and_stages(), points()

    def runs() -> list[int]:
        for stem in stems(model):
            stem.ran = 0
        model(x).sum().backward()
        return [stem.ran for stem in stems(model)]

    assert runs() == [2, 2]
    set_reversible(model, False)
    assert runs() == [1, 1]
    set_reversible(model, True)
    assert runs() == [2, 2]
    stems(model)[0].requires_grad_(False)  # nothing to differentiate: the input needs no gradient
    assert runs() == [1, 2]
    rewire(model, recompute=False)
    assert runs() == [1, 1]
    rewire(model)
    unwire(model)
    assert not any("forward" in vars(m) for m in model.modules())
    assert runs() == [1, 1]


def test_stems_and_merging_of_swin_and_resnets_are_recomputed() -> None:
    report = rewire(tiny_swin((2, 2)))
    found = [(row.name, row.kind) for row in report.left_out if row.recomputed]
    assert found == [("patch_embed", "PatchEmbed3d"), ("features.1", "PatchMerging")]
    model, _ = ZOO["r3d"]()
    report = rewire(model)
    found = [(row.name, row.kind) for row in report.left_out if row.recomputed]
    assert found == [("stem", "BasicStem"), ("layer2.0", "BasicBlock")]
    assert "recomputed: it has stride" in str(report)


def test_a_second_backward_of_the_module_alone() -> None:
    """The module's input was kept, so it can be replayed any number of times."""
    model = stems_and_stages()
    y = model[0](points())
    parameters = list(model[0].parameters())
    first = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Refusals


def test_an_input_that_was_modified_in_place() -> None:
    model, x = stems_and_stages(), points()
    loss = model(x).sum()
    x.zero_()
    with pytest.raises(ReversibleError, match=r"input was modified in place"):
        loss.backward()


def test_a_step_of_the_optimizer_before_the_backward() -> None:
    model = stems_and_stages()
    loss = model(points()).sum()
    with torch.no_grad():
        stems(model)[1].linear.weight.add_(1)
    with pytest.raises(ReversibleError, match=r"2: a parameter .* modified in place"):
        loss.backward()


class Twofold(Stem):
    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Any:
        y = super().forward(x, scale)
        return y, y.sin()


@recomputed.register
def _twofold(module: Twofold) -> bool:
    return True


def test_a_second_result_that_needs_a_gradient_is_refused() -> None:
    model = nn.Sequential(MlpBlock(), Twofold())
    rewire(model)
    with pytest.raises(ReversibleError, match=r"1 returns more than one tensor .*recompute=False"):
        model(points())
    rewire(model, recompute=False)
    assert len(model(points())) == 2
