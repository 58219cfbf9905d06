"""SlowFast (Feichtenhofer et al., ICCV 2019, arXiv 1812.03982), without mmaction2."""

from re2tal.backbones.slowfast.network import (
    SlowFastBackbone,
    SlowFastConfig,
    pytorchvideo_slowfast_50,
    pytorchvideo_slowfast_101,
    re2_slowfast_101,
    slowfast_50,
    slowfast_101,
    slowfast_toy,
)

__all__ = [
    "SlowFastBackbone",
    "SlowFastConfig",
    "pytorchvideo_slowfast_50",
    "pytorchvideo_slowfast_101",
    "re2_slowfast_101",
    "slowfast_50",
    "slowfast_101",
    "slowfast_toy",
]
