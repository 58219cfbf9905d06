"""Models of clips on long windows, against transformers' plain model in a loop over the clips."""

import json
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from re2tal.backbones.__main__ import main
from re2tal.backbones.clips import ClipBackbone
from re2tal.backbones.frames import FramesConfig
from re2tal.backbones.mvit import MViTConfig
from re2tal.backbones.table import entry_of
from re2tal.backbones.videomae import (
    VideoMAEConfig,
    videomae_b,
    videomae_h,
    videomae_l,
    videomae_s,
    videomae_v2_g,
)
from re2tal.backbones.weights import load_backbone_weights, save_backbone_weights
from re2tal.errors import UserError
from re2tal.json_files import FileError
from re2tal.reversible import rebuildable, rewire, set_reversible
from re2tal.trained import SPEC_FILE, DetectorSpec, load_detector, save_detector
from re2tal.videos.windows import WindowConfig
from re2tal.weights import WeightsMismatchError
from tests.localizers.small import ACTIONFORMER
from tests.reversible.toy_blocks import assert_same_step, one_step
from tests.reversible.zoo import Precision, both_precisions, scrambled

TINY = VideoMAEConfig(
    patch=4,
    channels=16,
    depths=(2,),
    heads=2,
    mlp_ratio=2.0,
    clip=4,
    trained_clip=4,
    trained_size=16,
)


def theirs(config: VideoMAEConfig, kind: str = "VideoMAEModel") -> Any:
    import transformers

    torch.manual_seed(0)
    kinds: Any = transformers
    shape = kinds.VideoMAEConfig(
        image_size=config.trained_size,
        patch_size=config.patch,
        num_frames=config.clip,
        tubelet_size=config.tubelet,
        hidden_size=config.channels,
        num_hidden_layers=config.depths[0],
        num_attention_heads=config.heads,
        intermediate_size=int(config.channels * config.mlp_ratio),
        use_mean_pooling=not config.norm,
        qv_bias=config.qkv_bias,
        decoder_num_attention_heads=2,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=8,
        num_labels=3,
    )
    return scrambled(getattr(kinds, kind)(shape)).eval()


def clip_by_clip(model: Any, video: Tensor, config: VideoMAEConfig) -> Tensor:
    """Features of a window, a clip and a token's frames at a time, averaged by hand."""
    places = (config.trained_size // config.patch) ** 2
    rows = []
    for sample in video:
        features: list[Any] = []
        for start in range(0, sample.shape[1], config.clip):
            clip = sample[:, start : start + config.clip].transpose(0, 1)
            tokens = model(clip[None]).last_hidden_state[0]
            features += [
                sum(tokens[first : first + places]) / places
                for first in range(0, len(tokens), places)
            ]
        rows.append(torch.stack(features, dim=1))
    return torch.stack(rows)


@pytest.fixture
def video() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 12, 16, 16)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, norm=True),
        replace(TINY, qkv_bias=False),
        replace(TINY, clip=6, trained_clip=6, tubelet=1),
    ],
    ids=["finetuned", "pretrained", "no_bias", "other_clips"],
)
def test_a_window_is_a_loop_over_its_clips(
    config: VideoMAEConfig, video: Tensor, tmp_path: Path
) -> None:
    model = theirs(config)
    model.save_pretrained(tmp_path)
    built = config.build().eval()
    report = load_backbone_weights(built, tmp_path)
    assert not report.left_out
    assert not report.kept
    assert [*built.state_dict()] == [*model.state_dict()]
    with torch.no_grad():
        found, wanted = built(video), clip_by_clip(model, video, config)
    assert found.shape == (2, 16, 12 // config.tubelet)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_neighbouring_features_are_averaged(video: Tensor) -> None:
    torch.manual_seed(0)
    plain, slower = TINY.build(), TINY.with_stride(6).build()
    slower.load_state_dict(plain.state_dict())
    assert (slower.temporal_stride, slower.multiple) == (6, 12)
    wanted = plain(video).unflatten(2, (2, 3)).mean(dim=3)
    torch.testing.assert_close(slower(video), wanted)
    with pytest.raises(ValueError, match="multiple of 2, the frames"):
        TINY.with_stride(3)


def test_features_of_each_frame_are_interpolated_over_the_window(video: Tensor) -> None:
    """AdaTAD's rate on THUMOS-14; a frame lies a quarter of a token from the token's middle."""
    torch.manual_seed(0)
    plain, faster = TINY.build().eval(), TINY.with_stride(1).build().eval()
    faster.load_state_dict(plain.state_dict())
    assert (faster.temporal_stride, faster.multiple) == (1, 4)
    with torch.no_grad():
        tokens, found = plain(video), faster(video)
    assert found.shape == (2, 16, 12)
    torch.testing.assert_close(found[..., 0], tokens[..., 0])
    torch.testing.assert_close(found[..., 11], tokens[..., 5])
    for frame in range(1, 11):
        near, far = frame // 2, frame // 2 + (1 if frame % 2 else -1)
        wanted = 0.75 * tokens[..., near] + 0.25 * tokens[..., far]
        torch.testing.assert_close(found[..., frame], wanted)
    with pytest.raises(ValueError, match="4 features cannot be made of every 2 frames"):
        replace(TINY, interpolation=4).build()


def test_places_are_the_tokens_of_each_clip_in_order(video: Tensor) -> None:
    built: Any = scrambled(TINY.build()).eval()
    with torch.no_grad():
        places, features = built.places(video), built(video)
        parts = [built.places(video[:, :, t : t + 4]) for t in range(0, 12, 4)]
    assert places.shape == (2, 6, 16, 16)
    torch.testing.assert_close(places, torch.cat(parts, dim=1))
    torch.testing.assert_close(places.mean(dim=2).transpose(1, 2), features)


def test_windows_and_clips_do_not_mix(video: Tensor) -> None:
    torch.manual_seed(0)
    built = scrambled(TINY.build()).eval()
    other = video.clone()
    other[1, :, 4:8] += 1
    with torch.no_grad():
        before, after = built(video), built(other)
        alone = built(video[:1])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :, :2], after[1, :, :2])
    assert torch.equal(before[1, :, 4:], after[1, :, 4:])
    assert not torch.isclose(before[1, :, 2:4], after[1, :, 2:4]).any(dim=0).all()
    torch.testing.assert_close(alone, before[:1])


