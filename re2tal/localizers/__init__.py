"""Localizers: from temporal features to losses or scored segments."""

from re2tal.localizers.actionformer import ActionFormer, ActionFormerConfig
from re2tal.localizers.protocol import Localizer, Losses, Targets

__all__ = ["ActionFormer", "ActionFormerConfig", "Localizer", "Losses", "Targets"]
