"""Floor of memory: two streams, their gradients and a piece; and tensors that others hold."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.resnet import BasicBlock
from torchvision.models.vision_transformer import EncoderBlock

from re2tal.backbones.slowfast import SlowFastConfig
from re2tal.backbones.swin import SwinConfig
from re2tal.backbones.table import entry_of
from re2tal.backbones.videomae import VideoMAEConfig
from re2tal.detector import Detector
from re2tal.memory import LiveBytes, predict_peak
from re2tal.reversible import (
    Branch,
    ByToken,
    ReversibleError,
    branches,
    part_of,
    rebuildable,
    rewire,
    set_coupling,
    set_reversible,
)
from re2tal.reversible.layouts import BySample
from re2tal.reversible.recompute import Recomputed
from re2tal.reversible.rewire import ALONE
from re2tal.reversible.tensors import rebuild_of
from tests.reversible.toy_blocks import (
    assert_equal_gradients,
    assert_reversible_is_stored,
    one_step,
    tiny_swin,
)


class Large:
    """Largest number of new storages of at least a given size in each phase of a step."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.alive: dict[int, int] = {}
        self.most = {"forward": 0, "backward": 0}

    def running(self, operator: Any, inputs: list[Tensor]) -> None:
        """Ignore the operator."""

    def made(self, storage: int, kind: str, size: int) -> None:
        if kind == "activations" and size >= self.size:
            self.alive[storage] = size
            node = torch._C._current_autograd_node()
            phase = "forward" if node is None else "backward"
            self.most[phase] = max(self.most[phase], len(self.alive))

    def gone(self, storage: int) -> None:
        self.alive.pop(storage, None)


class Feed(nn.Module):
    """Block of one branch, which is cut into tokens or into samples."""

    def __init__(self, cut: Any) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


@branches.register
def _feed(block: Feed) -> list[Branch]:
    return [Branch("feed", (block.norm, block.mix), cut=block.cut)]


def swin_stage() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*tiny_swin((2,)).features[0].children())


def feed_stage(cut: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Feed(cut) for _ in range(5)))


STAGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "windows": (swin_stage, (1, 4, 16, 16, 8)),
    "windows, padded": (swin_stage, (1, 3, 15, 14, 8)),
    "tokens": (lambda: feed_stage(ByToken(40)), (3, 5, 67, 8)),
    "samples": (lambda: feed_stage(BySample(5)), (7, 5, 67, 8)),
}
every_stage = pytest.mark.parametrize(("build", "shape"), STAGES.values(), ids=STAGES)


@every_stage
@pytest.mark.parametrize(
    ("alpha", "beta", "exact"), [(0.0, 1.0, True), (0.0, 1.0, False), (0.3, 0.9, False)]
)
def test_two_streams_and_their_gradients_are_alive_at_the_peak(
    build: Callable[[], nn.Module], shape: tuple[int, ...], alpha: float, beta: float, exact: bool
) -> None:
    model = build()
    # Float streams are compared by a sample, which would be all of such small ones.
    rewire(model, exact=exact, slice_bytes=2**12, verify=exact)
    set_coupling(model, alpha=alpha, beta=beta)
    x = torch.randn(shape, requires_grad=True)
    model(x).sum().backward()  # Dr2Net's couplings are measured first
    large = Large(prod(shape) * x.element_size())
    with LiveBytes(model, large):
        model(x).sum().backward()
    assert large.most["backward"] == 4
    assert large.most["forward"] == 3  # the third is the merged output