@both_precisions
def test_gradients_of_the_rewired_are_the_stored_to_the_bit(video: Tensor, bf16: bool) -> None:
    torch.manual_seed(0)
    built = scrambled(replace(TINY, norm=True, dropout=0.1).build())
    report = rewire(built, slice_bytes=2**14)
    assert [stage.blocks for stage in report.stages] == [("0", "1")]
    assert "embeddings" in {left.name for left in report.left_out if left.recomputed}
    model = Precision(built, bf16=bf16)
    set_reversible(built, False)
    stored = one_step(model, video)
    set_reversible(built, True)
    assert_same_step(one_step(model, video), stored)
    unused = [n for n, g in stored.gradients.items() if g is None or not g.any()]
    assert unused == ["input 0"]


class Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(
    ("config", "recompute"),
    [
        (TINY, True),
        (TINY, False),
        (FramesConfig(patch=4, channels=16, depths=(2,), heads=2, trained_size=16), True),
        (MViTConfig(channels=8, depths=(2,), clip=4, trained_size=16), True),
    ],
)
def test_a_rewired_backbone_keeps_no_frames_that_can_be_rebuilt(
    config: Any, video: Tensor, recompute: bool
) -> None:
    built = config.build()
    rewire(built, recompute=recompute)
    seen: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        seen.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        features = built(rebuildable(video.clone(), video.clone))
    alive = [kept.tensor.numel() for ref in seen if (kept := ref()) is not None]
    assert (video.numel() in alive) is not recompute
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in built.parameters())


# Positions


def test_positions_are_the_librarys() -> None:
    config = replace(TINY, channels=24, clip=16, trained_clip=16, trained_size=32)
    positions = config.build().get_buffer("embeddings.positions")
    table = theirs(config).embeddings.position_embeddings[0]
    torch.testing.assert_close(positions.flatten(0, 2), table, rtol=0, atol=1e-6)


