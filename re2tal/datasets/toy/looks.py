"""Looks of toy videos: palettes, sprites and backgrounds, drawn procedurally.

There are two galleries without common palettes, sprite shapes or background patterns: one for the
untrimmed detection videos, one for the clips on which a backbone is pretrained.
"""

from dataclasses import dataclass
from math import pi
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Image: TypeAlias = NDArray[np.floating[Any]]

TEXELS = 4
"""Texture points per pixel and side. With four, the nearest point is as good as interpolation."""

SPRITE_TEXTURE = 160
"""Height and width of a sprite's texture."""

SPRITE_REACH = 1.2
"""Half the width of a sprite's texture, in radii of the sprite."""

BACKGROUND_TEXTURE = 224
"""Height and width of a background, in pixels; it repeats seamlessly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """Colour scheme, as ``#rrggbb``."""

    deep: str
    ground: str
    bright: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Looks that a set of videos may use.

    Attributes:
        palettes: colour schemes.
        shapes: (family, lobes) of the sprites' outlines.
        patterns: names of background patterns.
    """

    palettes: tuple[Palette, ...]
    shapes: tuple[tuple[str, int], ...]
    patterns: tuple[str, ...]


DETECTION_GALLERY = Gallery(
    palettes=(
        Palette(
            deep="#1d2b45", ground="#35527a", bright=("#f6ae5b", "#f2e3c6", "#e2604f", "#7fc8c2")
        ),
        Palette(
            deep="#2a2440", ground="#54457a", bright=("#f7c4c1", "#f28a78", "#fbe6b0", "#86b6e8")
        ),
        Palette(
            deep="#123a3c", ground="#2b6b66", bright=("#f8dd8a", "#f29b63", "#e9f1dc", "#e26d7c")
        ),
        Palette(
            deep="#4a3546", ground="#8a5f6c", bright=("#fbe3c2", "#f3a683", "#8fd0c4", "#f7d35e")
        ),
    ),
    shapes=(("flower", 5), ("flower", 8), ("star", 4), ("star", 6), ("gear", 7), ("blob", 3)),
    patterns=("dots", "waves", "clouds"),
)
"""Looks of the untrimmed videos."""

PRETRAINING_GALLERY = Gallery(
    palettes=(
        Palette(
            deep="#20303a", ground="#48646e", bright=("#ffd166", "#ef8354", "#e8eef0", "#9ad1d4")
        ),
        Palette(
            deep="#33271f", ground="#6d5540", bright=("#f4e1c1", "#e9a44c", "#a9c7a0", "#dd6b4d")
        ),
        Palette(
            deep="#1c2f52", ground="#3f6aa1", bright=("#ffe9a8", "#ff9f80", "#f5f5f0", "#8be0d0")
        ),
        Palette(
            deep="#2c3a24", ground="#5b7346", bright=("#fff0b3", "#f2b66d", "#f08f8f", "#cfe8ef")
        ),
        Palette(
            deep="#3b2038", ground="#7b4670", bright=("#ffd9a0", "#f78fa7", "#bfe3f2", "#fff3d6")
        ),
        Palette(
            deep="#26282e", ground="#585c68", bright=("#f9c74f", "#f9844a", "#90be9d", "#f3f3f3")
        ),
    ),
    shapes=(
        ("flower", 3),
        ("flower", 4),
        ("flower", 6),
        ("flower", 7),
        ("star", 3),
        ("star", 5),
        ("star", 8),
        ("gear", 5),
        ("gear", 6),
        ("gear", 9),
        ("blob", 2),
        ("blob", 4),
    ),
    patterns=("stripes", "diamonds", "hills", "rings"),
)
"""Looks of the pretraining clips."""


def colour(code: str) -> Image:
    """Convert ``#rrggbb`` to RGB in [0, 255], shape (3,)."""
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32)


def _mix(a: Image, b: Image, share: Image) -> Image:
    """Blend two colours, (3,), by a map of shares (H, W) into (H, W, 3)."""
    return a + (b - a) * share[..., None]


def _radius(family: str, lobes: int, angle: Image, rng: np.random.Generator) -> Image:
    """Compute an outline in polar form: distance to the edge at each angle, at most 1."""
    wave = np.cos(lobes * angle)
    if family == "flower":
        return np.asarray(0.80 + 0.20 * wave)
    if family == "star":
        return np.asarray(0.60 + 0.40 * (1.0 - np.arccos(np.clip(wave, -1.0, 1.0)) / pi) ** 1.5)
    if family == "gear":
        return np.asarray(0.88 + 0.12 * np.tanh(4.0 * wave))
    tilt = np.cos((lobes + 1) * angle + rng.uniform(0.0, 2.0 * pi))
    return np.asarray(0.82 + 0.12 * wave + 0.06 * tilt)