@every_stage
def test_without_gradients_the_streams_alone_are_alive(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = build()
    rewire(model, slice_bytes=2**12)
    x = torch.randn(shape)
    large = Large(prod(shape) * x.element_size())
    with LiveBytes(model, large), torch.no_grad():
        model(x)
    assert large.most == {"forward": 3, "backward": 0}


# Streams and gradients that something else holds


def test_hooks_inside_a_branch_may_keep_streams_and_gradients() -> None:
    """Hooks hold tensors in the memory that later steps change."""
    model = feed_stage(ByToken(40))
    rewire(model, slice_bytes=2**30)
    x = torch.randn(3, 5, 8, requires_grad=True)
    truth = one_step(model, x)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(*given: Any) -> None:
        kept.extend((t.detach(), t.detach().clone()) for t in (*given[1], *given[2]))

    for block in model:
        block.get_submodule("norm").register_forward_hook(lambda m, i, o: keep(m, i, (o,)))
        block.get_submodule("mix").register_full_backward_hook(keep)
    found = one_step(model, x)
    # Five blocks: an input and an output in forward and in replay, two gradients in the backward.
    assert len(kept) == 5 * 6
    assert all(torch.equal(a, b) for a, b in kept)
    assert_equal_gradients(found, truth)


@pytest.mark.parametrize("exact", [True, False])
def test_features_taken_out_of_a_model_with_hooks_of_their_own(exact: bool) -> None:
    """A stage's input and output are used elsewhere; their gradients are read, halved and kept."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = feed_stage(ByToken(40)), feed_stage(ByToken(40))
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            between = self.first(x)
            between.retain_grad()
            after = self.second(between)
            after.retain_grad()
            after.register_hook(lambda gradient: gradient / 2)
            self.kept = [between, after]
            return after * between + between.sin()

    torch.manual_seed(0)
    model, x = Net(), torch.randn(3, 5, 8, requires_grad=True)
    rewire(model, slice_bytes=2**12, exact=exact)
    set_reversible(model, False)
    stored, before = one_step(model, x), model.kept
    set_reversible(model, True)
    rebuilt, after = one_step(model, x), model.kept
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)
    assert_equal_gradients(rebuilt, stored, tolerance=0.0 if exact else 1e-4)


def test_a_gradient_in_another_memory_format() -> None:
    """A gradient that is transposed, or one number expanded to the size of the output."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = feed_stage(ByToken(40))
            self.conv = nn.Conv1d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.stage(x).transpose(1, 2))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 23, 8, requires_grad=True)
    for slice_bytes in (2**12, 2**30):
        rewire(model, slice_bytes=slice_bytes)
        assert_reversible_is_stored(model, x)
    rewire(stage := feed_stage(ByToken(40)), slice_bytes=2**12)
    for reversible in (False, True):
        set_reversible(stage, reversible)
        one_step(stage, x, loss=lambda y: y.sum())


def test_an_input_in_another_memory_format() -> None:
    for cut in (ByToken(40), BySample(5)):
        model = feed_stage(cut)
        rewire(model, slice_bytes=2**12)
        x = torch.randn(6, 8, 11).transpose(1, 2).requires_grad_()
        assert_reversible_is_stored(model, x)


# Backwards that fail


def test_a_backward_that_failed_midway_is_not_taken_up_again() -> None:
    """When it fails, half of a stream is already rewound."""
    model = feed_stage(ByToken(40))
    rewire(model, slice_bytes=2**12)
    angry = [True]

    def fail(*_: Any) -> None:
        if angry:
            angry.clear()
            raise ValueError("once")

    model[2].get_submodule("mix").register_full_backward_hook(fail)
    loss = model(torch.randn(3, 5, 8)).sum()
    with pytest.raises(ValueError, match="once"):
        loss.backward(retain_graph=True)
    with pytest.raises(ReversibleError, match="second backward"):
        loss.backward()
    model(torch.randn(3, 5, 8)).sum().backward()


def test_a_backward_that_failed_before_it_reached_the_stage() -> None:
    model = feed_stage(ByToken(40))
    rewire(model)
    angry = [True]

    def fail(_: Tensor) -> None:
        if angry:
            angry.clear()
            raise ValueError("once")

    y = model(x := torch.randn(3, 5, 8, requires_grad=True))
    y.register_hook(fail)
    loss = y.square().sum()
    with pytest.raises(ValueError, match="once"):
        loss.backward(retain_graph=True)
    loss.backward()
    (truth,) = torch.autograd.grad(model(x).square().sum(), x)
    assert x.grad is not None
    assert torch.equal(x.grad, truth)


# Between the stages


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs_input", [True, False])
def test_patch_merging_runs_in_pieces(precision: torch.dtype, needs_input: bool) -> None:
    torch.manual_seed(0)
    model = tiny_swin((1, 1), drop_path=0.2)
    rewire(model, slice_bytes=2**13)
    if not needs_input:
        model.features[0].requires_grad_(False)
        model.patch_embed.requires_grad_(False)
    merging = vars(model.features[1])["forward"]
    x = torch.randn(2, 3, 4, 40, 36)
    runs: list[tuple[int, ...]] = []
    model.features[1].norm.register_forward_hook(lambda _m, i, _o: runs.append(i[0].shape))
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        found = assert_reversible_is_stored(model, x)
        in_pieces = [shape for shape in runs if len(shape) == 4]
        assert len(in_pieces) == len(runs) > 3 * 2  # stored, forward, replay
        merging.slice_bytes = None
        whole = one_step(model, x)
    assert_equal_gradients(found, whole, tolerance=1e-5 if precision == torch.float32 else 2e-2)


