"""Backbones of timm's and torchvision's classes, against their plain models in slow loops."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.video import mvit, resnet

from re2tal.backbones.frames import FramesConfig
from re2tal.backbones.mvit import MViTConfig
from re2tal.backbones.table import Entry, backbones
from re2tal.backbones.video_resnet import VideoResNetConfig
from re2tal.backbones.weights import HUB, PREFIX, load_backbone_weights
from re2tal.errors import UserError
from re2tal.localizers import Targets
from re2tal.reversible import rewire, set_reversible
from re2tal.reversible.branches import NoFamilyError, load_families, split
from re2tal.trained import DetectorSpec, load_detector, save_detector
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import WindowConfig
from re2tal.weights import WeightsMismatchError
from tests.localizers.small import ACTIONFORMER
from tests.reversible.toy_blocks import assert_same_step, one_step
from tests.reversible.zoo import Precision, both_precisions, scrambled


def seeded(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return scrambled(make()).eval()


# timm, a frame at a time

_TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def of_timm(name: str, **options: Any) -> Any:
    import timm

    shape = _TIMM | {"mlp_ratio": 2.0, "dynamic_img_size": True, "num_classes": 0} | options
    return seeded(lambda: timm.create_model(name, **shape))


def frame_by_frame(
    model: Any, sample: Tensor, *, pool: str = "mean", every: int = 1, stride: int = 1
) -> Tensor:
    features = []
    for first in range(0, sample.shape[1], stride):
        frames = range(first + every // 2, first + stride, every)
        of_frames = []
        for frame in frames:
            tokens = model.forward_features(sample[None, :, frame])
            if pool == "class":
                of_frames.append(tokens[0, 0])
            elif pool == "head":  # timm's own way
                of_frames.append(model.forward_head(tokens, pre_logits=True)[0])
            else:
                places = tokens[0, model.num_prefix_tokens :]
                of_frames.append(sum(place for place in places) / len(places))
        features.append(sum(of_frames) / len(of_frames))
    return torch.stack(features, dim=1)


# torchvision, a clip or a window at a time


def of_mvit(version: int) -> Any:
    def block(channels: tuple[int, int], heads: int, queries: int | None, keys: int) -> Any:
        return mvit.MSBlockConfig(
            num_heads=heads,
            input_channels=channels[0],
            output_channels=channels[1],
            kernel_q=[] if queries is None else [3, 3, 3],
            kernel_kv=[3, 3, 3],
            stride_q=[] if queries is None else [1, queries, queries],
            stride_kv=[1, keys, keys],
        )

    second = version == 2
    blocks = [block((8, 8), 1, 1, 2)] * 2 + [block((8, 16), 2, 2, 1), block((16, 16), 2, 1, 1)]
    if not second:
        blocks = [
            block((8, 8), 1, None, 2),
            block((8, 16), 1, None, 2),
            block((16, 16), 2, 2, 1),
            block((16, 16), 2, None, 1),
        ]
    return seeded(
        lambda: mvit.MViT(
            spatial_size=(16, 16),
            temporal_size=4,
            block_setting=blocks,
            residual_pool=second,
            residual_with_cls_embed=False,
            rel_pos_embed=second,
            proj_after_attn=second,
            num_classes=3,
        )
    )


def clip_by_clip(model: Any, sample: Tensor) -> Tensor:
    features: list[Any] = []
    seen: list[Tensor] = []
    with model.norm.register_forward_hook(lambda _, __, tokens: seen.append(tokens)):
        for start in range(0, sample.shape[1], 4):
            model(sample[None, :, start : start + 4])
            first, second = seen.pop()[0, 1:].chunk(2)
            features += [sum(places) / len(places) for places in (first, second)]
    return torch.stack(features, dim=1)


class Unstrided(resnet.Conv3DSimple):
    """R3D's convolution without a temporal stride, by torchvision's own means."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stride: Any = (1, *self.stride[1:])

    @staticmethod
    def get_downsample_stride(stride: int) -> tuple[int, int, int]:
        return 1, stride, stride


