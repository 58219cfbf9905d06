import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation

from re2tal.videos.conversion import Converter

FORMATS = ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "nv12", "gray", "bgr24", "gbrp")


def noise(form: str) -> VideoFrame:
    values = np.random.default_rng(0).integers(0, 256, (54, 90, 3), dtype=np.uint8)
    return VideoFrame.from_ndarray(values, format="rgb24").reformat(format=form)


def in_one(frame: VideoFrame, width: int, height: int) -> np.ndarray:
    """What swscale gives when it goes to packed RGB directly, which is slower."""
    interpolation = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT
    picture = frame.reformat(
        width=width, height=height, format="rgb24", interpolation=interpolation
    )
    return picture.to_ndarray()


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_by_way_of_planes_is_the_same(form: str, full_range: bool) -> None:
    frame = noise(form)
    if full_range:
        frame.color_range = ColorRange.JPEG
    for size, width, height in ((28, 46, 28), (31, 52, 31), (80, 134, 80), (None, 90, 54)):
        converter = Converter(size)
        assert converter.shape(frame) == (height, width, 3)
        out = np.empty((height, width, 3), np.uint8)
        converter(frame, out)
        difference = np.abs(out.astype(int) - in_one(frame, width, height))
        assert difference.max() <= 1  # rounded otherwise when pictures are enlarged
        assert (difference > 0).mean() < 0.01


def test_only_the_place_of_a_picture_is_written() -> None:
    out = np.full((3, 28, 46, 3), 7, np.uint8)
    Converter(28)(noise("yuv420p"), out[1])
    np.testing.assert_array_equal(out[1], in_one(noise("yuv420p"), 46, 28))
    assert (out[[0, 2]] == 7).all()