# Frames and tokens that nothing reads again


class Sum(nn.Module):
    num_classes, multiple = 0, 1

    def forward(self, features: Tensor, _mask: Tensor, _targets: Any) -> Tensor:
        return features.square().sum()


def swin_detector() -> Detector[Any, Any]:
    torch.manual_seed(0)
    config = SwinConfig(embed_dim=8, depths=(2, 2), heads=(2, 2), window=(2, 4, 4))
    return Detector(config.build(), Sum())


def swin_inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (1, 8, 64, 64, 3), dtype=torch.uint8)
    return frames, torch.ones(1, 8, dtype=torch.bool)


def test_frames_and_tokens_are_given_back_when_they_are_read() -> None:
    detector, inputs = swin_detector(), swin_inputs()
    rewire(detector.backbone)
    frames, one = 3 * 8 * 64 * 64 * 4, 4 * 16 * 16 * 8 * 4
    alive: list[int] = []
    large = Large(one // 4)
    detector.backbone.norm.register_forward_pre_hook(
        lambda *_: alive.append(sum(large.alive.values()))
    )
    _graph = detector(*inputs, None)  # and with them the indices of windows
    alive.clear()
    with LiveBytes(detector, large):
        detector(*inputs, None).backward()
    # Two streams of each stage, and the output of the last.
    assert alive == [2 * one + 3 * one // 2]
    assert alive[0] < frames


OTHERS: dict[str, tuple[Any, str]] = {
    "slowfast": (
        SlowFastConfig(depths=(2, 1), width=8, channel_ratio=4, frozen_statistics=False),
        "slow_path.layer1.1.conv1",
    ),
    "videomae": (
        VideoMAEConfig(patch=16, channels=16, depths=(2,), heads=2, clip=4, trained_size=64),
        "encoder.layer.0.layernorm_before",
    ),
}
"""Configurations, and a module of their first stage other than the stem."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_backbones_keep_no_floats_of_frames(name: str) -> None:
    """Neither in the forward, where callers' variables would hold them, nor for the backward."""
    config, inside = OTHERS[name]
    torch.manual_seed(0)
    detector: Detector[Any, Any] = Detector(config.build(), Sum())
    rewire(detector.backbone)
    frames, mask = swin_inputs()
    floats = Exactly(4 * frames.numel())
    alive: list[int] = []
    detector.backbone.get_submodule(inside).register_forward_hook(
        lambda *_: alive.append(len(floats.alive))
    )
    with LiveBytes(detector, floats):
        loss = detector(frames, mask, None)
        alive.append(len(floats.alive))
        loss.backward()
    assert floats.most["forward"] == 1
    assert not any(alive)
    assert len(alive) > 2
    given = {n: p.grad for n, p in detector.named_parameters()}
    detector.zero_grad(set_to_none=True)
    set_reversible(detector, False)
    torch.testing.assert_close(detector(frames, mask, None), loss, rtol=0, atol=0)
    detector(frames, mask, None).backward()
    for parameter_name, parameter in detector.named_parameters():
        found, truth = given[parameter_name], parameter.grad
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(truth)), parameter_name


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("swin_toy", "patch_embed"),
        ("slowfast_toy", "slow_path.conv1"),
        ("slowfast_toy", "fast_path.conv1"),
        ("videomae_toy", "embeddings"),
        ("r3d_18", "stem"),
    ],
)
def test_frames_are_read_once_unless_a_hook_may_keep_them(name: str, stem: str) -> None:
    for place in (stem, ""):
        with torch.device("meta"):
            built: Any = entry_of(name).make().build()
        assert built.reads_once
        built.get_submodule(place).register_forward_hook(lambda *_: None)
        assert not built.reads_once


