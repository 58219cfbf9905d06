"""Families of models of clips, each against a plain model in a loop over the clips."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from re2tal.backbones.clips import ClipBackbone
from re2tal.backbones.internvideo2 import InternVideo2Config, internvideo2_1b, internvideo2_b
from re2tal.backbones.table import entry_of
from re2tal.backbones.timesformer import TimeSformerConfig, timesformer_b
from re2tal.backbones.videomae import VideoMAEConfig
from re2tal.backbones.vivit import ViViTConfig, vivit_b
from re2tal.backbones.vjepa2 import VJEPA2Config, vjepa2_g, vjepa2_h, vjepa2_l
from re2tal.backbones.weights import load_backbone_weights, save_backbone_weights
from re2tal.detector import Detector
from re2tal.errors import UserError
from re2tal.reversible import rewire, set_reversible
from re2tal.trained import DetectorSpec, load_detector, save_detector
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import WindowConfig
from re2tal.weights import WeightsMismatchError
from tests.localizers.small import ACTIONFORMER
from tests.reversible.toy_blocks import assert_same_step, one_step
from tests.reversible.zoo import Precision, both_precisions, scrambled

State = dict[str, Tensor]
Tokens = Callable[[Tensor], Tensor]  # of a clip (3, n, H, W), (times, places, C)

SHAPE: dict[str, Any] = {"patch": 4, "depths": (2,), "heads": 2, "mlp_ratio": 2.0, "clip": 4}
LEARNT: dict[str, Any] = {"channels": 16, "trained_clip": 4, "trained_size": 16}


@dataclass(frozen=True)
class Family:
    """What the tests have to know of a family.

    Attributes:
        config: a tiny shape.
        write: function that writes weights as their library or authors do, and returns their path
            and the plain model.
        plain: function from the plain model, the shape and the frames' size to its tokens.
        positions: names in the file of learnt positions.
        stem: a parameter of the stem.
        mixing: module of every block that is called with `(clips, tokens, C)`.
        others: beginnings of names in a file that are not of the backbone.
    """

    config: Any
    write: Callable[[Any, Path], tuple[Path, Any]]
    plain: Callable[[Any, Any, tuple[int, int]], Tokens]
    positions: tuple[str, ...]
    stem: str
    mixing: str
    others: tuple[str, ...]


def saved(kind: str, shape: Any, folder: Path) -> tuple[Path, Any]:
    """A model of transformers with a head, and without, as `save_pretrained` writes it."""
    import transformers

    library: Any = transformers
    torch.manual_seed(0)
    model = getattr(library, kind)(shape).eval()
    scrambled(model)
    model.save_pretrained(folder)
    return folder, model


def library_shape(config: Any, **more: Any) -> dict[str, Any]:
    return {
        "image_size": config.trained_size,
        "num_frames": config.trained_clip,
        "hidden_size": config.channels,
        "num_hidden_layers": config.depths[0],
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.channels * config.mlp_ratio),
        "num_labels": 3,
        **more,
    }


# V-JEPA 2


def write_vjepa2(config: VJEPA2Config, folder: Path) -> tuple[Path, Any]:
    from transformers import VJEPA2Config as Theirs

    shape = Theirs(
        patch_size=config.patch,
        crop_size=24,  # the largest of the tests: a grid of 6 x 6
        frames_per_clip=4,
        hidden_size=config.channels,
        num_hidden_layers=config.depths[0],
        num_attention_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        pred_hidden_size=12,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        pred_mlp_ratio=2.0,
    )
    return saved("VJEPA2Model", shape, folder)


def plain_vjepa2(model: Any, config: VJEPA2Config, size: tuple[int, int]) -> Tokens:
    rows, columns = (pixels // config.patch for pixels in size)
    times = config.clip // config.tubelet
    # numbers of the places in the library's own grid of 6 x 6
    numbers = [
        [t * 36 + r * 6 + c for t in range(times) for r in range(rows) for c in range(columns)]
    ]

    def tokens(clip: Tensor) -> Tensor:
        if size == (24, 24):
            video = clip.transpose(0, 1)[None]
            x = model(pixel_values_videos=video, skip_predictor=True).last_hidden_state
        else:
            x = model.encoder.embeddings(clip.transpose(0, 1)[None])
            for layer in model.encoder.layer:
                x = layer(x, torch.tensor(numbers))[0]
            x = model.encoder.layernorm(x)
        return x[0].unflatten(0, (times, -1))

    return tokens


# ViViT


def write_vivit(config: ViViTConfig, folder: Path) -> tuple[Path, Any]:
    from transformers import VivitConfig

    tubelet = [config.tubelet, config.patch, config.patch]
    shape = VivitConfig(tubelet_size=tubelet, **library_shape(config))
    return saved("VivitForVideoClassification", shape, folder)


def enlarged(table: Tensor, config: Any, size: tuple[int, int]) -> Tensor:
    """Positions `(1, 1 + places, C)` for other frames, from two places in time to any."""
    old = config.trained_clip // config.tubelet, config.trained_size // config.patch
    new = config.clip // config.tubelet, size[0] // config.patch, size[1] // config.patch
    images = table[0, 1:].unflatten(0, (old[0], old[1], old[1])).permute(0, 3, 1, 2)
    images = F.interpolate(images, size=new[1:], mode="bicubic").permute(0, 2, 3, 1)
    rows = []
    for time in range(new[0]):
        place = min(max((time + 0.5) * old[0] / new[0] - 0.5, 0), old[0] - 1)
        below = min(int(place), old[0] - 2)
        share = place - below
        rows.append((1 - share) * images[below] + share * images[below + 1])
    return torch.cat((table[:, :1], torch.stack(rows).flatten(0, 2)[None]), dim=1)


def plain_vivit(model: Any, config: ViViTConfig, size: tuple[int, int]) -> Tokens:
    stem = model.vivit.embeddings
    stem.position_embeddings = nn.Parameter(enlarged(stem.position_embeddings, config, size))
    stem.image_size = size

    def tokens(clip: Tensor) -> Tensor:
        x = model.vivit(clip.transpose(0, 1)[None]).last_hidden_state[0, 1:]
        return x.unflatten(0, (config.clip // config.tubelet, -1))

    return tokens


# TimeSformer


def write_timesformer(config: TimeSformerConfig, folder: Path) -> tuple[Path, Any]:
    from transformers import TimesformerConfig

    shape = TimesformerConfig(patch_size=config.patch, **library_shape(config))
    return saved("TimesformerForVideoClassification", shape, folder)


def plain_timesformer(model: Any, config: TimeSformerConfig, size: tuple[int, int]) -> Tokens:
    # Its stem takes the nearest embeddings; its blocks take every grid of one column.
    model.config.num_frames, model.config.image_size = config.clip, config.patch
    del size

    def tokens(clip: Tensor) -> Tensor:
        x = model.timesformer(clip.transpose(0, 1)[None]).last_hidden_state[0, 1:]
        return x.unflatten(0, (-1, config.clip)).transpose(0, 1)  # places, then frames

    return tokens


# InternVideo2: the authors' names, from their source; the computation is written out below


def write_internvideo2(config: InternVideo2Config, folder: Path) -> tuple[Path, Any]:
    width, hidden = config.channels, int(config.channels * config.mlp_ratio)
    places = config.trained_clip // config.tubelet * (config.trained_size // config.patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + places, width),
        "patch_embed.proj.weight": (width, 3, config.tubelet, config.patch, config.patch),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(config.depths[0]):
        inside = {
            "norm1.weight": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "attn.q_norm.weight": (width,),
            "attn.k_norm.weight": (width,),
            "ls1.gamma": (width,),
            "norm2.weight": (width,),
            "mlp.fc1.weight": (hidden, width),
            "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (width, hidden),
            "mlp.fc2.bias": (width,),
            "ls2.gamma": (width,),
        }
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in inside.items()}
    more = {
        "clip_projector.cross_attn.q.weight": (width, width),
        "fc_norm.weight": (8,),
        "head.weight": (3, 8),
        "clip_pos_embed": (1, 1 + places, width),
        "clip_decoder.0.head.weight": (8, width),
    }
    torch.manual_seed(0)
    state = {name: torch.randn(shape) / 4 for name, shape in (shapes | more).items()}
    path = folder / "theirs.pth"
    torch.save({"module": {f"vision_encoder.{name}": v for name, v in state.items()}}, path)
    return path, state


def plain_internvideo2(state: State, config: InternVideo2Config, size: tuple[int, int]) -> Tokens:
    def normed(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attended(name: str, x: Tensor) -> Tensor:
        q, k, v = (x @ weight.T for weight in state[f"{name}.qkv.weight"].chunk(3))
        q, k = normed(f"{name}.q_norm", q), normed(f"{name}.k_norm", k)
        width = config.channels // config.heads
        heads = []
        for first in range(0, config.channels, width):
            a, b, c = (part[:, first : first + width] for part in (q, k, v))
            heads.append((torch.einsum("ic,jc->ij", a, b) / width**0.5).softmax(dim=1) @ c)
        return linear(f"{name}.proj", torch.cat(heads, dim=1))

    def tokens(clip: Tensor) -> Tensor:
        kernel = (config.tubelet, config.patch, config.patch)
        stem = state["patch_embed.proj.weight"].flatten(1)
        cut = clip
        for dim, step in enumerate(kernel):
            cut = cut.unfold(1 + dim, step, step)
        x = cut.permute(1, 2, 3, 0, 4, 5, 6).flatten(3).flatten(0, 2) @ stem.T
        x = torch.cat((state["cls_token"][0], x + state["patch_embed.proj.bias"]))
        x = x + enlarged(state["pos_embed"], config, size)[0]
        for block in (f"blocks.{n}" for n in range(config.depths[0])):
            y = attended(f"{block}.attn", normed(f"{block}.norm1", x))
            x = x + y * state[f"{block}.ls1.gamma"]
            y = F.gelu(linear(f"{block}.mlp.fc1", normed(f"{block}.norm2", x)))
            x = x + linear(f"{block}.mlp.fc2", y) * state[f"{block}.ls2.gamma"]
        return x[1:].unflatten(0, (config.clip // config.tubelet, -1))

    return tokens


FAMILIES = {
    "vjepa2": Family(
        config=VJEPA2Config(**SHAPE, channels=24),
        write=write_vjepa2,
        plain=plain_vjepa2,
        positions=(),
        stem="embeddings.patch_embeddings.proj.bias",
        mixing="attention",
        others=("predictor.",),
    ),
    "vivit": Family(
        config=ViViTConfig(**SHAPE, **LEARNT),
        write=write_vivit,
        plain=plain_vivit,
        positions=("vivit.embeddings.position_embeddings",),
        stem="embeddings.cls_token",
        mixing="attention",
        others=("classifier.",),
    ),
    "timesformer": Family(
        config=TimeSformerConfig(**SHAPE, **LEARNT),
        write=write_timesformer,
        plain=plain_timesformer,
        positions=("timesformer.embeddings.position_embeddings",),
        stem="embeddings.time_embeddings",
        mixing="temporal_dense",
        others=("classifier.",),
    ),
    "internvideo2": Family(
        config=InternVideo2Config(**SHAPE, **LEARNT, tubelet=2),
        write=write_internvideo2,
        plain=plain_internvideo2,
        positions=("vision_encoder.pos_embed",),
        stem="stem.pos_embed",
        mixing="attn",
        others=tuple(f"vision_encoder.{name}" for name in ("clip_", "fc_norm.", "head.")),
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(scope="module", params=[*FAMILIES.values()], ids=[*FAMILIES])
def case(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Family, Path]:
    """A family and its file, written once; the plain model is made anew by each test."""
    return request.param, tmp_path_factory.mktemp("weights")


def clip_by_clip(tokens: Tokens, video: Tensor, clip: int) -> Tensor:
    """Features of a window, a clip and a token's frames at a time, averaged by hand."""
    rows = []
    for sample in video:
        features: list[Any] = []
        for start in range(0, sample.shape[1], clip):
            features += [
                sum(places) / len(places) for places in tokens(sample[:, start : start + clip])
            ]
        rows.append(torch.stack(features, dim=1))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("size", "clip"),
    [((16, 16), 4), ((24, 24), 4), ((24, 16), 8)],
    ids=["trained", "larger", "oblong_and_longer"],
)
def test_a_window_is_a_loop_over_its_clips(
    case: tuple[Family, Path], size: tuple[int, int], clip: int
) -> None:
    family, folder = case
    path, plain = family.write(family.config, folder)
    config = replace(family.config, clip=clip)
    built = config.build().eval()
    report = load_backbone_weights(built, path)
    assert not report.kept
    assert sorted(report.placed.values()) == sorted(built.state_dict())
    assert report.left_out
    assert all(name.startswith(family.others) for name in report.left_out)
    torch.manual_seed(1)
    video = torch.randn(2, 3, 16, *size)
    with torch.no_grad():
        wanted = clip_by_clip(family.plain(plain, config, size), video, clip)
        found = built(video)
    assert found.shape == (2, config.channels, 16 // built.temporal_stride)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.fixture
def video() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 12, 16, 16)