def sprite_texture(gallery: Gallery, palette: Palette, rng: np.random.Generator) -> Image:
    """Draw a sprite: premultiplied RGBA, (SPRITE_TEXTURE, SPRITE_TEXTURE, 4), colours to 255.

    The two halves differ in shade and a spot lies off the centre, so that a rotation is visible
    whatever the symmetry of the outline.
    """
    family, lobes = gallery.shapes[int(rng.integers(len(gallery.shapes)))]
    first, second, third = rng.permutation(len(palette.bright))[:3]
    body, core, spot = (colour(palette.bright[int(i)]) for i in (first, second, third))
    axis = (np.arange(SPRITE_TEXTURE) + 0.5) / SPRITE_TEXTURE * 2.0 - 1.0
    u, v = np.meshgrid(axis * SPRITE_REACH, axis * SPRITE_REACH)
    distance, angle = np.hypot(u, v), np.arctan2(v, u)
    edge = _radius(family, int(lobes), angle, rng) - distance
    soft = SPRITE_TEXTURE / (2.0 * SPRITE_REACH) / TEXELS  # edges one pixel wide

    def inside(signed_distance: Image) -> Image:
        cover: Image = np.clip(signed_distance * soft + 0.5, 0.0, 1.0).astype(np.float32)
        return cover

    rgb = _mix(body, colour(palette.deep), 0.42 * inside(u + 0.12 * np.sin(5.0 * v)))
    rgb = _mix_into(rgb, core, inside(rng.uniform(0.34, 0.46) - distance))
    rgb = _mix_into(rgb, spot, inside(0.17 - np.hypot(u + 0.50, v)))
    rgb = _mix_into(rgb, colour(palette.deep), 0.75 * inside(0.13 - np.hypot(u - 0.16, v)))
    rgb = rgb * (1.0 + 0.16 * np.clip(-v - 0.4 * u, -1.0, 1.0))[..., None]  # lit from above
    rgb = _mix_into(rgb, colour(palette.deep), 0.65 * inside(0.085 - edge))  # a soft outline
    alpha = inside(edge)[..., None]
    out = np.concatenate([np.clip(rgb, 0.0, 255.0) * alpha, alpha], axis=2)
    return np.asarray(out, dtype=np.float32)


def _mix_into(rgb: Image, paint: Image, share: Image) -> Image:
    """Paint a colour (3,) over a picture (H, W, 3) by a map of shares (H, W)."""
    return np.asarray(rgb + (paint - rgb) * share[..., None])


def _clouds(cells: int, rng: np.random.Generator) -> Image:
    """Draw smooth periodic noise in [0, 1], with `cells` bumps per side."""
    grid = rng.uniform(size=(cells, cells))
    where = np.arange(BACKGROUND_TEXTURE) * cells / BACKGROUND_TEXTURE
    low = where.astype(int)
    share = where - low
    share = share * share * (3.0 - 2.0 * share)
    rows = grid[low] * (1 - share)[:, None] + grid[(low + 1) % cells] * share[:, None]
    return np.asarray(rows[:, low] * (1 - share) + rows[:, (low + 1) % cells] * share)


def _pattern(name: str, rng: np.random.Generator) -> Image:
    """Draw a seamless pattern in [0, 1], (BACKGROUND_TEXTURE, BACKGROUND_TEXTURE)."""
    axis = np.arange(BACKGROUND_TEXTURE) * (2.0 * pi / BACKGROUND_TEXTURE)
    x, y = np.meshgrid(axis, axis)
    count = int(rng.integers(5, 9))
    if name == "dots":
        return np.asarray(np.clip(3.0 * np.cos(count * x) * np.cos(count * y) - 1.0, 0.0, 1.0))
    if name == "waves":
        return np.asarray(0.5 + 0.5 * np.tanh(3.0 * np.sin(count * y + 1.2 * np.sin(3 * x))))
    if name == "stripes":
        return np.asarray(0.5 + 0.5 * np.tanh(3.0 * np.sin(count * x + (count - 2) * y)))
    if name == "diamonds":
        return np.asarray(np.clip(2.5 * (np.cos(count * x) + np.cos(count * y)) - 1.5, 0.0, 1.0))
    if name == "hills":
        return np.asarray(0.5 + 0.5 * np.tanh(4.0 * (np.sin(3 * y + 1.0 * np.sin(count * x)))))
    if name == "rings":
        distance = np.hypot(2.0 * np.sin(x), 2.0 * np.sin(y))
        return np.asarray(0.5 + 0.5 * np.tanh(3.0 * np.sin(count * distance)))
    return _clouds(2 * count, rng)


def background_texture(gallery: Gallery, palette: Palette, rng: np.random.Generator) -> Image:
    """Draw a background: RGB to 255, (BACKGROUND_TEXTURE, BACKGROUND_TEXTURE, 3), seamless."""
    pattern = _pattern(gallery.patterns[int(rng.integers(len(gallery.patterns)))], rng)
    rgb = _mix(colour(palette.deep), colour(palette.ground), _clouds(3, rng))
    accent = colour(palette.bright[int(rng.integers(len(palette.bright)))])
    rgb = _mix_into(rgb, 0.55 * accent + 0.45 * colour(palette.ground), 0.30 * pattern)
    rgb = _mix_into(rgb, colour(palette.ground), 0.6 * _clouds(7, rng))
    return np.asarray(rgb * (0.88 + 0.24 * _clouds(28, rng))[..., None], dtype=np.float32)


def bokeh_texture(palette: Palette, rng: np.random.Generator) -> Image:
    """Draw soft translucent discs: premultiplied RGBA, seamless, as large as a background."""
    size = BACKGROUND_TEXTURE
    out = np.zeros((size, size, 4), dtype=np.float32)
    for _ in range(14):
        radius = rng.uniform(6.0, 20.0)
        x, y = rng.uniform(0.0, size, size=2)
        paint = colour(palette.bright[int(rng.integers(len(palette.bright)))])
        axis = np.arange(size)
        # distance on a torus: the disc continues on the other side
        dx = np.abs((axis - x + size / 2) % size - size / 2)
        dy = np.abs((axis - y + size / 2) % size - size / 2)
        alpha = np.clip(0.5 * (radius - np.hypot(dx[None], dy[:, None])) + 0.5, 0.0, 1.0)
        alpha *= rng.uniform(0.10, 0.22)
        out *= 1.0 - alpha[..., None]
        out += np.concatenate([paint * alpha[..., None], alpha[..., None]], axis=2)
    return out
