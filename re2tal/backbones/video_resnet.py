"""Video ResNets R3D, MC3 and R(2+1)D (Tran et al., CVPR 2018, arXiv 1711.11248).

They are convolutional, so windows may have any multiple of the temporal stride as length. The
classes are torchvision's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.video import resnet

from re2tal.backbones.clips import check_window
from re2tal.backbones.table import backbone
from re2tal.errors import check_within
from re2tal.reversible.branches import has_hooks
from re2tal.weights import Colour

MEAN: Colour = (0.43216, 0.394666, 0.37645)
STD: Colour = (0.22803, 0.22145, 0.216989)

# Kind -> stem, and convolutions of the four stages.
_KINDS: dict[str, tuple[Any, list[Any]]] = {
    "r3d": (resnet.BasicStem, [resnet.Conv3DSimple] * 4),
    "mc3": (resnet.BasicStem, [resnet.Conv3DSimple, *[resnet.Conv3DNoTemporal] * 3]),
    "r2plus1d": (resnet.R2Plus1dStem, [resnet.Conv2Plus1D] * 4),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoResNetConfig:
    """Shape of a video ResNet of basic blocks, 64 to 512 channels wide.

    Attributes:
        kind: form of the convolutions: joint in space and time ("r3d"), joint in the first stage
            and spatial afterwards ("mc3"), or spatial and temporal in turn ("r2plus1d").
        depths: blocks of each stage.
        strides: temporal strides of the second to the fourth stage; 1 removes a stride, which
            changes no weight.
        pooling: number of consecutive features that are averaged.
    """

    kind: Literal["r3d", "mc3", "r2plus1d"] = "r2plus1d"
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    strides: tuple[int, int, int] = (2, 2, 2)
    pooling: int = 1

    def __post_init__(self) -> None:
        check_within(self, depths=(1, 512), strides=(1, 2), pooling=(1, 2**10))
        if len(self.depths) != 4 or len(self.strides) != 3:
            raise ValueError(
                "A video ResNet has four stages, and strides of the last three, but got depths "
                f"{self.depths} and strides {self.strides}."
            )
        if self.kind == "mc3" and self.strides != (1, 1, 1):
            raise ValueError(
                "Convolutions of mc3 have no temporal strides: VideoResNetConfig.strides must be "
                f"1 1 1, but is {self.strides}."
            )

    def with_stride(self, stride: int) -> VideoResNetConfig:
        """Return the same backbone with another number of frames per feature.

        For a smaller number, the strides of the last stages are removed; for a larger one, features
        are averaged.

        Raises:
            ValueError: the backbone does not support that stride.
        """
        whole = 1 if self.kind == "mc3" else 8
        if stride in (1, 2, 4, 8) and stride <= whole:
            strides = (min(stride, 2), 2 if stride > 2 else 1, 2 if stride > 4 else 1)
            return replace(self, strides=strides, pooling=1)
        if stride < 1 or stride % whole:
            below = "" if whole == 1 else "1, 2, 4 or "
            raise ValueError(f"The stride must be {below}a multiple of {whole}, not {stride}.")
        return replace(self.with_stride(whole), pooling=stride // whole)

    def build(self) -> VideoResNetBackbone:
        """Build a backbone of this shape, with random weights."""
        return VideoResNetBackbone(self)


class VideoResNetBackbone(resnet.VideoResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's `VideoResNet` without its classifier, pooled over space only.

    See `re2tal.backbones.protocol.Backbone` for the attributes.
    """

    def __init__(self, config: VideoResNetConfig) -> None:
        stem, convolutions = _KINDS[config.kind]
        super().__init__(resnet.BasicBlock, convolutions, list(config.depths), stem)
        self.channels = 512 * resnet.BasicBlock.expansion
        self.fc = self.avgpool = nn.Identity()
        for stage, stride in zip(self._stages[1:], config.strides, strict=True):
            for module in stage.modules():
                # also the stage's downsampling shortcut
                if isinstance(module, nn.Conv3d) and module.stride[0] > stride:
                    module.stride = (stride, *module.stride[1:])
        self._depths = config.depths
        self._pooling = config.pooling
        self.temporal_stride = self.multiple = prod(config.strides) * config.pooling

    @property
    def _stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, video: Tensor) -> Tensor:
        """Compute spatially pooled features; see `Backbone`."""
        check_window(video, self.multiple)
        x = self.stem(video)
        for stage in self._stages:
            x = stage(x)
        pooled: Tensor = x.mean(dim=(3, 4)).unflatten(2, (-1, self._pooling)).mean(dim=3)
        return pooled

    @property
    def reads_once(self) -> bool:
        """See `Backbone`."""
        return not (has_hooks(self) or has_hooks(self.stem))

    def layer_of(self, name: str) -> int:
        """Return the layer as in `Backbone`."""
        part, *rest = name.split(".")
        if part == "stem":
            return 0
        stage = int(part.removeprefix("layer")) - 1
        return 1 + sum(self._depths[:stage]) + int(rest[0])


@backbone(mean=MEAN, std=STD, weights=("torchvision:r3d_18/KINETICS400_V1",))
def r3d_18() -> VideoResNetConfig:
    """R3D-18, the shape of torchvision's `r3d_18`."""
    return VideoResNetConfig(kind="r3d")


@backbone(mean=MEAN, std=STD, weights=("torchvision:mc3_18/KINETICS400_V1",))
def mc3_18() -> VideoResNetConfig:
    """MC3-18, the shape of torchvision's `mc3_18`."""
    return VideoResNetConfig(kind="mc3", strides=(1, 1, 1))


@backbone(mean=MEAN, std=STD, weights=("torchvision:r2plus1d_18/KINETICS400_V1",))
def r2plus1d_18() -> VideoResNetConfig:
    """R(2+1)D-18, the shape of torchvision's `r2plus1d_18`."""
    return VideoResNetConfig()