@each_family
def test_a_change_is_seen_in_the_features_of_its_clip_alone(family: Family, video: Tensor) -> None:
    torch.manual_seed(0)
    built = family.config.build().eval()
    scrambled(built)
    grid = TimeGrid(fps=10.0, stride=built.temporal_stride, length=12, offset=3.0)
    frame = 6  # in the second clip, frames 4 to 7
    other = video.clone()
    other[1, :, frame] += 1
    with torch.no_grad():
        before, after = built(video), built(other)
    first, last = (round(grid.to_features(3 + edge / 10) + 0.5) for edge in (4, 8))
    changed = (before != after).any(dim=1)
    assert not changed[0].any()
    assert changed[1].tolist() == [first <= j < last for j in range(grid.num_features)]


@each_family
def test_windows_and_masks_are_counted_in_frames(family: Family) -> None:
    built = family.config.with_stride(4 * family.config.build().temporal_stride).build()
    detector = Detector(built, ACTIONFORMER.build(built.channels, 2))
    assert built.multiple == max(4, built.temporal_stride)
    assert detector.multiple == built.temporal_stride * detector.localizer.multiple
    frames = torch.zeros(1, detector.multiple, 16, 16, 3, dtype=torch.uint8)
    mask = torch.arange(detector.multiple)[None] < built.temporal_stride + 1
    assert detector.feature_mask(mask).sum() == 2  # the second feature sees a frame of the video
    assert len(detector(frames, mask)) == 1
    with pytest.raises(UserError, match=f"multiple of {built.multiple} frames"):
        built(torch.zeros(1, 3, built.multiple + 1, 16, 16))
    with pytest.raises(UserError, match=r"16 x 14 pixels cannot be cut into patches of 4"):
        built(torch.zeros(1, 3, built.multiple, 16, 14))


