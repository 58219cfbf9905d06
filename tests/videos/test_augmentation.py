"""Clips are changed as wholes, as their seeds say and as torchvision defines it."""

import colorsys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from re2tal.memory.live import LiveBytes
from re2tal.videos import augmentation
from re2tal.videos.augmentation import AugmentationConfig, Tempo, augment, clip_seed
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window

SOURCE, SIZE = 80, 64
CROP = AugmentationConfig(source_size=SOURCE, crop_area=(0.1, 1.0), flip=0.5)
FULL = replace(CROP, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1)
SEED = 28_200_261  # of `_window()` with seed 0 in epoch 0


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of these tests go through in parts of two frames."""
    monkeypatch.setattr(augmentation, "_PIXELS", 2 * SOURCE * SOURCE)


def _noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _window(**changes: Any) -> Window:
    grid = TimeGrid(fps=12.0, stride=2, length=64, offset=changes.pop("offset", 3.25))
    nothing: dict[str, Any] = {"segments": np.zeros((0, 2)), "labels": np.zeros(0, np.int64)}
    return Window(**{"video_id": "a video", "grid": grid, "valid": 64, **nothing, **changes})


def test_by_default_nothing_changes() -> None:
    frames = _noise(2, 3, SIZE, SIZE, 3)
    assert augment(frames, AugmentationConfig(), size=SIZE, seeds=[1, 2]) is frames
    assert AugmentationConfig(source_size=SOURCE).decoded_size(SIZE) == SIZE


def test_frames_are_decoded_as_large_as_crops_want_them() -> None:
    assert CROP.decoded_size(SIZE) == SOURCE
    assert replace(CROP, source_size=None).decoded_size(SIZE) == SIZE


def test_all_frames_of_a_clip_are_changed_alike_and_clips_are_not() -> None:
    still = _noise(1, 1, SOURCE, SOURCE, 3).expand(3, 5, -1, -1, -1)
    result = augment(still, FULL, size=SIZE, seeds=[1, 2, 3])
    assert result.shape == (3, 5, SIZE, SIZE, 3)
    assert result.dtype == torch.uint8
    assert torch.equal(result, result[:, :1].expand_as(result))
    assert not any(torch.equal(result[a], result[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_frame_is_changed_as_it_would_be_alone() -> None:
    frames = _noise(2, 5, SOURCE, SOURCE, 3)
    result = augment(frames, FULL, size=SIZE, seeds=[11, 12])
    for clip, seed in enumerate((11, 12)):
        for frame in range(5):
            alone = frames[clip : clip + 1, frame : frame + 1]
            assert torch.equal(
                augment(alone, FULL, size=SIZE, seeds=[seed])[0, 0], result[clip, frame]
            )


def _found_crop(ramps: np.ndarray) -> tuple[slice, slice, bool]:
    """Rows, columns and whether it is mirrored, from what became of `_ramps`."""
    inner = np.arange(8, SIZE - 8)
    down, across = ramps[inner, SIZE // 2, 1], ramps[SIZE // 2, inner, 0]
    found = []
    for values in (down, across):
        slope, start = np.polyfit(inner + 0.5, values / 3.0, 1)  # of pixel centres
        found.append(sorted((round(start + 0.5), round(start + 0.5 + slope * SIZE))))
    (top, bottom), (left, right) = found
    return slice(top, bottom), slice(left, right), bool(across[0] > across[-1])


def test_crops_and_flips_are_those_of_a_slow_definition() -> None:
    ramps = torch.zeros(1, 1, SOURCE, SOURCE, 3, dtype=torch.uint8)
    ramps[..., 0] = 3 * torch.arange(SOURCE)  # red tells the column, green the row
    ramps[..., 1] = 3 * torch.arange(SOURCE)[:, None]
    noise = _noise(1, 1, SOURCE, SOURCE, 3)
    areas, aspects, flips = [], [], []
    for seed in range(24):
        frames = torch.cat([ramps, noise], dim=1)
        place, picture = augment(frames, CROP, size=SIZE, seeds=[seed])[0].numpy()
        rows, columns, flipped = _found_crop(place.astype(np.float64))
        height, width = rows.stop - rows.start, columns.stop - columns.start
        cut = Image.fromarray(noise[0, 0, rows, columns].numpy())
        expected = np.asarray(cut.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.int16)
        if flipped:
            expected = expected[:, ::-1]
        assert np.abs(picture.astype(np.int16) - expected).max() <= 1
        areas.append(width * height / SOURCE**2)
        aspects.append(width / height)
        flips.append(flipped)
    assert 0.09 <= min(areas) < 0.4
    assert 0.6 < max(areas) <= 1
    assert 0.73 <= min(aspects) < 0.85  # whole pixels
    assert 1.2 < max(aspects) <= 1.37
    assert 4 < sum(flips) < 20


def _grey(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([0.2989, 0.587, 0.114])[:, None]


def _turned(pixels: np.ndarray, turn: float) -> np.ndarray:
    turned = []
    for red, green, blue in pixels / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        turned.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    return 255 * np.array(turned)


COLOURS: dict[str, tuple[float, float, Callable[[np.ndarray, float], np.ndarray]]] = {
    "brightness": (0.4, 1.0, lambda x, f: f * x),
    "contrast": (0.4, 1.0, lambda x, f: f * x + (1 - f) * _grey(x).mean()),
    "saturation": (0.4, 1.0, lambda x, f: f * x + (1 - f) * _grey(x)),
    "hue": (0.2, 0.0, _turned),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_change_as_defined_and_no_more_than_allowed(name: str) -> None:
    strength, middle, definition = COLOURS[name]
    changes: dict[str, Any] = {name: strength}
    config = AugmentationConfig(**changes)
    frames = _noise(1, 1, 6, 6, 3)
    pixels = frames[0, 0].reshape(-1, 3).numpy().astype(np.float64)
    factors = np.linspace(middle - strength, middle + strength, 401)
    defined = np.stack([definition(pixels, factor).clip(0, 255) for factor in factors])
    found = []
    for seed in range(8):
        result = augment(frames, config, size=6, seeds=[seed])[0, 0].reshape(-1, 3).numpy()
        errors = np.abs(defined - result).max(axis=(1, 2))
        assert errors.min() < 2  # what is between two factors, and rounding
        found.append(factors[errors.argmin()])
    assert np.ptp(found) > 0.5 * strength


def test_a_clip_depends_on_its_seed_and_not_on_its_batch() -> None:
    frames = _noise(3, 2, SOURCE, SOURCE, 3)
    whole = augment(frames, FULL, size=SIZE, seeds=[5, 6, 7])
    assert torch.equal(augment(frames[[2, 0]], FULL, size=SIZE, seeds=[7, 5]), whole[[2, 0]])
    assert not torch.equal(augment(frames[:1], FULL, size=SIZE, seeds=[8]), whole[:1])


def test_global_generators_matter_not_and_stay_as_they_were() -> None:
    frames = _noise(1, 2, SOURCE, SOURCE, 3)
    first = augment(frames, FULL, size=SIZE, seeds=[3])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(99)
        before = torch.get_rng_state()
        assert torch.equal(augment(frames, FULL, size=SIZE, seeds=[3]), first)
        assert torch.equal(torch.get_rng_state(), before)


def test_padding_stays_black() -> None:
    frames = _noise(1, 4, SOURCE, SOURCE, 3)
    frames[:, 2:] = 0
    for seed in range(6):
        result = augment(frames, FULL, size=SIZE, seeds=[seed])
        assert result[:, :2].flatten(2).any(dim=2).all()
        assert not result[:, 2:].any()


def test_memory_beside_the_result_does_not_grow_with_the_clip() -> None:
    beside = []
    for length in (4, 16):
        frames = _noise(1, length, SOURCE, SOURCE, 3)
        with LiveBytes(torch.nn.Identity()) as live:
            result = augment(frames, FULL, size=SIZE, seeds=[3])
        beside.append(live.memory().peak - frames.nbytes - result.nbytes)
    assert 0 < beside[1] <= 1.05 * beside[0]


def test_a_seed_is_of_the_window_and_the_epoch_and_the_same_everywhere() -> None:
    window = _window()
    assert clip_seed(window, seed=0, epoch=0) == SEED  # in every process, on every machine
    others = [
        clip_seed(window, seed=1, epoch=0),
        clip_seed(window, seed=0, epoch=1),
        clip_seed(_window(video_id="another"), seed=0, epoch=0),
        clip_seed(_window(offset=3.5), seed=0, epoch=0),
        clip_seed(_window(valid=20), seed=0, epoch=0),
    ]
    assert len({SEED, *others}) == 6
    numpy = _window(offset=np.float64(3.25))
    assert clip_seed(numpy, seed=0, epoch=0) == SEED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source_size", 0),
        ("crop_area", (0.0, 1.0)),
        ("crop_area", (0.8, 0.5)),
        ("crop_area", (0.5, 1.5)),
        ("crop_aspect", (0.0, 1.0)),
        ("crop_aspect", (2.0, 0.5)),
        ("crop_aspect", (1.0, float("inf"))),
        ("flip", -0.1),
        ("flip", 1.1),
        ("brightness", float("nan")),
        ("contrast", -1.0),
        ("saturation", 2.0),
        ("hue", 0.6),
        ("speed", (0.0, 1.0)),
        ("speed", (1.5, 0.8)),
        ("speed", (1.0, float("nan"))),
        ("reverse", -0.1),
    ],
)
def test_a_setting_out_of_its_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"AugmentationConfig\.{field} must be"):
        AugmentationConfig(**{field: value})  # type: ignore[arg-type]


def test_the_tempo_of_clips_is_drawn_from_its_range_and_each_change_by_itself() -> None:
    def drawn(config: AugmentationConfig) -> list[Tempo]:
        random = np.random.default_rng(0)
        return [config.tempo(random) for _ in range(400)]

    plain = drawn(AugmentationConfig())
    assert {(tempo.speed, tempo.backwards) for tempo in plain} == {(1.0, False)}
    both = drawn(AugmentationConfig(speed=(0.5, 2.0), reverse=0.25))
    speeds = np.array([tempo.speed for tempo in both])
    assert 0.5 <= speeds.min() < 0.51 < 1.95 < speeds.max() <= 2.0
    assert (speeds < 1).mean() == pytest.approx(0.5, abs=0.07)  # half as fast as often as twice
    assert np.mean([tempo.backwards for tempo in both]) == pytest.approx(0.25, abs=0.06)
    faster = drawn(AugmentationConfig(speed=(0.5, 2.0)))
    assert [tempo.speed for tempo in faster] == speeds.tolist()
    assert AugmentationConfig(speed=(0.5, 2.0)).densest(12.0) == 24.0
    assert AugmentationConfig().densest(12.0) == 12.0
    assert AugmentationConfig(speed=(0.5, 2.0)).densest(None) is None


def test_arguments_that_do_not_fit_together_are_refused() -> None:
    frames = _noise(2, 3, SOURCE, SOURCE, 3)
    with pytest.raises(ValueError, match="80 x 80 pixels are to become 64 x 64, but crop_area is"):
        augment(frames, replace(FULL, crop_area=None), size=SIZE, seeds=[1, 2])
    with pytest.raises(ValueError, match="2 clips need one seed each, but got 1"):
        augment(frames, FULL, size=SIZE, seeds=[1])
    with pytest.raises(ValueError, match=r"must be uint8 \(B, T, H, W, 3\)"):
        augment(frames.float(), FULL, size=SIZE, seeds=[1, 2])
