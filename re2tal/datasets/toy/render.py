"""Rendering of a toy scene with NumPy: nearest look-ups in textures of fourfold resolution."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from re2tal.datasets.toy.looks import (
    BACKGROUND_TEXTURE,
    SPRITE_REACH,
    SPRITE_TEXTURE,
    Image,
)
from re2tal.datasets.toy.scene import FRAME_SIZE, Scene, Sprite

_SHADOW_OFFSET = (2.5, 4.0)
_SHADOW_REACH = 1.15
_SHADOW = 0.38


def _window(texture: Image, offset: NDArray[np.float64]) -> Image:
    """Cut (FRAME_SIZE, FRAME_SIZE, C) from a padded texture at a fractional offset, bilinearly."""
    x, y = np.asarray(offset) % BACKGROUND_TEXTURE
    left, top = int(x), int(y)
    fx, fy = np.float32(x - left), np.float32(y - top)
    rows = texture[top : top + FRAME_SIZE + 1, left : left + FRAME_SIZE + 1]
    rows = rows[:-1] + fy * (rows[1:] - rows[:-1])
    return np.asarray(rows[:, :-1] + fx * (rows[:, 1:] - rows[:, :-1]))


def _pad(texture: Image) -> Image:
    """Repeat a seamless texture by one frame, so that every window is a plain slice."""
    return np.pad(texture, ((0, FRAME_SIZE + 1), (0, FRAME_SIZE + 1), (0, 0)), mode="wrap")


def _box(x: float, y: float, reach: float) -> tuple[slice, slice] | None:
    """Return rows and columns of the pixels within `reach` of a point; None if there are none."""
    left, right = max(int(x - reach), 0), min(int(x + reach) + 1, FRAME_SIZE)
    top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, FRAME_SIZE)
    if left >= right or top >= bottom:
        return None
    return slice(top, bottom), slice(left, right)


def _draw_shadow(canvas: Image, x: float, y: float, radius: float) -> None:
    """Darken a soft disc below a sprite; it is the same for every sprite and action."""
    x, y, reach = x + _SHADOW_OFFSET[0], y + _SHADOW_OFFSET[1], radius * _SHADOW_REACH
    box = _box(x, y, reach)
    if box is None:
        return
    dy = (np.arange(box[0].start, box[0].stop, dtype=np.float32) + 0.5 - y) / reach
    dx = (np.arange(box[1].start, box[1].stop, dtype=np.float32) + 0.5 - x) / reach
    fall = np.clip(1.0 - (dy * dy)[:, None] - (dx * dx)[None], 0.0, 0.5)
    canvas[box] *= (1.0 - 2.0 * _SHADOW * fall)[..., None]


def _draw_sprite(canvas: Image, sprite: Sprite, index: int) -> None:
    """Paint one sprite in its pose at frame `index`."""
    x, y = float(sprite.pose.x[index]), float(sprite.pose.y[index])
    radius = float(sprite.radius[index])
    _draw_shadow(canvas, x, y, radius)
    box = _box(x, y, radius * SPRITE_REACH)
    if box is None:
        return
    dy = np.arange(box[0].start, box[0].stop, dtype=np.float32) + np.float32(0.5 - y)
    dx = np.arange(box[1].start, box[1].stop, dtype=np.float32) + np.float32(0.5 - x)
    half = SPRITE_TEXTURE / 2.0
    zoom = half / (SPRITE_REACH * radius)
    cos = np.float32(zoom * np.cos(sprite.pose.angle[index]))
    sin = np.float32(zoom * np.sin(sprite.pose.angle[index]))
    column = ((cos * dx)[None] + (sin * dy + half)[:, None]).astype(np.int32)
    row = ((cos * dy + half)[:, None] - (sin * dx)[None]).astype(np.int32)
    # The border of a texture is empty, so corners of the box may be clipped to it.
    np.clip(column, 0, SPRITE_TEXTURE - 1, out=column)
    np.clip(row, 0, SPRITE_TEXTURE - 1, out=row)
    texel = sprite.texture.reshape(-1, 4).take(row * SPRITE_TEXTURE + column, axis=0)
    region = canvas[box]
    region *= 1.0 - texel[..., 3:]
    region += texel[..., :3]


def render(scene: Scene) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of a scene, each uint8 (FRAME_SIZE, FRAME_SIZE, 3) RGB."""
    background, bokeh = _pad(scene.background), _pad(scene.bokeh)
    axis = np.linspace(-1.0, 1.0, FRAME_SIZE, dtype=np.float32)
    vignette = (1.0 - 0.16 * (axis[:, None] ** 2 + axis[None] ** 2))[..., None]
    for index in range(len(scene.background_path)):
        canvas = _window(background, scene.background_path[index])
        haze = _window(bokeh, scene.bokeh_path[index])
        canvas *= 1.0 - haze[..., 3:]
        canvas += haze[..., :3]
        for sprite in scene.sprites:
            _draw_sprite(canvas, sprite, index)
        canvas *= vignette
        yield np.clip(canvas, 0.0, 255.0).astype(np.uint8)