@each_family
@both_precisions
def test_gradients_of_the_rewired_are_the_stored_to_the_bit(
    family: Family, video: Tensor, bf16: bool
) -> None:
    torch.manual_seed(0)
    built = scrambled(family.config.build())
    report = rewire(built, slice_bytes=2**14)
    assert [stage.blocks for stage in report.stages] == [("0", "1")]
    stem = family.stem.split(".")[0]
    assert stem in {left.name for left in report.left_out if left.recomputed}
    pieces: list[int] = []
    for name, module in built.named_modules():
        if name.endswith(f".1.{family.mixing}"):
            module.register_forward_pre_hook(lambda _, given: pieces.append(len(given[0])))
    model = Precision(built, bf16=bf16)
    set_reversible(built, False)
    stored = one_step(model, video)
    assert sum(pieces) == 6  # 2 windows of 3 clips
    assert max(pieces) < 6
    set_reversible(built, True)
    assert_same_step(one_step(model, video), stored)
    unused = [n for n, g in stored.gradients.items() if g is None or not g.any()]
    assert unused == ["input 0"]


# Weights


def altered(path: Path, change: Callable[[State], Any]) -> Path:
    """The file with other contents."""
    if path.is_dir():
        path = path / "model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)
    else:
        content = torch.load(path, weights_only=True)
        change(content["module"])
        torch.save(content, path)
    return path


