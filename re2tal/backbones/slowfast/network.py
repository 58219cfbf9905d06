"""SlowFast backbone of a slow and a fast pathway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor, nn

from re2tal.backbones.resampling import resample
from re2tal.backbones.slowfast.blocks import EXPANSION, Lateral, Stem, stage
from re2tal.backbones.slowfast.published import (
    MMACTION2_SLOWFAST,
    OPENTAD_SLOWFAST,
    PYTORCHVIDEO_MEAN,
    PYTORCHVIDEO_SLOWFAST,
    PYTORCHVIDEO_STD,
)
from re2tal.backbones.table import backbone
from re2tal.errors import check_within
from re2tal.reversible import part_of
from re2tal.reversible.branches import has_hooks


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowFastConfig:
    """Shape of a SlowFast. The defaults are SlowFast-50, 8x8.

    Attributes:
        depths: blocks of each stage, the same in both pathways.
        width: channels of the slow stem; the first stage has four times as many, and they double
            from stage to stage.
        alpha: frames of the fast pathway per frame of the slow one; the fast pathway gets every
            frame.
        channel_ratio: channels of the slow pathway per channel of the fast, the paper's 1 / beta.
        fusion_kernel: temporal kernel size of the lateral convolutions, odd.
        fusion_norm: add a BatchNorm and a ReLU after each lateral convolution, as in PyTorchVideo's
            weights; mmaction2's have none.
        relu_before_sum: in blocks that change the shape, apply the ReLU to the branch, before the
            sum, as in rewired blocks. OpenTAD's published Re2SlowFast was trained this way.
        temporal_stride: frames per feature. Re2TAL uses 4 on ActivityNet and 2 on THUMOS-14.
        frozen_statistics: keep the BatchNorm statistics of the weights in training, because those
            of a batch of a few long videos are poor. Set it to false when training from scratch.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    alpha: int = 4
    channel_ratio: int = 8
    fusion_kernel: int = 7
    fusion_norm: bool = False
    relu_before_sum: bool = False
    temporal_stride: int = 4
    frozen_statistics: bool = True

    def __post_init__(self) -> None:
        check_within(
            self,
            depths=(1, 512),
            width=(1, 2**14),
            alpha=(1, 2**10),
            channel_ratio=(1, 2**14),
            fusion_kernel=(1, 2**10),
            temporal_stride=(1, 2**16),
        )
        if not 1 <= len(self.depths) <= 8:
            raise ValueError(f"A SlowFast needs 1 to 8 stages, but got {len(self.depths)}.")
        if self.width % self.channel_ratio:
            raise ValueError(
                f"The width of a SlowFast must be a multiple of its channel_ratio, but "
                f"{self.width} is not a multiple of {self.channel_ratio}."
            )
        if self.fusion_kernel % 2 != 1:
            raise ValueError(
                f"The fusion_kernel of a SlowFast must be odd, so that it is centred, but is "
                f"{self.fusion_kernel}."
            )

    def with_stride(self, stride: int) -> SlowFastConfig:
        """Return the same backbone with features resampled to another number of frames per feature.

        Raises:
            ValueError: the stride is below 1.
        """
        return replace(self, temporal_stride=stride)

    def build(self) -> SlowFastBackbone:
        """Build a backbone of this shape, with random weights."""
        return SlowFastBackbone(self)


@backbone(layouts=(MMACTION2_SLOWFAST,))
def slowfast_50() -> SlowFastConfig:
    """SlowFast-50, 8x8: the slow pathway sees 8 of 32 frames."""
    return SlowFastConfig()


@backbone(layouts=(MMACTION2_SLOWFAST,))
def slowfast_101() -> SlowFastConfig:
    """SlowFast-101, 8x8, the larger backbone of Re2TAL."""
    return SlowFastConfig(depths=(3, 4, 23, 3))


@backbone(mean=PYTORCHVIDEO_MEAN, std=PYTORCHVIDEO_STD, layouts=(PYTORCHVIDEO_SLOWFAST,))
def pytorchvideo_slowfast_50() -> SlowFastConfig:
    """SlowFast-50, 8x8, for PyTorchVideo's weights."""
    return SlowFastConfig(fusion_norm=True)


@backbone(mean=PYTORCHVIDEO_MEAN, std=PYTORCHVIDEO_STD, layouts=(PYTORCHVIDEO_SLOWFAST,))
def pytorchvideo_slowfast_101() -> SlowFastConfig:
    """SlowFast-101, 8x8, for PyTorchVideo's weights."""
    return SlowFastConfig(depths=(3, 4, 23, 3), fusion_norm=True, fusion_kernel=5)


@backbone(layouts=(OPENTAD_SLOWFAST,))
def re2_slowfast_101() -> SlowFastConfig:
    """SlowFast-101, 8x8, for OpenTAD's published Re2SlowFast-101."""
    return SlowFastConfig(depths=(3, 4, 23, 3), relu_before_sum=True)


@backbone()
def slowfast_toy() -> SlowFastConfig:
    """Small SlowFast for the toy data set, trained from scratch."""
    return SlowFastConfig(
        depths=(3, 3), width=32, channel_ratio=4, temporal_stride=2, frozen_statistics=False
    )


