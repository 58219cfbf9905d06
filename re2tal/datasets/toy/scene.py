"""Content of a toy video before rendering: paths of the sprites, and times of the actions.

An action is a periodic pattern on top of a slow straight carrier motion. Position, size and angle
in a single frame have the same distribution for all actions: an action that does not move a
quantity holds it at a random phase of the actions that do. Only the change over time distinguishes
the classes.

Units: pixels of the rendered frame, seconds, radians; ``y`` points down as in images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi
from typing import TypeAlias

import numpy as np

from re2tal.datasets.toy.looks import (
    Gallery,
    Image,
    background_texture,
    bokeh_texture,
    sprite_texture,
)
from re2tal.datasets.toy.motions import MOTIONS, Draw, Floats

FRAME_SIZE = 112
"""Height and width of a rendered frame, in pixels."""

ACTIONS = ("bounce", "orbit", "pulse", "shake", "spin", "zigzag")
"""Class names, sorted."""

UNSEEN_ACTIONS = tuple(MOTIONS)
"""Sorted class names of the second set, on which no weights of this repository were trained."""

_CENTRE_RANGE = (30.0, FRAME_SIZE - 30.0)
_CARRIER_SPEED = (2.0, 9.0)
_SIZE_SWING = (0.30, 0.42)
_IDLE_TURN = 0.35
"""Greatest angular speed outside `spin`, in radians per second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Position, size and angle of the actor at each of T times.

    Attributes:
        x: (T,) horizontal centre in pixels.
        y: (T,) vertical centre in pixels, downwards.
        log_size: (T,) natural logarithm of the size relative to the actor's own radius.
        angle: (T,) radians.
    """

    x: Floats
    y: Floats
    log_size: Floats
    angle: Floats


Motion: TypeAlias = Callable[[Floats], Pose]
"""Function from seconds since the start of the motion, (T,), to the poses at those times."""


def _triangle(phase: Floats) -> Floats:
    """Compute a triangle wave in [-1, 1] with period 1 and mean zero."""
    return np.asarray(4.0 * np.abs(phase - np.floor(phase + 0.5)) - 1.0)


def action(name: str, duration: float, angle: float, rng: np.random.Generator) -> Motion:
    """Draw one instance of an action.

    Args:
        name: one of `ACTIONS` or `UNSEEN_ACTIONS`.
        duration: duration of the action in seconds; the carrier is centred in it.
        angle: actor's angle at the start, radians.
        rng: source of every random choice. The number of draws does not depend on `name`.

    Returns:
        The motion, defined for times in [0, duration].

    Raises:
        ValueError: `name` is unknown.
    """
    if name not in (*ACTIONS, *UNSEEN_ACTIONS):
        known = ", ".join((*ACTIONS, *UNSEEN_ACTIONS))
        raise ValueError(f"unknown toy action {name!r}; the actions are {known}")
    middle = rng.uniform(*_CENTRE_RANGE, size=2)
    heading = rng.uniform(0.0, 2.0 * pi)
    if name == "zigzag":  # sideways swings look like a zigzag only if the carrier is across them
        heading = pi / 2 * np.sign(np.sin(heading)) + rng.uniform(-0.6, 0.6)
    velocity = rng.uniform(*_CARRIER_SPEED) * np.array([np.cos(heading), np.sin(heading)])
    hold = rng.uniform(5.0, 14.0) * np.exp(1j * rng.uniform(0.0, 2.0 * pi))
    swing = rng.uniform(*_SIZE_SWING)
    phase, amount, speed, turn = rng.uniform(size=4)
    sign = rng.choice([-1.0, 1.0])

    def pose(t: Floats) -> Pose:
        dx, dy = np.full_like(t, hold.real), np.full_like(t, hold.imag)
        size = np.full_like(t, swing * np.sin(2.0 * pi * phase))
        rate = _IDLE_TURN * (2.0 * turn - 1.0)
        turned = np.zeros_like(t)
        if name in MOTIONS:
            draw = Draw(phase=phase, amount=amount, speed=speed, sign=sign)
            change, first = MOTIONS[name](t, draw), MOTIONS[name](np.zeros(1), draw)
            dx = dx if change.x is None else change.x
            dy = dy if change.y is None else change.y
            size = size if change.size is None else swing * change.size
            if change.turn is not None and first.turn is not None:
                rate, turned = 0.0, change.turn - first.turn
        elif name == "orbit":
            turns = 2.0 * pi * (phase + sign * (0.65 + 0.35 * speed) * t)
            radius = 11.0 + 4.0 * amount
            dx, dy = radius * np.cos(turns), radius * np.sin(turns)
        elif name == "bounce":
            arc = (phase + (0.9 + 0.4 * speed) * t) % 1.0
            dy = (22.0 + 8.0 * amount) * ((2.0 * arc - 1.0) ** 2 - 1.0 / 3.0)
        elif name == "shake":
            dx = (5.5 + 2.5 * amount) * np.sin(2.0 * pi * (phase + (2.0 + 0.6 * speed) * t))
        elif name == "zigzag":
            dx = (14.0 + 5.0 * amount) * _triangle(phase + (0.65 + 0.25 * speed) * t)
        elif name == "pulse":
            size = swing * np.sin(2.0 * pi * (phase + (0.8 + 0.5 * speed) * t))
        else:
            rate = sign * 2.0 * pi * (0.65 + 0.45 * speed)
        since_middle = t - 0.5 * duration
        return Pose(
            x=middle[0] + velocity[0] * since_middle + dx,
            y=middle[1] + velocity[1] * since_middle + dy,
            log_size=size,
            angle=angle + rate * t + turned,
        )

    return pose


def distractor(begin: Pose, end: Pose, duration: float, rng: np.random.Generator) -> Motion:
    """Draw motion that is not an action and leads from one pose to another.

    It is a straight drift, a smooth curve, or standing still before or after a short move.

    Args:
        begin: pose of shape (1,) at time 0.
        end: pose of shape (1,) whose position and size are reached at `duration`. Its angle is not
            used: the actor keeps turning slowly.
        duration: duration of the motion in seconds.
        rng: source of every random choice.

    Returns:
        The motion, defined for times in [0, duration].
    """
    kind = rng.choice(["drift", "wander", "idle"])
    bend = rng.uniform(-16.0, 16.0)
    rate = rng.uniform(-_IDLE_TURN, _IDLE_TURN)
    still_first = rng.uniform() < 0.5

    def pose(t: Floats) -> Pose:
        share = t / max(duration, 1e-6)  # duration is 0 if an action begins with the video
        if kind == "idle":  # the move takes half of the time
            share = np.clip(2.0 * share - (1.0 if still_first else 0.0), 0.0, 1.0)
        if kind != "drift":
            share = share * share * (3.0 - 2.0 * share)  # smoothstep
        bow = bend * np.sin(pi * share) if kind == "wander" else np.zeros_like(t)
        step = np.array([end.x[0] - begin.x[0], end.y[0] - begin.y[0]])
        aside = np.array([-step[1], step[0]]) / max(float(np.hypot(*step)), 1.0)
        return Pose(
            x=begin.x[0] + share * step[0] + bow * aside[0],
            y=begin.y[0] + share * step[1] + bow * aside[1],
            log_size=begin.log_size[0] + share * (end.log_size[0] - begin.log_size[0]),
            angle=begin.angle[0] + rate * t,
        )

    return pose


ACTION_SECONDS = (1.5, 6.0)
GAP_SECONDS = (1.0, 4.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sprite:
    """Sprite and its path: `texture` premultiplied RGBA, `radius` (T,) pixels, `pose` (T,)."""

    texture: Image
    radius: Floats
    pose: Pose


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Content of a video of T frames.

    Attributes:
        background: seamless RGB picture.
        bokeh: seamless premultiplied RGBA picture in front of the background.
        background_path: (T, 2) offset (x, y) of the background in pixels.
        bokeh_path: (T, 2) offset of the bokeh in pixels.
        sprites: sprites from back to front; the last is the actor.
        instances: (start, end, action) in seconds.
    """

    background: Image
    bokeh: Image
    background_path: Floats
    bokeh_path: Floats
    sprites: tuple[Sprite, ...]
    instances: tuple[tuple[float, float, str], ...]


