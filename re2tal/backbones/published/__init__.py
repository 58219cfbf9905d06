"""Weights that others published, and how their names become ours.

Each layout is one small converter (`layout.py`); `load_backbone_weights` recognises it by itself.

    file                                          layout
    torchvision's Video Swin, ours                (as they are)
    mmaction2's, and the Video Swin authors'      `swin.py`
    OpenTAD's Re2Swin                             `swin.py`
    mmaction2's SlowFast                          `slowfast.py`
    PyTorchVideo's SlowFast                       `slowfast.py`
    OpenTAD's Re2SlowFast                         `slowfast.py`

Names, shapes and what is computed were read in the sources of these libraries (mmaction2 1.2,
Video-Swin-Transformer at db018fb, PyTorchVideo at f3142bb, OpenTAD at 3dd7b03). The published files
themselves were not at hand: one that differs from its library's source is refused with the list of
its differences.
"""

from re2tal.backbones.published.layout import Layout, WeightsMismatchError, WeightsReport
from re2tal.backbones.published.slowfast import (
    MMACTION2_SLOWFAST,
    OPENTAD_SLOWFAST,
    PYTORCHVIDEO_SLOWFAST,
)
from re2tal.backbones.published.swin import OPENTAD_SWIN, VIDEO_SWIN

LAYOUTS = (
    VIDEO_SWIN,
    OPENTAD_SWIN,
    MMACTION2_SLOWFAST,
    PYTORCHVIDEO_SLOWFAST,
    OPENTAD_SLOWFAST,
)
"""Every layout but our own."""

__all__ = ["LAYOUTS", "Layout", "WeightsMismatchError", "WeightsReport"]
