"""Video Swin Transformer (Liu et al., CVPR 2022, arXiv 2106.13230), torchvision's own classes.

Published weights: torchvision's unchanged; those of mmaction2, of the paper's authors and of
OpenTAD's Re2Swin are renamed. All of them have torchvision's network, according to their sources:
patch merging concatenates its four neighbours in the same order, the rows of the relative position
table and of `qkv` are in the same order, and norms have the same epsilon. OpenTAD's blocks have two
functions, F (attention) and G (the MLP), and two streams, ``y1 = x1 + F(x2); y2 = x2 + G(y1)``: the
same as ours after rewiring.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn
from torchvision.models.video import SwinTransformer3d

from re2tal.backbones.table import Layout, backbone
from re2tal.errors import check_within
from re2tal.reversible import spent
from re2tal.reversible.branches import has_hooks

_POSITIONS = "relative_position_index"
# torchvision's MLP is a sequence: linear, GELU, dropout, linear, dropout.
_LAYERS = {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}

_STEM = re.compile(r"patch_embed\.(?:proj|norm)\.(?:weight|bias)")
_NORM = re.compile(r"norm3?\.(weight|bias)")  # norm3: mmaction2's, after the fourth stage
_MERGING = re.compile(r"layers\.(\d+)\.downsample\.(norm|reduction)\.(weight|bias)")
_PLAIN = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.((?:norm1|attn|norm2|mlp)\..+)")
_COUPLED = re.compile(
    r"layers\.(\d+)\.blocks\.(\d+)\.inv_block\.(?:Fm\.((?:norm1|attn)\..+)|Gm\.((?:norm2|mlp)\..+))"
)


def _around(name: str) -> str | None:
    """Return our name of a weight outside the blocks."""
    if _STEM.fullmatch(name):
        return name
    if match := _NORM.fullmatch(name):
        return f"norm.{match[1]}"
    if match := _MERGING.fullmatch(name):
        # stages and the mergings between them alternate
        return f"features.{2 * int(match[1]) + 1}.{match[2]}.{match[3]}"
    return None


def _in_block(stage: str, block: str, part: str) -> str:
    layer, _, leaf = part.rpartition(".")
    return f"features.{2 * int(stage)}.{block}.{_LAYERS.get(layer, layer)}.{leaf}"


def _plain(name: str) -> str | None:
    match = _PLAIN.fullmatch(name)
    return _in_block(match[1], match[2], match[3]) if match else _around(name)


def _coupled(name: str) -> str | None:
    match = _COUPLED.fullmatch(name)
    return _in_block(match[1], match[2], match[3] or match[4]) if match else _around(name)


VIDEO_SWIN = Layout(
    title="Video Swin of mmaction2 or of its authors",
    mark=re.compile(r"(|.*\.)layers\.0\.blocks\.0\.attn\.qkv\.weight"),
    rename=_plain,
    may_lack=(_POSITIONS,),
)

OPENTAD_SWIN = Layout(
    title="OpenTAD's Re2Swin",
    mark=re.compile(r"(|.*\.)layers\.0\.blocks\.0\.inv_block\.Fm\.attn\.qkv\.weight"),
    rename=_coupled,
    may_lack=(_POSITIONS,),
    note="They were finetuned in the rewired network: rewire the backbone.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SwinConfig:
    """Shape of a Video Swin.

    Attributes:
        patch: frames, height and width of a patch; the first is the temporal stride.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: frames, height and width of an attention window, in patches.
        drop_path: probability of dropping the last block's branches; it grows with depth.
        pooling: number of consecutive features that are averaged. Re2TAL uses 2 on ActivityNet,
            where 768 frames become 192 features, and 1 elsewhere.
    """

    patch: tuple[int, int, int] = (2, 4, 4)
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: tuple[int, int, int] = (8, 7, 7)
    drop_path: float = 0.1
    pooling: int = 1

    def __post_init__(self) -> None:
        check_within(
            self,
            patch=(1, 64),
            embed_dim=(1, 2**14),
            depths=(1, 512),
            heads=(1, 2**10),
            window=(1, 2**10),
            drop_path=(0, 1),
            pooling=(1, 2**10),
        )
        if len(self.heads) != len(self.depths) or not 1 <= len(self.depths) <= 8:
            raise ValueError(
                f"A Swin needs 1 to 8 stages and one number of heads for each, but got "
                f"{len(self.heads)} for {len(self.depths)} stages."
            )
        if sum(self.depths) < 2:  # torchvision divides by the number of blocks minus 1
            raise ValueError("A Swin needs at least two blocks, but depths is (1,): set more.")
        for stage, heads in enumerate(self.heads):
            if self.embed_dim * 2**stage % heads:
                raise ValueError(
                    f"The {self.embed_dim * 2**stage} channels of stage {stage} of a Swin cannot "
                    f"be cut into {heads} heads."
                )

    def with_stride(self, stride: int) -> SwinConfig:
        """Return the same backbone with another number of frames per feature, by averaging.

        Raises:
            ValueError: the backbone does not support that stride.
        """
        if stride % self.patch[0]:
            raise ValueError(
                f"The stride must be a multiple of {self.patch[0]}, the frames of one feature of "
                f"the backbone, not {stride}."
            )
        return replace(self, pooling=stride // self.patch[0])

    def build(self) -> SwinBackbone:
        """Build a backbone of this shape, with random weights."""
        return SwinBackbone(self)


TOY_WEIGHTS = str(Path(__file__).parent / "weights" / "toy_swin.safetensors")
_LAYOUTS = (VIDEO_SWIN, OPENTAD_SWIN)


@backbone(weights=("torchvision:swin3d_t/KINETICS400_V1",), layouts=_LAYOUTS)
def swin_t() -> SwinConfig:
    """Swin-T, the shape of torchvision's `swin3d_t`."""
    return SwinConfig()