def _timeline(
    seconds: float, actions: Sequence[str], rng: np.random.Generator
) -> list[tuple[float, float, str]]:
    """Draw actions with gaps, inside [0, seconds]."""
    found: list[tuple[float, float, str]] = []
    now = rng.uniform(*GAP_SECONDS)
    bag: list[str] = []
    while True:
        # Shuffled bags keep the classes of one video balanced.
        bag = bag or [actions[int(i)] for i in rng.permutation(len(actions))]
        length = float(np.exp(rng.uniform(*np.log(ACTION_SECONDS))))
        end = now + length
        if end + GAP_SECONDS[0] > seconds:
            return found
        found.append((round(now, 3), round(end, 3), bag.pop()))
        now = end + rng.uniform(*GAP_SECONDS)


def _actor_pose(
    instances: list[tuple[float, float, str]], times: Floats, rng: np.random.Generator
) -> Pose:
    """Draw the poses at `times` of an actor that performs the instances, with idle motion between.

    The position before the first and after the last instance is drawn like that of an action's
    start, so that these gaps look like all others.
    """
    zero = np.zeros(1)
    angle = rng.uniform(0.0, 2.0 * np.pi)
    pieces: list[tuple[float, float, Motion]] = []
    last = action("spin", 1.0, angle, rng)(zero)
    now = 0.0
    for start, end, name in [*instances, (float(times[-1]) + 1.0, 0.0, "spin")]:
        slow = rng.uniform(0.0, 2.0 * np.pi)
        ahead = action(name, max(end - start, 1.0), slow, rng)
        gap = distractor(last, ahead(zero), start - now, rng)
        pieces.append((now, start, gap))
        if end <= start:
            break
        # The angle is continuous through gap and action.
        turned = float(gap(np.array([start - now])).angle[0]) - slow
        moving = _turned(ahead, turned)
        pieces.append((start, end, moving))
        last, now = moving(np.array([end - start])), end
    parts = [
        piece(times[(times >= begin) & (times < end)] - begin)
        for begin, end, piece in pieces
        if np.any((times >= begin) & (times < end))
    ]
    return Pose(
        x=np.concatenate([p.x for p in parts]),
        y=np.concatenate([p.y for p in parts]),
        log_size=np.concatenate([p.log_size for p in parts]),
        angle=np.concatenate([p.angle for p in parts]),
    )


