"""VSGN: graph network over features of two scales, anchors and boundary adjustment."""

from re2tal.localizers.vsgn.model import VSGN, VSGNConfig

__all__ = ["VSGN", "VSGNConfig"]
