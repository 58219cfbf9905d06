"""VSGN: a graph over features of two scales, anchors, and boundaries that are adjusted."""

from re2tal.localizers.vsgn.model import VSGN, VSGNConfig

__all__ = ["VSGN", "VSGNConfig"]