def _turned(motion: Motion, by: float) -> Motion:
    """Shift the angle of a motion."""

    def pose(t: Floats) -> Pose:
        p = motion(t)
        return Pose(x=p.x, y=p.y, log_size=p.log_size, angle=p.angle + by)

    return pose


def _clutter(
    gallery: Gallery, palette_index: int, times: Floats, rng: np.random.Generator
) -> Sprite:
    """Draw a sprite that crosses the picture in a straight line, again and again."""
    margin = 26.0
    span = FRAME_SIZE + 2.0 * margin
    start = rng.uniform(0.0, span, size=2)
    velocity = rng.uniform(3.0, 14.0) * np.exp(1j * rng.uniform(0.0, 2.0 * np.pi))
    pose = Pose(
        x=(start[0] + velocity.real * times) % span - margin,
        y=(start[1] + velocity.imag * times) % span - margin,
        log_size=np.zeros_like(times),
        angle=rng.uniform(0.0, 6.3) + rng.uniform(-0.35, 0.35) * times,
    )
    texture = sprite_texture(gallery, gallery.palettes[palette_index], rng)
    return Sprite(texture=texture, radius=np.full_like(times, rng.uniform(7.0, 12.0)), pose=pose)


def _camera(times: Floats, rng: np.random.Generator) -> Floats:
    """Draw a slow drift of the camera with a gentle sway, (T, 2), in pixels."""
    drift = rng.uniform(-5.0, 5.0, size=2)
    sway = rng.uniform(1.0, 5.0, size=2)
    rate = rng.uniform(0.05, 0.15, size=2)
    phase = rng.uniform(0.0, 6.3, size=2)
    t = times[:, None]
    return np.asarray(drift * t + sway * np.sin(2.0 * np.pi * rate * t + phase))


def draw_scene(
    gallery: Gallery,
    times: Floats,
    rng: np.random.Generator,
    instances: list[tuple[float, float, str]] | None = None,
    *,
    actions: Sequence[str] = ACTIONS,
) -> Scene:
    """Draw the random content of a video.

    Args:
        gallery: looks to choose from.
        times: (T,) seconds of its frames, rising.
        rng: source of every random choice.
        instances: (start, end, action) in seconds, disjoint and in order; drawn if None.
        actions: actions from which instances are drawn.

    Returns:
        The scene, ready to be rendered.
    """
    if instances is None:
        instances = _timeline(float(times[-1]), actions, rng)
    palette_index = int(rng.integers(len(gallery.palettes)))
    palette = gallery.palettes[palette_index]
    pose = _actor_pose(instances, times, rng)
    clutter = [_clutter(gallery, palette_index, times, rng) for _ in range(rng.integers(2, 5))]
    actor = Sprite(
        texture=sprite_texture(gallery, palette, rng),
        radius=rng.uniform(14.0, 18.0) * np.exp(pose.log_size),
        pose=pose,
    )
    camera = _camera(times, rng)
    return Scene(
        background=background_texture(gallery, palette, rng),
        bokeh=bokeh_texture(palette, rng),
        background_path=camera + rng.uniform(0.0, 200.0, size=2),
        bokeh_path=1.7 * camera + rng.uniform(-4.0, 4.0, size=2) * times[:, None],
        sprites=(*clutter, actor),
        instances=tuple(instances),
    )
