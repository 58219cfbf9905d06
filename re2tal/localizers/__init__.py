"""Localizers: from temporal features to losses or scored segments."""

from re2tal.localizers.actionformer import ActionFormer, ActionFormerConfig
from re2tal.localizers.protocol import Localizer, LocalizerConfig, Losses, Targets
from re2tal.localizers.tridet import TriDet, TriDetConfig
from re2tal.localizers.vsgn import VSGN, VSGNConfig

__all__ = [
    "VSGN",
    "ActionFormer",
    "ActionFormerConfig",
    "Localizer",
    "LocalizerConfig",
    "Losses",
    "Targets",
    "TriDet",
    "TriDetConfig",
    "VSGNConfig",
]
