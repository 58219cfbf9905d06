"""A toy video before it is drawn: who moves where, and which actions happen when."""

from dataclasses import dataclass

import numpy as np

from re2tal.datasets.toy.looks import (
    Gallery,
    Image,
    background_texture,
    bokeh_texture,
    sprite_texture,
)
from re2tal.datasets.toy.motion import (
    ACTIONS,
    FRAME_SIZE,
    Floats,
    Motion,
    Pose,
    action,
    distractor,
)

ACTION_SECONDS = (1.5, 6.0)
GAP_SECONDS = (1.0, 4.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sprite:
    """A sprite and its path: `texture` premultiplied RGBA, `radius` (T,) pixels, `pose` (T,)."""

    texture: Image
    radius: Floats
    pose: Pose


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """All that a video of T frames shows.

    Attributes:
        background: Seamless RGB picture.
        bokeh: Seamless premultiplied RGBA picture in front of the background.
        background_path: (T, 2) offset (x, y) of the background in pixels.
        bokeh_path: (T, 2) offset of the bokeh in pixels.
        sprites: From back to front; the last is the actor.
        instances: (start, end, action) in seconds.
    """

    background: Image
    bokeh: Image
    background_path: Floats
    bokeh_path: Floats
    sprites: tuple[Sprite, ...]
    instances: tuple[tuple[float, float, str], ...]


def _timeline(seconds: float, rng: np.random.Generator) -> list[tuple[float, float, str]]:
    """Actions with gaps around them, inside [0, seconds], no class more than once in three."""
    found: list[tuple[float, float, str]] = []
    now = rng.uniform(*GAP_SECONDS)
    bag: list[str] = []
    while True:
        # Shuffled bags keep the classes of one video balanced.
        bag = bag or [ACTIONS[int(i)] for i in rng.permutation(len(ACTIONS))]
        length = float(np.exp(rng.uniform(*np.log(ACTION_SECONDS))))
        end = now + length
        if end + GAP_SECONDS[0] > seconds:
            return found
        found.append((round(now, 3), round(end, 3), bag.pop()))
        now = end + rng.uniform(*GAP_SECONDS)


def _actor_pose(
    instances: list[tuple[float, float, str]], times: Floats, rng: np.random.Generator
) -> Pose:
    """Poses at `times` of an actor that performs the instances and idles about in between."""
    zero = np.zeros(1)
    angle = rng.uniform(0.0, 2.0 * np.pi)
    # Where the actor is before the first and after the last instance is drawn like an action's
    # start, so that those gaps are like all others.
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
        # The angle runs on through gap and action without a jump.
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
    """The same motion with its angle shifted."""

    def pose(t: Floats) -> Pose:
        p = motion(t)
        return Pose(x=p.x, y=p.y, log_size=p.log_size, angle=p.angle + by)

    return pose


def _clutter(
    gallery: Gallery, palette_index: int, times: Floats, rng: np.random.Generator
) -> Sprite:
    """A sprite that crosses the picture in a straight line, again and again."""
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
    """(T, 2) slow drift of the camera with a gentle sway, in pixels."""
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
) -> Scene:
    """Draw everything random about a video.

    Args:
        gallery: Looks to choose from.
        times: (T,) seconds of its frames, rising.
        rng: Source of every random choice.
        instances: (start, end, action) in seconds, apart and in order; drawn when None.

    Returns:
        The scene, ready to be rendered.
    """
    if instances is None:
        instances = _timeline(float(times[-1]), rng)
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