def test_positions_are_resized_to_other_frames_and_clips() -> None:
    torch.manual_seed(0)
    built = replace(TINY, clip=8).build().eval()
    stem: Any = built.embeddings
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter.zero_()
        table = stem.positions.clone()
        found = stem(torch.zeros(1, 3, 8, 24, 16))
    assert found.shape == (1, 4, 6, 4, 16)
    # time 0, 1 -> 4 places at -0.25, 0.25, 0.75 and 1.25, no further than the ends
    images = table.movedim(-1, 1)
    wide = F.interpolate(images, size=(6, 4), mode="bicubic").movedim(1, -1)
    shares = torch.tensor([0, 0.25, 0.75, 1])
    wanted = torch.stack([(1 - s) * wide[0] + s * wide[1] for s in shares])
    torch.testing.assert_close(found[0], wanted)
    assert built(torch.zeros(1, 3, 16, 24, 16)).shape == (1, 16, 8)


def test_frames_that_do_not_fit_are_refused(video: Tensor) -> None:
    built = TINY.build()
    with pytest.raises(UserError, match=r"16 x 14 pixels cannot be cut into patches of 4"):
        built(video[..., :14])
    with pytest.raises(UserError, match="multiple of 4 frames for this backbone, but has 10"):
        built(video[:, :, :10])


# Weights


@pytest.mark.parametrize(
    ("kind", "norm", "others"),
    [
        ("VideoMAEForVideoClassification", False, {"classifier", "fc_norm"}),
        ("VideoMAEForPreTraining", True, {"decoder", "encoder_to_decoder", "mask_token"}),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_files_of_the_library_are_loaded_and_every_name_reported(
    kind: str, norm: bool, others: set[str], pickled: bool, tmp_path: Path
) -> None:
    config = replace(TINY, norm=norm)
    model = theirs(config, kind)
    state = model.state_dict()
    if pickled:  # as earlier versions of the library wrote it, biases included
        old = {
            name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): value
            for name, value in state.items()
        }
        assert old.keys() != state.keys()
        torch.save(old, tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path)
    built = config.build()
    report = load_backbone_weights(built, tmp_path)
    assert report.layout == "VideoMAE of transformers"
    assert {name.split(".")[0] for name in report.left_out} == others
    assert set(report.left_out.values()) == {"not of the backbone"}
    assert len(report.placed) + len(report.left_out) == len(state)
    for name, value in built.state_dict().items():
        assert torch.equal(value, state[f"videomae.{name}"]), name


def test_a_folder_of_several_files_is_put_together(tmp_path: Path) -> None:
    model = theirs(TINY)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    built = TINY.build()
    load_backbone_weights(built, tmp_path)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in built.state_dict().items())
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(WeightsMismatchError, match="is missing"):
        load_backbone_weights(built, tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor pytorch_model.bin"):
        load_backbone_weights(TINY.build(), tmp_path)


def changed(change: Callable[[dict[str, Tensor]], Any], folder: Path) -> Path:
    model = theirs(TINY)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda s: s.pop("encoder.layer.1.attention.output.dense.bias"),
            "encoder.layer.1.attention.output.dense.bias is missing",
        ),
        (lambda s: s.update(cls_token=torch.zeros(1)), "cls_token is unknown"),
        (
            lambda s: s.update({"encoder.layer.2.output.dense.bias": torch.zeros(16)}),
            "encoder.layer.2.output.dense.bias is unknown",
        ),
        (
            lambda s: s.update({"encoder.layer.0.output.dense.bias": torch.zeros(3)}),
            "encoder.layer.0.output.dense.bias has shape (3,) instead of (16,)",
        ),
    ],
)
def test_what_is_missing_or_too_much_is_named(
    change: Callable[[dict[str, Tensor]], Any], problem: str, tmp_path: Path
) -> None:
    path = changed(change, tmp_path)
    built = TINY.build()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with pytest.raises(WeightsMismatchError, match="recognised as: VideoMAE of tran") as caught:
        load_backbone_weights(built, path)
    assert caught.value.problems == (problem,)
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


@pytest.mark.parametrize("norm", [True, False])
def test_a_last_norm_that_the_weights_or_the_backbone_lack_is_explained(
    norm: bool, tmp_path: Path
) -> None:
    theirs(replace(TINY, norm=not norm)).save_pretrained(tmp_path)
    with pytest.raises(WeightsMismatchError, match=f"the last tokens: set norm={not norm} "):
        load_backbone_weights(replace(TINY, norm=norm).build(), tmp_path)


def test_our_own_file_fits_a_rewired_backbone_and_the_library(tmp_path: Path) -> None:
    torch.manual_seed(3)
    saved, loaded = TINY.build(), TINY.build()
    save_backbone_weights(saved, tmp_path / "w.safetensors", {})
    rewire(loaded)
    load_backbone_weights(loaded, tmp_path / "w.safetensors")
    theirs(TINY).load_state_dict(loaded.state_dict(), strict=True)
    assert all(torch.equal(v, loaded.state_dict()[n]) for n, v in saved.state_dict().items())