def of_resnet(*convolutions: Any, stem: Any = resnet.BasicStem) -> Any:
    return seeded(
        lambda: resnet.VideoResNet(
            resnet.BasicBlock, convolutions, [2, 1, 1, 1], stem, num_classes=3
        )
    )


def whole_window(model: Any, sample: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with model.layer4.register_forward_hook(lambda _, __, places: seen.append(places)):
        model(sample[None])
    found: Tensor = seen[0][0].mean(dim=(2, 3))
    return found


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny backbone, the library's model, and a slow way to the features of one window."""

    config: Any
    plain: Callable[[], Any]
    slow: Callable[[Any, Tensor], Tensor] = frame_by_frame
    classifier: str = "head."


FRAMES = FramesConfig(
    patch=4, channels=16, depths=(2,), heads=2, mlp_ratio=2.0, trained_size=16, drop_path=0.1
)
MVIT = MViTConfig(
    channels=8, heads=1, depths=(2, 2), clip=4, trained_clip=4, trained_size=16, drop_path=0.1
)
RESNET = VideoResNetConfig(kind="r3d", depths=(2, 1, 1, 1))
SIMPLE = resnet.Conv3DSimple

CASES = {
    "dinov2": Case(config=FRAMES, plain=partial(of_timm, "vit_small_patch14_dinov2")),
    "dinov2_class": Case(
        config=replace(FRAMES, pool="class"),
        plain=partial(of_timm, "vit_small_patch14_dinov2"),
        slow=partial(frame_by_frame, pool="class"),
    ),
    "dinov2_registers_every_third": Case(
        config=replace(FRAMES, registers=4, every=3, pooling=2),
        plain=partial(of_timm, "vit_small_patch14_reg4_dinov2"),
        slow=partial(frame_by_frame, every=3, stride=6),
    ),
    "dinov3": Case(
        config=replace(FRAMES, family="dinov3", registers=4),
        plain=partial(of_timm, "vit_small_patch16_dinov3"),
    ),
    "eva02": Case(
        config=replace(FRAMES, family="eva02", pooling=2),
        plain=partial(of_timm, "eva02_base_patch14_224"),
        slow=partial(frame_by_frame, pool="head", stride=2),
    ),
    "siglip": Case(
        config=replace(FRAMES, family="siglip"),
        plain=partial(of_timm, "vit_base_patch16_siglip_224"),
    ),
    "siglip_attention": Case(
        config=replace(FRAMES, family="siglip", pool="attention"),
        plain=partial(of_timm, "vit_base_patch16_siglip_224"),
        slow=partial(frame_by_frame, pool="head"),
    ),
    "clip": Case(
        config=replace(FRAMES, family="clip"),
        plain=partial(of_timm, "vit_base_patch16_clip_quickgelu_224", num_classes=3),
    ),
    "mvit_v1": Case(config=replace(MVIT, version=1), plain=partial(of_mvit, 1), slow=clip_by_clip),
    "mvit_v2": Case(config=MVIT, plain=partial(of_mvit, 2), slow=clip_by_clip),
    "r3d": Case(
        config=RESNET, plain=partial(of_resnet, *[SIMPLE] * 4), slow=whole_window, classifier="fc."
    ),
    "r3d_stride_2": Case(
        config=RESNET.with_stride(2),
        plain=partial(of_resnet, SIMPLE, SIMPLE, Unstrided, Unstrided),
        slow=whole_window,
        classifier="fc.",
    ),
    "mc3": Case(
        config=replace(RESNET, kind="mc3", strides=(1, 1, 1)),
        plain=partial(of_resnet, SIMPLE, *[resnet.Conv3DNoTemporal] * 3),
        slow=whole_window,
        classifier="fc.",
    ),
    "r2plus1d": Case(
        config=replace(RESNET, kind="r2plus1d"),
        plain=partial(of_resnet, *[resnet.Conv2Plus1D] * 4, stem=resnet.R2Plus1dStem),
        slow=whole_window,
        classifier="fc.",
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def cases_but(*names: str) -> pytest.MarkDecorator:
    """All cases but some that others stand for, where a test takes longer."""
    chosen = {name: case for name, case in CASES.items() if name not in names}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


def windows(backbone: Any, size: tuple[int, int] = (16, 16)) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 2 * backbone.multiple, *size)


@every_case
def test_a_window_is_a_loop_over_the_librarys_model(case: Case, tmp_path: Path) -> None:
    model, backbone = case.plain(), case.config.build().eval()
    state = model.state_dict()
    save_file(state, tmp_path / "theirs.safetensors")
    report = load_backbone_weights(backbone, tmp_path / "theirs.safetensors")
    assert not report.kept
    assert len(report.placed) + len(report.left_out) == len(state)
    unused = {n for n in report.left_out if not n.startswith(case.classifier)}
    pooled = "attn_pool." if case is CASES["siglip"] else None
    assert unused == {n for n in state if pooled and n.startswith(pooled)}
    video = windows(backbone)
    with torch.no_grad():
        found = backbone(video)
        wanted = torch.stack([case.slow(model, sample) for sample in video])
    assert found.shape == (2, backbone.channels, video.shape[2] // backbone.temporal_stride)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers_every_third", "dinov3", "eva02"])
def test_frames_of_another_size_are_timms(name: str) -> None:
    case = CASES[name]
    model, backbone = case.plain(), case.config.build().eval()
    state = {n.replace("fc_norm", "norm"): value for n, value in model.state_dict().items()}
    backbone.load_state_dict(state)
    sample = windows(backbone, (24, 12))[0]
    with torch.no_grad():
        torch.testing.assert_close(backbone(sample[None])[0], case.slow(model, sample))


@pytest.mark.parametrize("version", [1, 2])
def test_clips_of_another_size_and_length_have_resized_positions(version: Any) -> None:
    """Against a model of that size, whose positions are the resized ones."""
    small = replace(MVIT, version=version)
    config = replace(small, clip=8)
    backbone = config.build()
    scrambled(backbone)
    state = backbone.state_dict()
    other = replace(config, trained_clip=8, trained_size=24).build().eval()

    def resized(value: Tensor, shape: torch.Size) -> Tensor:
        if value.shape == shape:
            return value
        if len(value) == 16:  # 4 x 4 places
            image = value.T.view(1, -1, 4, 4)
            return nn.functional.interpolate(image, (6, 6), mode="bicubic").flatten(2)[0].T
        line = value.T[None]
        return nn.functional.interpolate(line, len(torch.empty(shape)), mode="linear")[0].T

    wanted = {name: resized(state[name], value.shape) for name, value in other.state_dict().items()}
    changed = [name for name, value in wanted.items() if value is not state[name]]
    assert all("rel_pos" in name or "_pos" in name for name in changed)
    assert len(changed) >= 2
    other.load_state_dict(wanted)
    video = torch.randn(1, 3, 16, 24, 24)
    with torch.no_grad():
        found = backbone.eval()(video)
        torch.testing.assert_close(found, other(video), rtol=1e-4, atol=1e-4)


def blocks_are_known(backbone: nn.Module) -> bool:
    block = next(m for name, m in backbone.named_modules() if name in ("blocks.0", "layer1.0"))
    load_families(type(block))
    try:
        return bool(split(block))
    except NoFamilyError:
        return False


@both_precisions
@cases_but("r3d_stride_2", "mc3", "dinov2_class", "siglip")
def test_gradients_of_the_rewired_are_the_stored_to_the_bit(case: Case, bf16: bool) -> None:
    torch.manual_seed(0)
    backbone = scrambled(case.config.build())
    if not blocks_are_known(backbone):
        with pytest.raises(ValueError, match="Register a family for its blocks"):
            rewire(backbone)
        return
    report = rewire(backbone, slice_bytes=2**14)
    stems = {"patch_embed", "conv_proj", "stem"}
    assert stems & {left.name for left in report.left_out if left.recomputed}
    model, video = Precision(backbone, bf16=bf16), windows(backbone)
    set_reversible(backbone, False)
    stored = one_step(model, video)
    set_reversible(backbone, True)
    assert_same_step(one_step(model, video), stored)
    assert [n for n, g in stored.gradients.items() if g is None] == ["input 0"]


@cases_but("r3d", "mc3", "dinov2_class", "siglip")
def test_a_detector_takes_a_training_step_and_is_read_again(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    known = blocks_are_known(case.config.build())
    stride = case.config.build().temporal_stride
    spec = DetectorSpec(
        classes=("a", "b"),
        backbone=case.config,
        localizer=ACTIONFORMER,
        reversible=known,
        size=16,
        window=WindowConfig(frames=16 * stride, fps=10.0),
    )
    detector = spec.build()
    frames = torch.randint(0, 256, (1, 16 * stride, 16, 16, 3), dtype=torch.uint8)
    mask = torch.arange(16 * stride)[None] < 11 * stride + 1  # one frame of the twelfth feature
    grid = TimeGrid(fps=10.0, stride=stride, length=16 * stride)
    segment = torch.tensor([[2.0, 7.5]])
    assert grid.to_seconds(float(segment[0, 0])) == pytest.approx(2.5 * stride / 10)
    assert detector.feature_mask(mask).sum() == 12
    losses = detector(frames, mask, [Targets(segments=segment, labels=torch.tensor([1]))])
    sum(losses.values()).backward()
    lacking = [n for n, p in detector.backbone.named_parameters() if p.grad is None]
    assert not lacking
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad)
    save_detector(tmp_path, spec, detector)
    again, loaded = load_detector(tmp_path)
    assert again == spec
    wanted, found = detector.eval()(frames, mask)[0], loaded(frames, mask)[0]
    assert torch.equal(found.scores, wanted.scores)
    assert torch.equal(found.segments, wanted.segments)


@pytest.mark.parametrize(
    ("config", "seen"),
    [(FRAMES, [True] * 6), (replace(FRAMES, every=3, pooling=2), [False, True, False] * 2)],
)
def test_a_frame_changes_its_own_feature_alone(config: FramesConfig, seen: list[bool]) -> None:
    torch.manual_seed(0)
    backbone: Any = scrambled(config.build()).eval()
    video = torch.randn(1, 3, 12, 16, 16)
    with torch.no_grad():
        before: Tensor = backbone(video)
        for frame in range(12):
            other = video.clone()
            other[:, :, frame] += 1
            changed = (backbone(other) != before).any(dim=1)[0]
            wanted = [frame // backbone.temporal_stride] if seen[frame % 6] else []
            assert changed.nonzero().flatten().tolist() == wanted


@every_case
def test_layers_are_counted_from_the_stem(case: Case) -> None:
    with torch.device("meta"):
        backbone = case.config.build()
    blocks = sum(case.config.depths)
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert set(layers.values()) == {*range(blocks + 1)}
    first = ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre", "conv_proj", "stem")
    for name, layer in layers.items():
        if name.startswith((*first, "pos_encoding")):
            assert layer == 0
        elif name.startswith("blocks."):
            assert layer == int(name.split(".")[1]) + 1
        elif name.startswith(("norm.", "attn_pool.", "layer4.")):
            assert layer == blocks


@pytest.mark.parametrize(
    ("name", "strides", "multiples"),
    [
        ("dinov2", (1, 5), (1, 5)),
        ("mvit_v2", (2, 4, 6), (4, 4, 12)),
        ("r3d", (1, 2, 4, 8, 24), (1, 2, 4, 8, 24)),
        ("mc3", (1, 3), (1, 3)),
    ],
)
def test_strides_and_windows(
    name: str, strides: tuple[int, ...], multiples: tuple[int, ...]
) -> None:
    for stride, multiple in zip(strides, multiples, strict=True):
        with torch.device("meta"):
            backbone = CASES[name].config.with_stride(stride).build()
            assert (backbone.temporal_stride, backbone.multiple) == (stride, multiple)
            video = torch.empty(1, 3, 2 * multiple, 16, 16)
            assert backbone(video).shape[2] == 2 * multiple // stride
            if multiple > 1:
                with pytest.raises(UserError, match=f"multiple of {multiple} frames"):
                    backbone(video[:, :, 1:])


@pytest.mark.parametrize(
    ("config", "stride", "message"),
    [
        (FRAMES, 0, "multiple of 1"),
        (replace(FRAMES, every=3), 4, "multiple of 3"),
        (MVIT, 3, "multiple of 2"),
        (RESNET, 12, "1, 2, 4 or a multiple of 8"),
    ],
)
def test_strides_that_cannot_be_are_refused(config: Any, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.with_stride(stride)


@pytest.mark.parametrize("name", ["dinov2", "mvit_v2"])
def test_sizes_that_cannot_be_cut_into_patches_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"16 x 14 pixels cannot be cut into patches of 4"):
        CASES[name].config.build()(torch.zeros(1, 3, 4, 16, 14))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (FRAMES, {"depths": (2, 2)}, "one stage of blocks"),
        (FRAMES, {"heads": 3}, "channels must be a multiple of the 3 heads"),
        (FRAMES, {"family": "dinov3", "heads": 8}, "multiple of four times the 8 heads"),
        (FRAMES, {"trained_size": 18}, "trained_size must be a multiple of the 4"),
        (FRAMES, {"pool": "attention"}, "mean or class for DINOv2, but is 'attention'"),
        (FRAMES, {"family": "siglip", "pool": "class"}, "mean or attention for SigLIP"),
        (FRAMES, {"patch": 1, "trained_size": 4096, "channels": 1024}, "are too many"),
        (MVIT, {"depths": (1,)}, "at least two blocks"),
        (MVIT, {"heads": 3}, "channels must be a multiple of the 3 heads"),
        (MVIT, {"clip": 5}, "clip must be a multiple of the 2 frames"),
        (MVIT, {"trained_size": 20}, "trained_size must be a multiple of the 8 pixels"),
        (RESNET, {"strides": (2, 2, 3)}, "strides must be 1 to 2"),
        (RESNET, {"kind": "mc3"}, "strides must be 1 1 1"),
    ],
)
def test_impossible_shapes_are_refused(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **fields)


# Weights


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    save_file({n: v.contiguous().clone() for n, v in state.items()}, folder / "theirs.safetensors")
    return folder / "theirs.safetensors"


def test_the_image_encoder_of_an_open_clip_model_is_taken(tmp_path: Path) -> None:
    case = CASES["siglip_attention"]
    state = case.plain().state_dict()
    both = {f"visual.trunk.{name}": value for name, value in state.items()}
    backbone = case.config.build()
    path = saved(both | {"text.token_embedding.weight": torch.zeros(2)}, tmp_path)
    report = load_backbone_weights(backbone, path)
    assert report.layout == "image transformer of timm"
    assert report.left_out == {"text.token_embedding.weight": "not of the backbone"}
    assert all(torch.equal(v, state[n]) for n, v in backbone.state_dict().items())


def test_the_mask_of_the_pretraining_is_left_out(tmp_path: Path) -> None:
    """As in files of DINOv2's authors, whose other names are timm's."""
    state = CASES["dinov2"].plain().state_dict() | {"mask_token": torch.zeros(1, 16)}
    backbone = FRAMES.build()
    report = load_backbone_weights(backbone, saved(state, tmp_path))
    assert report.left_out == {"mask_token": "not used by this backbone"}


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_norms_have_one_name_whichever_way_of_pooling(pool: Any, tmp_path: Path) -> None:
    state = CASES["eva02"].plain().state_dict()
    assert "fc_norm.weight" in state
    backbone = replace(CASES["eva02"].config, pool=pool).build()
    load_backbone_weights(backbone, saved(state, tmp_path))
    assert torch.equal(backbone.get_parameter("norm.weight"), state["fc_norm.weight"])


@pytest.mark.parametrize(
    ("of", "into", "problem"),
    [
        ("dinov2", replace(FRAMES, registers=4), "reg_token is missing"),
        ("dinov2", replace(FRAMES, depths=(1,)), "blocks.1.attn.proj.bias is unknown"),
        ("dinov2", replace(FRAMES, depths=(3,)), "blocks.2.attn.proj.bias is missing"),
        ("dinov2", replace(FRAMES, trained_size=24), "images of 16 pixels: set trained_size=16"),
        (
            "dinov2_registers_every_third",
            replace(FRAMES, registers=4, trained_size=24),
            "16 pixels",
        ),
        ("dinov3", replace(FRAMES, family="eva02"), "recognised as: image transformer of timm"),
        ("siglip", replace(FRAMES, family="siglip", channels=32), r"instead of \(32,\)"),
        ("mvit_v1", MVIT, "pos_encoding.spatial_pos is unknown"),
        ("mvit_v2", replace(MVIT, trained_size=24), "rel_pos_h has shape"),
        ("mc3", RESNET, "layer4.0.conv1.0.weight has shape|layer2.0.conv1.0.weight has shape"),
        ("dinov2", MVIT, "recognised as: image transformer of timm"),
        ("mvit_v2", FRAMES, "conv_proj.weight is unknown"),
    ],
)
def test_weights_of_another_network_are_refused(
    of: str, into: Any, problem: str, tmp_path: Path
) -> None:
    backbone = into.build()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(WeightsMismatchError) as caught:
        load_backbone_weights(backbone, saved(CASES[of].plain().state_dict(), tmp_path))
    assert re.search(problem, "\n".join([str(caught.value), *caught.value.problems]))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


# Full sizes

ENTRIES = {
    name: entry
    for name, entry in backbones().items()
    if isinstance(entry.make(), FramesConfig | MViTConfig | VideoResNetConfig)
}


def published(weights: str) -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    """The library's model of some weights, and the colours of their training."""
    if weights.startswith(PREFIX):
        name, _, which = weights.removeprefix(PREFIX).partition("/")
        frames = get_model_weights(name)[which].transforms()
        return get_model(name), tuple(frames.mean), tuple(frames.std)
    import timm

    name = weights.removeprefix(f"{HUB}timm/")
    config: Any = timm.get_pretrained_cfg(name)
    assert config.hf_hub_id == f"timm/{name}"
    architecture = name.partition(".")[0]
    if name.endswith(".openai"):  # trained with another GELU, which this name stands for
        architecture = architecture.replace("clip", "clip_quickgelu")
    size = config.input_size[1]
    return of_architecture(architecture, config.num_classes, size), config.mean, config.std


@cache
def of_architecture(name: str, classes: int, size: int) -> Any:
    import timm

    return timm.create_model(name, num_classes=classes, img_size=size)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
def test_full_sizes_and_colours_are_the_librarys(entry: Entry) -> None:
    config: Any = entry.make()
    if entry.name.startswith("siglip"):
        config = replace(config, pool="attention")
    for weights in entry.weights:
        with torch.device("meta"):
            model, mean, std = published(weights)
            backbone = config.build()
        assert (entry.mean, entry.std) == (mean, std)
        shapes = {
            name.replace("fc_norm", "norm"): value.shape
            for name, value in model.state_dict().items()
            if not re.match(r"(head|fc)\.", name)
        }
        assert {name: value.shape for name, value in backbone.state_dict().items()} == shapes
        ours = dict(backbone.named_modules())
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv3d | nn.LayerNorm) and not name.startswith("fc_norm"):
                assert getattr(ours[name], "stride", None) == getattr(module, "stride", None)
                assert getattr(ours[name], "eps", None) == getattr(module, "eps", None)
            if hasattr(module, "num_heads"):
                assert ours[name].num_heads == module.num_heads


def test_without_timm_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == "timm":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"DINOv2 is built from the library timm, .*\[backbones\]"):
        FRAMES.build()