@backbone(weights=("torchvision:swin3d_s/KINETICS400_V1",), layouts=_LAYOUTS)
def swin_s() -> SwinConfig:
    """Swin-S, the shape of torchvision's `swin3d_s`."""
    return SwinConfig(depths=(2, 2, 18, 2))


@backbone(
    weights=(
        "torchvision:swin3d_b/KINETICS400_V1",
        "torchvision:swin3d_b/KINETICS400_IMAGENET22K_V1",
    ),
    layouts=_LAYOUTS,
)
def swin_b() -> SwinConfig:
    """Swin-B, the shape of torchvision's `swin3d_b`."""
    return SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))


@backbone(weights=(TOY_WEIGHTS,), layouts=_LAYOUTS)
def swin_toy() -> SwinConfig:
    """Small Swin for the toy data set: 64 pixels, minutes on two CPU cores."""
    return SwinConfig(
        patch=(2, 8, 8),
        embed_dim=64,
        depths=(2, 2),
        heads=(2, 4),
        window=(8, 4, 4),
        drop_path=0.0,
    )


class SwinBackbone(SwinTransformer3d):  # type: ignore[misc]  # torchvision has no types
    """torchvision's `SwinTransformer3d` without its classifier, pooled over space only.

    Its parameters have torchvision's names. Its stages are torchvision's modules, so
    `re2tal.rewire` can make them reversible in place.

    See `re2tal.backbones.protocol.Backbone` for the attributes.
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__(
            patch_size=list(config.patch),
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.heads),
            window_size=list(config.window),
            stochastic_depth_prob=config.drop_path,
        )
        self.head = nn.Identity()
        self.channels: int = self.num_features
        self.pooling = config.pooling
        self._depths = config.depths
        self.temporal_stride = self.multiple = config.patch[0] * config.pooling

    def forward(self, video: Tensor) -> Tensor:
        """Compute spatially pooled features; see `Backbone`."""
        features = self.places(video).mean(dim=2)
        pooled: Tensor = features.unflatten(1, (-1, self.pooling)).mean(dim=2)
        return pooled.transpose(1, 2).contiguous()

    def layer_of(self, name: str) -> int:
        """Return the layer as in `Backbone`.

        A merging has the layer of the next block, the last norm that of the last block.
        """
        depths = self._depths
        part, *rest = name.split(".")
        if part == "patch_embed":
            return 0
        if part == "features":  # stages and mergings alternate
            stage, merges = divmod(int(rest[0]), 2)
            return 1 + (sum(depths[: stage + 1]) if merges else sum(depths[:stage]) + int(rest[1]))
        return sum(depths)

    def places(self, video: Tensor) -> Tensor:
        """Compute features before pooling; see `Placed`."""
        tokens = self.pos_drop(self.patch_embed(video))
        first = (self.patch_embed, self.pos_drop, self.features, self.features[0])
        if not any(map(has_hooks, first)):  # a hook might keep or read the tokens
            spent(tokens)
        features: Tensor = self.norm(self.features(tokens))
        return features.flatten(2, 3)

    @property
    def reads_once(self) -> bool:
        """See `Backbone`."""
        return not (has_hooks(self) or has_hooks(self.patch_embed))