# The authors' and mmaction2's names, from their sources; the computation is written out here


AUTHORS = {"stem": "patch_embed.proj", "in": "mlp.fc1", "out": "mlp.fc2"}
MMACTION2 = {"stem": "patch_embed.projection", "in": "mlp.layers.0.0", "out": "mlp.layers.1"}


def published(names: dict[str, str], *, norm: bool = False) -> dict[str, Tensor]:
    width, hidden = TINY.channels, int(TINY.channels * TINY.mlp_ratio)
    layers = {
        "norm1": (width,),
        "norm2": (width,),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        names["in"]: (hidden, width),
        names["out"]: (width, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {names["stem"]: (width, 3, 2, 4, 4)}
    shapes |= {f"blocks.{n}.{layer}": shape for n in range(2) for layer, shape in layers.items()}
    shapes |= {"norm": (width,)} if norm else {"fc_norm": (width,), "head": (3, width)}
    torch.manual_seed(4)
    state = {}
    for layer, shape in shapes.items():
        state[f"{layer}.weight"] = torch.randn(shape) / 4
        if not layer.endswith("qkv"):
            state[f"{layer}.bias"] = torch.randn(shape[0]) / 4
    for block in range(2):
        state[f"blocks.{block}.attn.q_bias"] = torch.randn(width)
        state[f"blocks.{block}.attn.v_bias"] = torch.randn(width)
    return state


def sines(places: int, width: int) -> Tensor:
    angles = [[p / 10000 ** (2 * (c // 2) / width) for c in range(width)] for p in range(places)]
    return torch.tensor(
        [[math.cos(x) if c % 2 else math.sin(x) for c, x in enumerate(row)] for row in angles]
    )


def published_tokens(state: dict[str, Tensor], names: dict[str, str], clip: Tensor) -> Tensor:
    """Tokens of one clip `(3, T, H, W)`, a head at a time."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normed(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(dim=1, keepdim=True)
        x = x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    stem = names["stem"]
    x = F.conv3d(clip[None], state[f"{stem}.weight"], state[f"{stem}.bias"], stride=(2, 4, 4))
    x = x[0].flatten(1).T
    x = x + sines(*x.shape)
    for block in (f"blocks.{n}" for n in range(2)):
        y = normed(f"{block}.norm1", x) @ state[f"{block}.attn.qkv.weight"].T
        q, k, v = y.split(TINY.channels, dim=1)
        q, v = q + state[f"{block}.attn.q_bias"], v + state[f"{block}.attn.v_bias"]
        size = TINY.channels // TINY.heads
        heads = [
            (a @ b.T / size**0.5).softmax(dim=1) @ c
            for a, b, c in zip(*(t.split(size, dim=1) for t in (q, k, v)), strict=True)
        ]
        x = x + linear(f"{block}.attn.proj", torch.cat(heads, dim=1))
        y = F.gelu(linear(f"{block}.{names['in']}", normed(f"{block}.norm2", x)))
        x = x + linear(f"{block}.{names['out']}", y)
    return normed("norm", x) if "norm.weight" in state else x


@pytest.mark.parametrize("norm", [False, True], ids=["finetuned", "pretrained"])
@pytest.mark.parametrize("names", [AUTHORS, MMACTION2], ids=["authors", "mmaction2"])
def test_published_networks_compute_the_same(
    names: dict[str, str], norm: bool, video: Tensor, tmp_path: Path
) -> None:
    state = published(names, norm=norm)
    content: dict[str, Any] = {"model": state, "epoch": 3}
    left_out = (
        {}
        if norm
        else dict.fromkeys(
            [f"{n}.{leaf}" for n in ("fc_norm", "head") for leaf in ("weight", "bias")],
            "of the classifier",
        )
    )
    if names is MMACTION2:
        positions = {"pos_embed": sines(32, 16)[None]}
        inside = {f"backbone.{n}": v for n, v in (state | positions).items()}
        content = {"state_dict": inside | {"cls_head.fc_cls.bias": torch.zeros(3)}}
        left_out = {f"backbone.{name}": reason for name, reason in left_out.items()} | {
            "backbone.pos_embed": "computed by the backbone",
            "cls_head.fc_cls.bias": "not of the backbone",
        }
    elif norm:  # beside the decoder, whose blocks have the same names
        decoder = {f"decoder.{n}": v for n, v in state.items()}
        content = {"module": {f"encoder.{n}": v for n, v in state.items()} | decoder}
        left_out = dict.fromkeys(decoder, "not of the backbone")
    torch.save(content, tmp_path / "theirs.pth")
    built = replace(TINY, norm=norm, norm_epsilon=1e-6).build().eval()
    report = load_backbone_weights(built, tmp_path / "theirs.pth")
    assert report.layout == "VideoMAE of its authors or of mmaction2"
    assert report.left_out == left_out
    assert sorted(report.placed.values()) == sorted(built.state_dict())
    query = "encoder.layer.1.attention.attention.query.weight"
    assert next(n for n, ours in report.placed.items() if ours == query).endswith(
        "blocks.1.attn.qkv.weight[0]"
    )
    wanted = torch.stack(
        [
            torch.cat(
                [
                    published_tokens(state, names, sample[:, t : t + 4])
                    .unflatten(0, (2, 16))
                    .mean(dim=1)
                    for t in range(0, 12, 4)
                ]
            ).T
            for sample in video
        ]
    )
    with torch.no_grad():
        torch.testing.assert_close(built(video), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "prefix"),
    [("vit_b_k710_dl_from_giant.pth", ""), ("model.safetensors", "model."), ("ema.pth", "module.")],
)
def test_files_of_the_second_version_are_loaded(file: str, prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{name}": value for name, value in published(AUTHORS).items()}
    if file.endswith(".pth"):
        torch.save({"module": state}, tmp_path / file)
    else:  # the hub's, beside code that is never run
        state = {name: value for name, value in state.items() if ".head." not in name}
        save_file(state, tmp_path / file)
        (tmp_path / "modeling_videomaev2.py").write_text("raise AssertionError")
    built = TINY.build()
    report = load_backbone_weights(built, tmp_path / file if prefix != "model." else tmp_path)
    assert report.layout == "VideoMAE of its authors or of mmaction2"
    assert {name.removeprefix(prefix).split(".")[0] for name in report.left_out} == (
        {"fc_norm"} if prefix == "model." else {"fc_norm", "head"}
    )
    query = built.get_parameter("encoder.layer.1.attention.attention.query.weight")
    assert torch.equal(query, state[f"{prefix}blocks.1.attn.qkv.weight"][:16])


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"pos_embed": torch.zeros(1, 32, 16)}, r"positions .* are not the sines \(1, 32, 16\)"),
        ({"pos_embed": torch.zeros(1, 8, 16)}, r"their positions \(1, 8, 16\) are not"),
        ({"blocks.0.gamma_1": torch.zeros(16)}, "blocks.0.gamma_1 is unknown"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(9, 16)}, r"qkv.weight\[0\] .* shape \(3, 16\)"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(7, 16)}, "qkv.weight has 7 rows"),
        ({"norm.weight": torch.zeros(16)}, "set norm=True"),
    ],
)
def test_published_weights_of_another_network_are_refused(
    more: dict[str, Tensor], problem: str, tmp_path: Path
) -> None:
    torch.save(published(AUTHORS) | more, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=problem):
        load_backbone_weights(TINY.build(), tmp_path / "theirs.pth")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, without a network: one commit of one model, in the form of its client."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    model = tmp_path / "models--owner--tiny"
    for folder in ("refs", f"snapshots/{commit}"):
        (model / folder).mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    return model / "snapshots" / commit


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_name_of_the_hub_is_loaded_from_its_cache(hub: Path, file: str) -> None:
    model = theirs(TINY)
    if file.endswith(".bin"):
        torch.save(model.state_dict(), hub / file)
    else:
        model.save_pretrained(hub)
    built = TINY.build()
    load_backbone_weights(built, "hf:owner/tiny")
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in built.state_dict().items())


@pytest.mark.parametrize(
    "name", ["hf:owner/other", "hf:owner/tiny", "hf:owner/tiny@v2", "hf:a/b/c"]
)
def test_a_name_of_the_hub_that_cannot_be_had_is_refused(hub: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)cannot be downloaded.*give the path of a folder"):
        load_backbone_weights(TINY.build(), name)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    torch.save({"model": theirs(TINY)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could run code"):
        load_backbone_weights(TINY.build(), tmp_path)


# Configuration


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (videomae_s(), 22),
        (videomae_b(), 86),
        (videomae_l(), 304),
        (videomae_h(), 632),
        (videomae_v2_g(), 1012),
    ],
)
def test_sizes_are_those_of_vision_transformers(config: VideoMAEConfig, millions: int) -> None:
    width, depth = config.channels, config.depths[0]
    hidden = 6144 if config == videomae_v2_g() else 4 * width
    # weights of attention and MLP; biases, of which the key has none; two norms
    block = (4 * width + 2 * hidden) * width + 4 * width + hidden + 4 * width
    with torch.device("meta"):
        built = config.build()
    parameters = sum(p.numel() for p in built.parameters())
    assert parameters == depth * block + (2 * config.patch**2 * 3 + 1) * width
    assert round(parameters / 1e6) == millions


def test_layers_are_counted_from_the_stem() -> None:
    built = replace(TINY, norm=True).build()
    layers = {name: built.layer_of(name) for name, _ in built.named_parameters()}
    assert layers["embeddings.patch_embeddings.projection.bias"] == 0
    assert layers["encoder.layer.0.output.dense.bias"] == 1
    assert layers["encoder.layer.1.layernorm_before.bias"] == 2
    assert layers["layernorm.weight"] == 2
    assert set(layers.values()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (2, 2)}, "one stage"),
        ({"depths": (10**6,)}, r"VideoMAEConfig.depths must be 1 to 512"),
        ({"channels": 10**9}, r"VideoMAEConfig.channels must be"),
        ({"heads": 3}, r"channels must be a multiple of the 3 heads"),
        ({"clip": 5}, r"clip must be a multiple of the 2"),
        ({"trained_size": 18}, r"trained_size must be a multiple of the 4"),
        ({"patch": 1, "trained_size": 4096, "channels": 2**14}, "are too many"),
        ({"dropout": float("nan")}, "dropout must be"),
    ],
)
def test_impossible_shapes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


def test_without_the_library_its_installation_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 're2tal\[backbones\]'"):
        TINY.build()
    assert main([]) == 0  # the others are still listed
    printed = capsys.readouterr().out
    assert "videomae_b: VideoMAE is built from the library transformers" in printed
    assert "swin_t: a window of 2 n frames" in printed
    assert main(["rewire", "videomae_toy"]) == 1
    assert "re2tal[backbones]" in capsys.readouterr().err


def test_the_table_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    for size in "sbl":
        assert f"videomae_{size}: a window of 16 n frames, a feature for each 2\n" in printed
    assert "weights: hf:MCG-NJU/videomae-base\n" in printed
    assert entry_of("videomae_toy").mean == (0.485, 0.456, 0.406)


# Detectors

SPEC = DetectorSpec(
    classes=("a", "b"),
    backbone=TINY,
    localizer=ACTIONFORMER,
    size=16,
    window=WindowConfig(frames=64, fps=10.0),
)


def test_a_saved_detector_is_read_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = SPEC.build().eval()
    save_detector(tmp_path, SPEC, detector)
    spec, loaded = load_detector(tmp_path)
    assert spec == SPEC
    assert isinstance(loaded.backbone, ClipBackbone)
    frames = torch.randint(0, 256, (1, 64, 16, 16, 3), dtype=torch.uint8)
    mask = torch.ones(1, 64, dtype=torch.bool)
    with torch.no_grad():
        for a, b in zip(detector(frames, mask), loaded(frames, mask), strict=True):
            assert torch.equal(a.scores, b.scores)
            assert torch.equal(a.segments, b.segments)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("depths", [512], "a larger network than that of the weights"),
        ("depths", [3], "encoder.layer.2.attention.attention.query.weight is missing"),
        ("channels", 2**14, "must be floating numbers of shape"),
        ("clip", 7, "clip must be a multiple of the 2"),
        ("clip", 24, "window.frames: must be a multiple of"),
    ],
)
def test_a_specification_of_another_detector_is_refused(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    save_detector(tmp_path, SPEC, SPEC.build())
    document = json.loads((tmp_path / SPEC_FILE).read_text())
    document["backbone"][field] = value
    (tmp_path / SPEC_FILE).write_text(json.dumps(document))
    with pytest.raises(FileError, match=message):
        load_detector(tmp_path)