def last_weight(state: State) -> str:
    blocks = (name for name in state if re.search(r"(?:layer|blocks)\.1\..*weight$", name))
    return next(name for name in blocks if "predictor" not in name)


@each_family
def test_what_is_missing_or_too_much_is_named(family: Family, tmp_path: Path) -> None:
    path, _ = family.write(family.config, tmp_path)
    built = family.config.build()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    seen: list[str] = []

    def change(state: State) -> None:
        name = last_weight(state)
        seen.append(name)
        state[name.replace(".1.", ".2.", 1)] = state[name].clone()
        state[name] = state[name][:1].clone()
        del state[name.replace(".1.", ".0.", 1)]

    path = altered(path, change)
    with pytest.raises(WeightsMismatchError, match="recognised as: ") as caught:
        load_backbone_weights(built, path)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert f"{seen[0].replace('.1.', '.2.', 1)}" in problems
    assert "has shape (1" in problems
    assert "is missing" in problems
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].positions])
@pytest.mark.parametrize("other", [{"trained_clip": 8}, {"trained_size": 32}], ids=str)
def test_positions_of_another_training_name_the_options(
    name: str, other: dict[str, int], tmp_path: Path
) -> None:
    family = FAMILIES[name]
    config = replace(family.config, **other)
    path, _ = family.write(config, tmp_path)
    with pytest.raises(WeightsMismatchError, match="set trained_clip and trained_size to the fram"):
        load_backbone_weights(family.config.build(), path)
    load_backbone_weights(config.build(), path)


