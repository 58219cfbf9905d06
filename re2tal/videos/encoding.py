"""Writing H.264, for data that the project makes."""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np


def encode(
    target: Path | BinaryIO, frames: Iterable[np.ndarray], *, fps: int, quality: int = 30
) -> None:
    """Writes frames as an H.264 mp4; the same frames give the same bytes.

    Args:
        target: file to write, or an open one that can seek.
        frames: RGB pictures, uint8 `(H, W, 3)` with even H and W, all of one size.
        fps: frames per second.
        quality: x264's constant rate factor; higher is smaller and noisier, 30 shows its blocks.

    Raises:
        ValueError: if there are no frames.
    """
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.pix_fmt = "yuv420p"
        # one thread, because x264's output depends on their number
        stream.thread_count = 1
        stream.options = {"crf": str(quality), "preset": "veryfast", "g": str(2 * fps)}
        empty = True
        for picture in frames:
            if empty:
                stream.height, stream.width = picture.shape[:2]
                empty = False
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if empty:
            raise ValueError("A video needs at least one frame.")
        container.mux(stream.encode())
