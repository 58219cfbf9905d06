from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from re2tal.backbones.protocol import Backbone
from re2tal.backbones.slowfast import (
    SlowFastBackbone,
    SlowFastConfig,
    pytorchvideo_slowfast_50,
    pytorchvideo_slowfast_101,
    slowfast_50,
    slowfast_101,
    slowfast_toy,
)
from re2tal.backbones.slowfast.blocks import Bottleneck
from re2tal.reversible import reversible_stages, rewire, set_reversible, unwire
from re2tal.reversible.branches import (
    ChangesShapeError,
    branches,
    check_complete,
    recomputed,
    spans,
    split,
)

TINY = SlowFastConfig(depths=(2, 3, 1, 2), width=8, channel_ratio=4)
KINETICS_CLASSES = 400


def seeded(config: SlowFastConfig) -> SlowFastBackbone:
    """A backbone whose BatchNorms all do something, as pretrained ones do."""
    torch.manual_seed(0)
    backbone = config.build()
    for name, value in backbone.state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.2)
    return backbone


# The network once more, from a state dict: with nothing of the modules but the names of weights.


def conv_norm(
    state: Mapping[str, Tensor], name: str, x: Tensor, stride: tuple[int, ...] = (1, 1, 1)
) -> Tensor:
    weight = state[f"{name}.conv.weight"]
    x = F.conv3d(x, weight, stride=stride, padding=[(size - 1) // 2 for size in weight.shape[2:]])
    if f"{name}.bn.weight" not in state:
        return x
    scale = state[f"{name}.bn.weight"] / (state[f"{name}.bn.running_var"] + 1e-5).sqrt()
    shift = state[f"{name}.bn.bias"] - scale * state[f"{name}.bn.running_mean"]
    return x * scale[:, None, None, None] + shift[:, None, None, None]


def residual(state: Mapping[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    x = conv_norm(state, f"{name}.conv1", x).relu()
    x = conv_norm(state, f"{name}.conv2", x, (1, stride, stride)).relu()
    return conv_norm(state, f"{name}.conv3", x)


def layer(state: Mapping[str, Tensor], name: str, depth: int, x: Tensor, stride: int) -> Tensor:
    skip = conv_norm(state, f"{name}.0.downsample", x, (1, stride, stride))
    x = (skip + residual(state, f"{name}.0", x, stride)).relu()
    for block in range(1, depth):
        x = (x + residual(state, f"{name}.{block}", x)).relu()
    return x


def network(state: Mapping[str, Tensor], config: SlowFastConfig, video: Tensor) -> Tensor:
    def told(name: str, fast: Tensor) -> Tensor:
        x = conv_norm(state, f"slow_path.{name}_lateral", fast, (config.alpha, 1, 1))
        return x.relu() if config.fusion_norm else x

    frames = video.shape[2]
    slow = torch.stack([video[:, :, i] for i in range(0, frames, config.alpha)], dim=2)
    fast = video
    slow = conv_norm(state, "slow_path.conv1", slow, (1, 2, 2)).relu()
    fast = conv_norm(state, "fast_path.conv1", fast, (1, 2, 2)).relu()
    slow, fast = (F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1)) for x in (slow, fast))
    for index, depth in enumerate(config.depths):
        slow = torch.cat((slow, told("conv1" if index == 0 else f"layer{index}", fast)), dim=1)
        stride = 2 if index else 1
        slow = layer(state, f"slow_path.layer{index + 1}", depth, slow, stride)
        fast = layer(state, f"fast_path.layer{index + 1}", depth, fast, stride)
    length = frames // config.temporal_stride
    rows = [
        F.interpolate(x.flatten(3).mean(3), length, mode="linear", align_corners=False)
        for x in (slow, fast)
    ]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, fusion_norm=True, fusion_kernel=5),
        replace(TINY, alpha=2, temporal_stride=1),
        replace(TINY, alpha=8, temporal_stride=2),
    ],
)
def test_it_computes_what_the_paper_describes(config: SlowFastConfig) -> None:
    backbone = seeded(config).eval()
    video = torch.randn(2, 3, 16, 40, 36)
    with torch.inference_mode():
        features = backbone(video)
        wanted = network(backbone.state_dict(), config, video)
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_frames_become_features_of_the_stated_shape(stride: int) -> None:
    as_protocol: Backbone = replace(TINY, temporal_stride=stride).build()  # type-checked
    features = as_protocol(torch.randn(2, 3, 16, 32, 40))
    assert features.shape == (2, as_protocol.channels, 16 // stride)
    assert as_protocol.temporal_stride == stride
    # four times the inner channels of the fourth stage, in the slow and in the fast pathway
    assert as_protocol.channels == 4 * 8 * 8 + 4 * 8 * 2


def test_only_the_narrow_pathway_sees_every_frame() -> None:
    backbone = seeded(TINY).eval()
    for name, value in backbone.state_dict().items():
        if "_lateral" in name:
            value.zero_()
    video = torch.randn(1, 3, 8, 32, 32, requires_grad=True)
    slow, fast = backbone.places(video)
    assert (slow.shape[2], fast.shape[2]) == (2, 8)
    seen = [
        torch.autograd.grad(x.square().sum(), video, retain_graph=True)[0]
        .abs()
        .sum(dim=(0, 1, 3, 4))
        > 0
        for x in (slow, fast)
    ]
    assert seen[0].tolist() == [True, False, False, False] * 2
    assert seen[1].all()


@pytest.mark.parametrize(
    ("config", "millions"),
    [  # published with the classifier, https://pytorchvideo.readthedocs.io/en/latest/model_zoo.html
        (pytorchvideo_slowfast_50(), 34.57),
        (replace(pytorchvideo_slowfast_50(), fusion_kernel=5, alpha=8), 34.48),  # 4x16
        (pytorchvideo_slowfast_101(), 62.83),
    ],
)
def test_sizes_are_those_that_are_published(config: SlowFastConfig, millions: float) -> None:
    with torch.device("meta"):
        backbone = config.build()
    assert backbone.channels == 2304
    classifier = 2304 * KINETICS_CLASSES + KINETICS_CLASSES
    count = sum(p.numel() for p in backbone.parameters()) + classifier
    assert round(count / 1e6, 2) == millions


def counted(depths: tuple[int, ...]) -> int:
    """Parameters of table 1 of the paper, with lateral convolutions of 7 frames without norm."""
    total = 0
    for width, stem, frames in ((64, 1, (1, 1, 3, 3)), (8, 5, (3, 3, 3, 3))):
        slow = width == 64
        total += 3 * stem * 49 * width + 2 * width
        inputs = width
        for depth, inner, kernel in zip(
            depths, (width * n for n in (1, 2, 4, 8)), frames, strict=True
        ):
            if slow:
                spoken = inputs // 8
                total += 7 * spoken * 2 * spoken
                inputs += 2 * spoken
            total += inputs * 4 * inner + 2 * 4 * inner
            for block in range(depth):
                into = inputs if block == 0 else 4 * inner
                weights = kernel * into * inner + 9 * inner * inner + inner * 4 * inner
                total += weights + 2 * (inner + inner + 4 * inner)
            inputs = 4 * inner
    return total


@pytest.mark.parametrize("config", [slowfast_50(), slowfast_101()])
def test_sizes_follow_from_the_papers_table(config: SlowFastConfig) -> None:
    with torch.device("meta"):
        backbone = config.build()
    assert sum(p.numel() for p in backbone.parameters()) == counted(config.depths)


def test_the_toy_size_is_small() -> None:
    assert sum(p.numel() for p in slowfast_toy().build().parameters()) < 2**20


@pytest.mark.parametrize("frozen", [False, True])
def test_every_parameter_gets_a_gradient_from_the_features(frozen: bool) -> None:
    backbone = replace(slowfast_toy(), frozen_statistics=frozen).build()
    backbone(torch.randn(2, 3, 8, 32, 32)).square().sum().backward()
    silent = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_the_same_seed_and_frames_give_the_same_features() -> None:
    video = torch.randn(2, 3, 8, 32, 32)
    first, second = seeded(TINY), seeded(TINY)
    assert torch.equal(first(video), second(video))
    assert torch.equal(first(video), first(video))


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_statistics_stay_in_training(frozen: bool) -> None:
    backbone = seeded(replace(TINY, frozen_statistics=frozen))
    before = {n: v.clone() for n, v in backbone.state_dict().items() if "running" in n}
    backbone.eval()
    assert backbone.train() is backbone
    backbone(torch.randn(2, 3, 8, 32, 32))
    kept = [torch.equal(v, backbone.state_dict()[n]) for n, v in before.items()]
    assert all(kept) if frozen else not any(kept)
    assert backbone.training
    assert all(p.requires_grad for p in backbone.parameters())


def test_a_rewired_backbone_keeps_its_statistics_frozen_too() -> None:
    backbone = seeded(TINY)
    rewire(backbone)
    backbone.eval()
    backbone.train()
    before = {n: v.clone() for n, v in backbone.state_dict().items()}
    backbone(torch.randn(1, 3, 8, 32, 32)).sum().backward()
    assert all(torch.equal(v, backbone.state_dict()[n]) for n, v in before.items())


@pytest.mark.parametrize(
    ("stride", "frames", "whole"), [(4, 6, 4), (2, 6, 4), (8, 12, 8), (6, 8, 12), (4, 0, 4)]
)
def test_frames_that_do_not_fit_are_refused(stride: int, frames: int, whole: int) -> None:
    backbone = replace(TINY, temporal_stride=stride).build()
    with pytest.raises(ValueError, match=f"a multiple of {whole} frames, but got {frames}"):
        backbone(torch.zeros(1, 3, frames, 32, 32))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: SlowFastConfig(depths=()), "1 to 8 stages, but got 0"),
        (lambda: SlowFastConfig(depths=(3, 0)), r"depths must be 1 to .* is \(3, 0\)"),
        (lambda: SlowFastConfig(width=60), "60 is none of 8"),
        (lambda: SlowFastConfig(alpha=0), "alpha must be 1 to"),
        (lambda: SlowFastConfig(fusion_kernel=4), "odd, so that it has a middle, but got 4"),
    ],
)
def test_impossible_shapes_are_refused(build: Callable[[], SlowFastConfig], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build()


def test_names_are_those_of_mmaction2() -> None:
    with torch.device("meta"):
        state = slowfast_50().build().state_dict()
    shapes = {
        "slow_path.conv1.conv.weight": (64, 3, 1, 7, 7),
        "slow_path.conv1.bn.running_mean": (64,),
        "slow_path.conv1_lateral.conv.weight": (16, 8, 7, 1, 1),
        "slow_path.layer1_lateral.conv.weight": (64, 32, 7, 1, 1),
        "slow_path.layer3_lateral.conv.weight": (256, 128, 7, 1, 1),
        "slow_path.layer1.0.conv1.conv.weight": (64, 80, 1, 1, 1),
        "slow_path.layer1.0.downsample.conv.weight": (256, 80, 1, 1, 1),
        "slow_path.layer1.0.downsample.bn.running_var": (256,),
        "slow_path.layer3.5.conv1.conv.weight": (256, 1024, 3, 1, 1),
        "slow_path.layer4.2.conv3.bn.num_batches_tracked": (),
        "fast_path.conv1.conv.weight": (8, 3, 5, 7, 7),
        "fast_path.layer2.0.conv1.conv.weight": (16, 32, 3, 1, 1),
        "fast_path.layer4.2.conv2.conv.weight": (64, 64, 1, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert not {name for name in state if name.endswith("conv.bias")}
    # 53 convolutions a pathway as in ResNet-50 (without the classifier), and the laterals
    assert sum(name.endswith("conv.weight") for name in state) == 2 * 53 + 4


# Reversible stages


def block_of(backbone: SlowFastBackbone, name: str) -> Bottleneck:
    block = backbone.get_submodule(name)
    assert isinstance(block, Bottleneck)
    return block


@pytest.mark.parametrize("name", ["slow_path.layer1.1", "slow_path.layer4.1", "fast_path.layer2.2"])
def test_the_relu_moves_into_the_branch(name: str) -> None:
    backbone = seeded(TINY)
    block = block_of(backbone, name)
    x = torch.randn(2, block.conv1.conv.in_channels, 4, 5, 6)
    kept = x.clone()
    (branch,) = split(block)
    check_complete(block, [branch])
    f = residual(backbone.state_dict(), name, x)
    torch.testing.assert_close(branch(x), f)
    assert branch.activation is not None
    torch.testing.assert_close(branch.activation(f), f.relu())
    torch.testing.assert_close(block(x), (x + f).relu())
    assert torch.equal(x, kept)


def test_a_branch_is_the_same_sample_by_sample() -> None:
    block = block_of(seeded(TINY), "slow_path.layer2.1")
    x = torch.randn(3, block.conv1.conv.in_channels, 2, 4, 4)
    (branch,) = branches(block)
    assert branch.cut is not None
    layout = branch.cut(x)
    pieces = spans(layout, 1)
    assert pieces == [(0, 1), (1, 2), (2, 3)]
    out = layout.new(x, x.shape)
    for start, stop in pieces:
        layout.put(
            out, start, stop, layout.run(branch, layout.take(x, start, stop), start, stop, ())
        )
    torch.testing.assert_close(out, branch(x))


def test_a_branch_keeps_no_more_alive_than_it_says() -> None:
    block = block_of(seeded(TINY), "slow_path.layer4.1")
    x = torch.randn(2, block.conv1.conv.in_channels, 2, 4, 4, requires_grad=True)
    (branch,) = branches(block)
    assert branch.cut is not None
    layout = branch.cut(x)
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in block.parameters()}

    def note(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = branch(x)
    # and two gradients of the size of the result
    needed = sum(kept.values()) + 2 * y.numel()
    assert 0.8 < layout.units * layout.elements / needed < 1.25


def test_the_first_block_of_a_stage_changes_the_shape() -> None:
    backbone = TINY.build()
    with pytest.raises(ChangesShapeError, match="turns 48 channels into 64, with stride 2"):
        branches(block_of(backbone, "slow_path.layer2.0"))
    with pytest.raises(ChangesShapeError, match="turns 2 channels into 8, with stride 1"):
        branches(block_of(backbone, "fast_path.layer1.0"))


def test_stems_and_laterals_are_recomputed_and_blocks_are_not() -> None:
    backbone = TINY.build()
    for name in ("slow_path.conv1", "fast_path.conv1", "slow_path.layer2_lateral"):
        assert recomputed(backbone.get_submodule(name))
    for name in ("slow_path", "slow_path.layer1", "slow_path.layer1.1", "slow_path.layer1.1.conv1"):
        assert not recomputed(backbone.get_submodule(name))


def test_each_pathways_stage_becomes_reversible() -> None:
    backbone = slowfast_toy().build()
    before = list(backbone.state_dict())
    report = rewire(backbone)
    found = {stage.container: (stage.blocks, stage.branches) for stage in report.stages}
    layers = [f"{p}.layer{i}" for p in ("slow_path", "fast_path") for i in (1, 2)]
    assert found == dict.fromkeys(layers, (("1", "2"), 2))
    assert [name for name, _ in reversible_stages(backbone)] == layers
    assert list(backbone.state_dict()) == before
    left = {row.name: row.recomputed for row in report.left_out}
    stems = ["slow_path.conv1", "fast_path.conv1"]
    laterals = ["slow_path.conv1_lateral", "slow_path.layer1_lateral"]
    assert left == dict.fromkeys([*stems, *laterals, *(f"{n}.0" for n in layers)], True)


def test_all_blocks_but_the_first_of_a_stage_are_reversible_in_slowfast_50() -> None:
    with torch.device("meta"):
        backbone = slowfast_50().build()
    assert sum(stage.branches for stage in rewire(backbone).stages) == 2 * (16 - 4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("slice_bytes", [1, 2**26])
def test_gradients_are_those_of_stored_activations(frozen: bool, slice_bytes: int) -> None:
    # with frozen statistics as OpenTAD's, whose ReLU comes before the sum
    config = replace(slowfast_toy(), frozen_statistics=frozen, relu_before_sum=frozen)
    video = torch.randn(2, 3, 8, 32, 32)
    found = []
    for reversible in (True, False):
        backbone = seeded(config)
        rewire(backbone, slice_bytes=slice_bytes)
        set_reversible(backbone, reversible)
        features = backbone(video)
        features.square().sum().backward()
        grads = {name: p.grad for name, p in backbone.named_parameters()}
        found.append((features.detach(), grads, dict(backbone.named_buffers())))
    (features, grads, buffers), (stored, wanted, statistics) = found
    torch.testing.assert_close(features, stored, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        assert grad is not None
        assert wanted[name] is not None
        assert grad.any(), name
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-5)
    for name, value in buffers.items():
        torch.testing.assert_close(value, statistics[name], rtol=1e-5, atol=1e-5)


def test_a_rewired_stage_is_the_papers_two_streams() -> None:
    backbone = seeded(TINY).eval()
    state = backbone.state_dict()
    name = "slow_path.layer2"
    x = torch.randn(1, 48, 2, 6, 6)
    rewire(backbone, exact=False)
    with torch.inference_mode():
        found = backbone.get_submodule(name)(x)
        skip = conv_norm(state, f"{name}.0.downsample", x, (1, 2, 2))
        before = last = (skip + residual(state, f"{name}.0", x, 2)).relu()
        for block in (1, 2):
            before, last = last, before + residual(state, f"{name}.{block}", last).relu()
    torch.testing.assert_close(found, (before + last) / 2, rtol=1e-4, atol=1e-4)


def test_unwiring_gives_the_pretrained_network_back() -> None:
    backbone = seeded(TINY).eval()
    video = torch.randn(1, 3, 8, 32, 32)
    with torch.inference_mode():
        plain = backbone(video)
        rewire(backbone)
        assert not torch.allclose(backbone(video), plain)
        unwire(backbone)
        assert torch.equal(backbone(video), plain)