@each_family
def test_our_own_file_fits_a_rewired_backbone(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(3)
    own, loaded = family.config.build(), family.config.build()
    save_backbone_weights(own, tmp_path / "w.safetensors", {})
    rewire(loaded)
    report = load_backbone_weights(loaded, tmp_path / "w.safetensors")
    assert report.placed == {name: name for name in own.state_dict()}
    assert all(torch.equal(v, loaded.state_dict()[n]) for n, v in own.state_dict().items())


def test_families_with_the_same_layers_are_told_apart(tmp_path: Path) -> None:
    path, _ = write_vivit(FAMILIES["vivit"].config, tmp_path)
    with pytest.raises(WeightsMismatchError, match="recognised as: ViViT of transformers"):
        load_backbone_weights(VideoMAEConfig(**SHAPE, **LEARNT, norm=True).build(), path)


def test_a_pooler_and_todays_names_of_the_library_are_known(tmp_path: Path) -> None:
    from transformers import VivitConfig

    config = FAMILIES["vivit"].config
    shape = VivitConfig(tubelet_size=[2, 4, 4], **library_shape(config))
    _, model = saved("VivitModel", shape, tmp_path / "folder")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    for path in (tmp_path / "folder", tmp_path / "w.safetensors"):
        built = config.build()
        report = load_backbone_weights(built, path)
        assert report.left_out == {
            f"pooler.dense.{n}": "of the classifier" for n in ("bias", "weight")
        }
        assert all(torch.equal(v, model.state_dict()[n]) for n, v in built.state_dict().items())


def test_the_predictor_is_left_out_and_reported(tmp_path: Path) -> None:
    family = FAMILIES["vjepa2"]
    path, model = family.write(family.config, tmp_path)
    report = load_backbone_weights(family.config.build(), path)
    wanted = {name for name in model.state_dict() if name.startswith("predictor.")}
    assert report.left_out == dict.fromkeys(wanted, "not of the backbone")
    assert len(report.placed) + len(wanted) == len(model.state_dict())


def of_vjepa2s_authors(state: State) -> dict[str, Any]:
    """The encoder under the authors' names, beside what else is in their files."""
    found: State = {"pos_embed": torch.zeros(1, 8, 24)}
    encoder = {n.removeprefix("encoder."): v for n, v in state.items() if n.startswith("encoder.")}
    for name, value in encoder.items():
        if ".query." in name:
            parts = [encoder[name.replace("query", part)] for part in ("query", "key", "value")]
            name, value = name.replace("query", "qkv"), torch.cat(parts)
        if ".key." not in name and ".value." not in name:
            name = name.replace("embeddings.patch_embeddings", "patch_embed")
            name = name.replace("layernorm", "norm").replace("attention", "attn")
            found[re.sub(r"^layer\.", "blocks.", name)] = value
    inside = {f"module.backbone.{name}": value for name, value in found.items()}
    return {"encoder": inside, "predictor": {"module.x": torch.zeros(1)}, "epoch": 3, "lr": 0.1}


def of_timesformers_authors(state: State) -> dict[str, Any]:
    """The model under the authors' names, to transformers' of which theirs were once converted."""
    found: State = {}
    for name, value in state.items():
        name = name.removeprefix("timesformer.")
        for ours, theirs in {
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.time_embeddings": "time_embed",
            "embeddings.cls_token": "cls_token",
            "encoder.layer": "blocks",
            "temporal_attention.attention": "temporal_attn",
            "temporal_attention.output.dense": "temporal_attn.proj",
            "temporal_layernorm": "temporal_norm1",
            "temporal_dense": "temporal_fc",
            "attention.attention": "attn",
            "attention.output.dense": "attn.proj",
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
            "layernorm": "norm",
            "classifier": "head",
        }.items():
            name = name.replace(ours, theirs)
        found[f"model.{name}"] = value
    return {"model_state": found, "epoch": 14}


@pytest.mark.parametrize(
    ("name", "rename", "left_out"),
    [
        ("vjepa2", of_vjepa2s_authors, {"module.backbone.pos_embed"}),
        ("timesformer", of_timesformers_authors, {"model.head.weight", "model.head.bias"}),
    ],
)
def test_files_of_the_authors_hold_what_the_librarys_hold(
    name: str, rename: Callable[[State], dict[str, Any]], left_out: set[str], tmp_path: Path
) -> None:
    family = FAMILIES[name]
    path, model = family.write(family.config, tmp_path)
    torch.save(rename(model.state_dict()), tmp_path / "theirs.pt")
    ours, theirs = family.config.build(), family.config.build()
    load_backbone_weights(ours, path)
    report = load_backbone_weights(theirs, tmp_path / "theirs.pt")
    assert report.layout.endswith(" of its authors")
    assert set(report.left_out) == left_out
    found = theirs.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in ours.state_dict().items())


