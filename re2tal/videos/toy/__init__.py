"""A toy data set that the project makes itself: actions that only their motion tells apart."""

from re2tal.videos.toy.dataset import (
    FPS,
    ToyClip,
    ToyConfig,
    make_clip,
    make_toy,
)
from re2tal.videos.toy.motion import ACTIONS, FRAME_SIZE

__all__ = ["ACTIONS", "FPS", "FRAME_SIZE", "ToyClip", "ToyConfig", "make_clip", "make_toy"]