class Embedding(nn.Module):
    """Layers that do not save their input, like those of Swin's stem."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.mix(nn.functional.pad(x, (0, 0))))
        return result


def test_the_backward_of_a_stem_holds_neither_its_result_nor_frames_that_it_rebuilt() -> None:
    frames = torch.randn(64, 8)
    stem = Recomputed(Embedding(), "stem")
    large = Large(frames.nbytes)
    with LiveBytes(stem.module, large):
        x = rebuildable(frames * 2, lambda: frames * 2)
        y = stem(x)
        del x
        y.sum().backward()
    # During its replay: frames, tensors saved by two layers, its result and the gradient; then a
    # layer's gradient instead of frames and result.
    assert large.most["backward"] == 5


class Exactly(Large):
    """Number of new storages of a given size."""

    def made(self, storage: int, kind: str, size: int) -> None:
        if size == self.size:
            super().made(storage, kind, size)


@pytest.mark.parametrize("first", [True, False])
def test_a_part_of_frames_is_rebuilt_where_they_are(first: bool) -> None:
    frames = torch.arange(6.0)
    whole = rebuildable(frames * 2, lambda: frames * 2) if first else frames * 2
    part = part_of(whole, lambda x: x[1::2])
    rebuild = rebuild_of(part)
    assert part.tolist() == [2, 6, 10]
    assert (rebuild is not None) == first
    assert rebuild is None or torch.equal(rebuild(), part)


@pytest.mark.parametrize("size", [(1, 8, 16, 16, 3), (2, 4, 8, 8, 3)])
def test_only_the_part_of_frames_that_is_read_is_normalised_again(size: tuple[int, ...]) -> None:
    frames = torch.randint(256, size, dtype=torch.uint8)
    whole = swin_detector().normalized(frames)
    part = part_of(whole, lambda x: x[:, :, ::4])
    rebuild, sizes = rebuild_of(part), Large(0)
    assert rebuild is not None
    with LiveBytes(nn.Module(), sizes):
        again = rebuild()
        assert max(sizes.alive.values()) == part.numel() * part.element_size()
    assert torch.equal(again, part)


def test_tokens_as_a_convolution_leaves_them_are_changed_in_place() -> None:
    """Only with three dimensions; a stage of more keeps the memory format of its input."""
    model = feed_stage(ByToken(40))
    rewire(model, slice_bytes=2**12)
    x = torch.randn(3, 8, 64, requires_grad=True).transpose(1, 2)
    large = Large(x.numel() * x.element_size())
    with LiveBytes(model, large):
        model(x).sum().backward()
    assert large.most == {"forward": 3, "backward": 4}


@pytest.mark.parametrize("hooked", ["", "backbone", "backbone.patch_embed", "backbone.features.0"])
def test_the_step_is_the_same_when_they_are_given_back(hooked: str) -> None:
    detector, (frames, mask) = swin_detector(), swin_inputs()
    rewire(detector.backbone)
    seen: list[tuple[Tensor, Tensor]] = []
    if hooked:
        detector.get_submodule(hooked).register_forward_hook(
            lambda _m, inputs, output: seen.extend((t, t.clone()) for t in (inputs[0], output))
        )
    loss = detector(frames, mask, None)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.equal(a, b) for a, b in seen)
    given = {n: p.grad for n, p in detector.named_parameters()}
    detector.zero_grad(set_to_none=True)
    set_reversible(detector, False)
    detector(frames, mask, None).backward()
    for name, parameter in detector.named_parameters():
        assert torch.equal(torch.as_tensor(parameter.grad), torch.as_tensor(given[name])), name


# Where rewiring costs memory instead of saving it

Shape = tuple[int, ...]
# A block, an input with large activations, and one whose activations are less than the gradients.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], Shape, Shape]] = {
    "one branch, tied by statistics": (lambda: BasicBlock(8, 8), (4, 8, 32, 32), (1, 8, 2, 2)),
    "one branch, cut by samples": (lambda: CNBlock(8, 1e-6, 0), (4, 8, 32, 32), (1, 8, 1, 1)),
    "two branches": (
        lambda: EncoderBlock(2, 16, 64, 0, 0, partial(nn.LayerNorm, eps=1e-6)),
        (8, 32, 16),
        (1, 2, 16),
    ),
}


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_report_says_where_rewiring_costs_memory(kind: str, blocks: int) -> None:
    block, large, small = BLOCKS[kind]
    model = nn.Sequential(*(block() for _ in range(blocks)))
    inputs = [torch.empty(shape, requires_grad=True) for shape in (large, small)]
    plain = [predict_peak(model, x) for x in inputs]
    report = rewire(model, slice_bytes=2**13)
    ours = [predict_peak(model, x) for x in inputs]
    assert f"come together, {report.gradients / 1e6:.3g} MB at most" in str(report)
    assert plain[0].activations > 20 * report.gradients
    assert (ALONE in str(report)) == (plain[0].peak < ours[0].peak)
    assert (ALONE in str(report)) == (blocks == 1 and "statistics" in kind)
    if plain[1].activations < report.gradients:
        assert ours[1].activations > plain[1].activations
        assert ours[1].peak > plain[1].peak
    assert (plain[1].activations < report.gradients) == (
        blocks == 1 or (kind == "one branch, cut by samples")
    )