def test_the_authors_other_parts_are_left_out_with_a_reason(tmp_path: Path) -> None:
    family = FAMILIES["internvideo2"]
    path, _ = family.write(family.config, tmp_path)
    report = load_backbone_weights(family.config.build(), path)
    assert report.layout == "InternVideo2 of its authors"
    assert {name.removeprefix("vision_encoder."): why for name, why in report.left_out.items()} == {
        "clip_projector.cross_attn.q.weight": "of the classifier",
        "fc_norm.weight": "of the classifier",
        "head.weight": "of the classifier",
        "clip_pos_embed": "not of the backbone",
        "clip_decoder.0.head.weight": "not of the backbone",
    }


# Configuration


def block_of(config: Any) -> int:
    """Parameters of a block: attention and MLP with biases, two norms."""
    width = config.channels
    hidden = round(width * config.mlp_ratio)
    return (4 * width + 2 * hidden) * width + 4 * width + hidden + width + 4 * width


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (vjepa2_l(), 304),
        (vjepa2_h(), 632),
        (vjepa2_g(), 1012),
        (vivit_b(), 89),
        (timesformer_b(), 121),
        (internvideo2_b(), 87),
        (internvideo2_1b(), 1014),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_sizes_are_those_of_the_papers(config: Any, millions: int) -> None:
    width, depth = config.channels, config.depths[0]
    block, stem = (
        block_of(config),
        (config.patch**2 * 3 * getattr(config, "tubelet", 1) + 1) * width,
    )
    norm = 2 * width
    if isinstance(config, TimeSformerConfig):  # attention among frames, its norm, and a layer more
        block += 4 * width**2 + 4 * width + 2 * width + width**2 + width
        stem += (1 + 1 + 14**2 + 8) * width
    elif isinstance(config, ViViTConfig):
        stem += (1 + 1 + 16 * 14**2) * width
    elif isinstance(config, InternVideo2Config):  # no biases of q, k, v and norms; scales instead
        block += -3 * width - 2 * width + 2 * width + 2 * width
        stem += (1 + 1 + 8 * 16**2) * width
        norm = 0
    with torch.device("meta"):
        built = config.build()
    parameters = sum(p.numel() for p in built.parameters())
    assert parameters == depth * block + stem + norm
    assert round(parameters / 1e6) == millions