class Pathway(nn.Module):
    """One of the two networks: a stem `conv1` and residual stages `layer1`, `layer2` and so on.

    Stages after the first keep the number of frames and halve height and width.

    Args:
        width: channels of the stem.
        depths: blocks of each stage.
        stem_frames: temporal kernel size of the stem.
        temporal_from: index of the first stage whose blocks convolve in time.
        joined: channels that are concatenated to the input of each stage.
        relu_before_sum: flag of `SlowFastConfig`.
    """

    def __init__(
        self,
        *,
        width: int,
        depths: Sequence[int],
        stem_frames: int,
        temporal_from: int,
        joined: Sequence[int],
        relu_before_sum: bool,
    ) -> None:
        super().__init__()
        self.conv1 = Stem(width, stem_frames)
        inputs = _inputs(width, len(depths))
        for index, depth in enumerate(depths):
            built = stage(
                inputs[index] + joined[index],
                width * 2**index,
                depth=depth,
                frames=3 if index >= temporal_from else 1,
                stride=1 if index == 0 else 2,
                relu_before_sum=relu_before_sum,
            )
            self.add_module(f"layer{index + 1}", built)


class SlowFastBackbone(nn.Module):
    """SlowFast (Feichtenhofer et al., ICCV 2019, arXiv 1812.03982) without its classifier.

    The slow pathway is wide and sees one frame in `alpha`; the fast pathway is narrow and sees all.
    Before each stage, the fast features are concatenated to the slow ones. The results of both are
    averaged over space, resampled to one rate and concatenated, the slow ones first.

    Parameters have mmaction2's names; see `published.py` for published files, and
    `re2tal.backbones.protocol.Backbone` for the attributes.
    """

    def __init__(self, config: SlowFastConfig) -> None:
        super().__init__()
        stages = len(config.depths)
        narrow = config.width // config.channel_ratio
        spoken = _inputs(narrow, stages)  # channels of the fast pathway before each stage
        self.slow_path = Pathway(
            width=config.width,
            depths=config.depths,
            stem_frames=1,
            # Section 3.4: temporal convolutions in the slow pathway's early stages lower accuracy.
            temporal_from=stages // 2,
            joined=[2 * channels for channels in spoken],  # lateral convolutions double them
            relu_before_sum=config.relu_before_sum,
        )
        self.fast_path = Pathway(
            width=narrow,
            depths=config.depths,
            stem_frames=5,
            temporal_from=0,
            joined=[0] * stages,
            relu_before_sum=config.relu_before_sum,
        )
        self._layers = [f"layer{index + 1}" for index in range(stages)]
        self._laterals = [f"{name}_lateral" for name in ("conv1", *self._layers[:-1])]
        for name, channels in zip(self._laterals, spoken, strict=True):
            lateral = Lateral(
                channels,
                frames=config.fusion_kernel,
                stride=config.alpha,
                norm=config.fusion_norm,
            )
            self.slow_path.add_module(name, lateral)
        self.channels = EXPANSION * 2 ** (stages - 1) * (config.width + narrow)
        self.temporal_stride = config.temporal_stride
        self.relu_before_sum = config.relu_before_sum
        self.multiple = lcm(config.temporal_stride, config.alpha)
        self._alpha = config.alpha
        self._frozen_statistics = config.frozen_statistics
        self._depths = config.depths
        self.train()

    def train(self, mode: bool = True) -> SlowFastBackbone:
        """Set training mode; BatchNorms with frozen statistics stay in evaluation mode."""
        super().train(mode)
        if self._frozen_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.eval()
        return self

    def forward(self, video: Tensor) -> Tensor:
        """Compute spatially pooled features; see `Backbone`.

        Raises:
            ValueError: T is not a multiple of `multiple`.
        """
        frames = video.shape[2]
        whole = self.multiple
        if frames == 0 or frames % whole:
            raise ValueError(
                f"This SlowFast takes a multiple of {whole} frames, but got {frames}. Choose "
                "another window, or pad it."
            )
        length = frames // self.temporal_stride
        # pooled over space first, so that resampling is cheap
        pooled = [resample(x.mean(dim=(3, 4)), length) for x in self.pathways(video)]
        return torch.cat(pooled, dim=1)

    def layer_of(self, name: str) -> int:
        """Return the layer as in `Backbone`; both pathways' blocks are counted in parallel.

        A lateral connection has the layer of the block before it.
        """
        _, part, index, *_ = name.split(".")
        if part.startswith("conv1"):
            return 0
        stage = int(part.removeprefix("layer").removesuffix("_lateral"))
        if part.endswith("_lateral"):
            return sum(self._depths[:stage])
        return 1 + sum(self._depths[: stage - 1]) + int(index)

    @property
    def reads_once(self) -> bool:
        """See `Backbone`; the fast pathway's stem reads last."""
        return not any(map(has_hooks, (self, self.slow_path.conv1, self.fast_path.conv1)))

    def pathways(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features of both pathways before pooling, from `forward`'s input.

        Returns:
            Slow features `(B, C_slow, T / alpha, H', W')` and fast ones `(B, C_fast, T, H', W')`.
        """
        slow_path, fast_path = self.slow_path, self.fast_path
        slow = slow_path.conv1(part_of(video, lambda frames: frames[:, :, :: self._alpha]))
        fast = fast_path.conv1(video)
        for lateral, layer in zip(self._laterals, self._layers, strict=True):
            told = slow_path.get_submodule(lateral)(fast)
            slow = slow_path.get_submodule(layer)(torch.cat((slow, told), dim=1))
            fast = fast_path.get_submodule(layer)(fast)
        return slow, fast


def _inputs(width: int, stages: int) -> list[int]:
    """List the channels of a pathway before each stage."""
    return [width, *(EXPANSION * width * 2**index for index in range(stages - 1))]