@each_family
def test_layers_are_counted_from_the_stem(family: Family) -> None:
    built = family.config.build()
    layers = {name: built.layer_of(name) for name, _ in built.named_parameters()}
    assert layers[family.stem] == 0
    blocks = {name: int(m[1]) + 1 for name in layers if (m := re.search(r"\.?(\d)\.[a-z]", name))}
    assert blocks
    assert all(layers[name] == layer for name, layer in blocks.items())
    assert {layers[name] for name in layers if name.startswith("layernorm")} <= {2}


@each_family
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (2, 2)}, "one stage"),
        ({"heads": 5}, r"channels must be a multiple of the 5 heads"),
        ({"clip": 10**6}, r"clip must be 1 to"),
    ],
    ids=["stages", "heads", "clip"],
)
def test_impossible_shapes_are_refused(
    family: Family, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(family.config, **fields)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("vjepa2_l", 0.485, 0.229),
        ("vivit_b", 0.5, 0.5),
        ("timesformer_b", 0.45, 0.225),
        ("internvideo2_1b", 0.485, 0.229),
    ],
)
def test_frames_are_normalised_as_in_the_training(name: str, mean: float, std: float) -> None:
    entry = entry_of(name)
    assert (entry.mean[0], entry.std[0]) == (mean, std)
    for layout in entry.layouts:
        assert layout.mean in (None, entry.mean)
        assert layout.std in (None, entry.std)


@each_family
def test_a_saved_detector_is_read_again(family: Family, tmp_path: Path) -> None:
    spec = DetectorSpec(
        classes=("a", "b"),
        backbone=family.config,
        localizer=ACTIONFORMER,
        size=16,
        window=WindowConfig(frames=64, fps=10.0),
    )
    torch.manual_seed(0)
    detector = spec.build().eval()
    save_detector(tmp_path, spec, detector)
    read, loaded = load_detector(tmp_path)
    assert read == spec
    assert isinstance(loaded.backbone, ClipBackbone)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())
