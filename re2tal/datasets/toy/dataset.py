"""Toy data set on disk: untrimmed videos with annotations, and trimmed clips."""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from re2tal.atomic import replacing
from re2tal.datasets.toy.looks import DETECTION_GALLERY, PRETRAINING_GALLERY
from re2tal.datasets.toy.render import render
from re2tal.datasets.toy.scene import ACTIONS, FRAME_SIZE, UNSEEN_ACTIONS, Pose, draw_scene
from re2tal.videos.encoding import encode

FPS = 12
"""Frames per second of every toy video."""

ANNOTATIONS = "annotations.json"
VIDEOS = "videos"

_VERSION = 2  # to be increased if the same settings give other videos


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig:
    """Size of the untrimmed set.

    Attributes:
        training: number of training videos.
        validation: number of validation videos.
        seconds: shortest and longest duration of a video.
        seed: seed of the whole set.
        unseen: show `UNSEEN_ACTIONS`, on which no weights of this repository were trained.
    """

    training: int = 32
    validation: int = 12
    seconds: tuple[float, float] = (24.0, 52.0)
    seed: int = 0
    unseen: bool = False


def unseen_toy() -> ToyConfig:
    """Return the settings of the second set: 60 videos of about 35 s with 13 motions."""
    return ToyConfig(training=40, validation=20, seconds=(28.0, 42.0), unseen=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """Parameters of one video to make, sufficient for a separate process."""

    video_id: str
    subset: str
    seconds: float
    seed: tuple[int, int]
    folder: str
    actions: tuple[str, ...]


def _times(seconds: float) -> np.ndarray:
    return (np.arange(round(seconds * FPS)) + 0.5) / FPS


def _make_video(job: _Job) -> tuple[str, dict[str, Any]]:
    """Render and write one video, under a temporary name until it is complete."""
    rng = np.random.default_rng(job.seed)
    scene = draw_scene(DETECTION_GALLERY, _times(job.seconds), rng, actions=job.actions)
    path = Path(job.folder) / f"{job.video_id}.mp4"
    with replacing(path) as partial:
        encode(partial, render(scene), fps=FPS)
    return job.video_id, {
        "subset": job.subset,
        "duration": round(len(scene.background_path) / FPS, 3),
        "annotations": [
            {"segment": [start, end], "label": label} for start, end, label in scene.instances
        ],
    }


def _jobs(config: ToyConfig, folder: Path) -> list[_Job]:
    rng = np.random.default_rng(config.seed)
    jobs = []
    for number in range(config.training + config.validation):
        subset = "training" if number < config.training else "validation"
        jobs.append(
            _Job(
                video_id=f"toy_{number:03d}",
                subset=subset,
                seconds=float(rng.uniform(*config.seconds)),
                seed=(config.seed, number),
                folder=str(folder),
                actions=UNSEEN_ACTIONS if config.unseen else ACTIONS,
            )
        )
    return jobs


def _is_complete(annotations: Path, settings: dict[str, Any]) -> bool:
    """Tell if the set was made with these settings; the annotations are written last."""
    if not annotations.is_file():
        return False
    content = json.loads(annotations.read_text())
    files = (annotations.parent / VIDEOS / f"{name}.mp4" for name in content["database"])
    return content.get("settings") == settings and all(file.is_file() for file in files)


def make_toy(
    folder: str | Path,
    config: ToyConfig | None = None,
    *,
    parallel_map: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make the toy data set, unless it exists already with the same settings.

    Classes differ in motion over time, not in the look of a frame. The videos have 112 by 112
    pixels and 12 frames per second, H.264 with visible compression noise.

    Args:
        folder: folder for `annotations.json` (ActivityNet-style, subsets `training` and
            `validation`) and `videos/*.mp4`.
        config: size of the set; the default takes under a minute on two cores.
        parallel_map: function like `map` that runs the jobs; it may run them in other processes and
            in any order.
        progress: function called with the number of finished videos and the total.

    Returns:
        Path of the annotations.
    """
    config = config or ToyConfig()
    folder = Path(folder)
    annotations = folder / ANNOTATIONS
    # through JSON, as they are read back
    settings = json.loads(json.dumps({"version": _VERSION, **asdict(config)}))
    if not config.unseen:  # the first set's file is as it was before the second set existed
        del settings["unseen"]
    if _is_complete(annotations, settings):
        return annotations
    (folder / VIDEOS).mkdir(parents=True, exist_ok=True)
    annotations.unlink(missing_ok=True)
    database: dict[str, Any] = {}
    jobs = _jobs(config, folder / VIDEOS)
    for video_id, entry in parallel_map(_make_video, jobs):
        database[video_id] = entry
        if progress is not None:
            progress(len(database), len(jobs))
    content = {"settings": settings, "database": dict(sorted(database.items()))}
    with replacing(annotations) as partial:
        partial.write_text(json.dumps(content, indent=1))
    return annotations


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyClip:
    """Trimmed clip of one action, with its actor's poses.

    Attributes:
        content: content of an mp4 file, compressed like the untrimmed videos.
        pose: pose of the actor at each frame.
    """

    content: bytes
    pose: Pose


def make_clip(label: str | None, seconds: float, seed: int, *, held_out: bool = False) -> ToyClip:
    """Make a clip in which an actor performs one action from the first frame to the last.

    Args:
        label: one of `ACTIONS`, or None for motion that is not an action.
        seconds: length of the clip.
        seed: seed of the clip.
        held_out: true for the sprites and backgrounds of the untrimmed videos, false for a disjoint
            set of sprites and backgrounds.
    """
    gallery = DETECTION_GALLERY if held_out else PRETRAINING_GALLERY
    instances = [] if label is None else [(0.0, seconds, label)]
    rng = np.random.default_rng((seed, int(held_out), 7))  # not a seed of an untrimmed video
    scene = draw_scene(gallery, _times(seconds), rng, instances)
    file = io.BytesIO()
    encode(file, render(scene), fps=FPS)
    return ToyClip(content=file.getvalue(), pose=scene.sprites[-1].pose)


NO_ACTION = "no_action"
"""Class of clips whose actor moves without performing an action: a detector's background."""

_TURNS = (*ACTIONS, NO_ACTION)  # clip i has class i mod 7
TRIMMED_CLASSES = tuple(sorted(_TURNS))
POSES = "poses.safetensors"
UNFINISHED = "unfinished"
"""Name of a marker file in the folder while the set is being made."""

_SETTINGS = "settings.json"
_TRIMMED_VERSION = 2  # to be increased if the same settings give other clips


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedToyConfig:
    """Size of the trimmed split.

    Attributes:
        training: number of training clips, spread evenly over the classes.
        validation: number of validation clips.
        seconds: length of a clip.
        seed: seed of the whole split.
    """

    training: int = 2100
    validation: int = 210
    seconds: float = 5.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _ClipJob:
    """Parameters of one clip to make, sufficient for a separate process."""

    folder: str
    subset: str
    number: int
    config: TrimmedToyConfig

    @property
    def video_id(self) -> str:
        """Name of the clip in its subset: `spin/training_00004`."""
        label = _TURNS[self.number % len(_TURNS)]
        return f"{label}/{self.subset}_{self.number:05d}"

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.subset / f"{self.video_id}.mp4"


def _make_clip(job: _ClipJob) -> tuple[str, np.ndarray]:
    """Render and write a clip; return its id and poses (T, 4)."""
    label = job.path.parent.name
    clip = make_clip(
        None if label == NO_ACTION else label,
        job.config.seconds,
        job.config.seed * 10**6 + job.number,
        held_out=job.subset == "validation",
    )
    job.path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(job.path) as partial:
        partial.write_bytes(clip.content)
    pose = clip.pose
    place = (pose.x / FRAME_SIZE, pose.y / FRAME_SIZE, pose.log_size, pose.angle)
    return job.video_id, np.stack(place, 1).astype(np.float32)


def make_trimmed_toy(
    folder: str | Path,
    config: TrimmedToyConfig | None = None,
    *,
    parallel_map: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make the trimmed split, unless it exists already with the same settings.

    An actor performs one action from the first frame to the last, or none. Training clips show
    other sprites and backgrounds than the untrimmed videos; validation clips show those of the
    untrimmed videos, so that their results predict results there. No seed is shared.

    Args:
        folder: folder for `training/<class>/*.mp4`, `validation/<class>/*.mp4` and
            `poses.safetensors`: for each clip, `<class>/<name>`, the pose of its actor at each
            frame, float32 (T, 4): x and y as shares of the side, logarithm of the size, angle in
            radians.
        config: size of the split; the default takes some minutes on two cores.
        parallel_map: see `make_toy`.
        progress: see `make_toy`.

    Returns:
        The folder.
    """
    config = config or TrimmedToyConfig()
    folder = Path(folder)
    jobs = [
        _ClipJob(folder=str(folder), subset=subset, number=number, config=config)
        for subset, count in (("training", config.training), ("validation", config.validation))
        for number in range(count)
    ]
    settings = {"version": _TRIMMED_VERSION, **asdict(config)}
    file = folder / _SETTINGS
    paths = {job.path for job in jobs}
    made = file.is_file() and json.loads(file.read_text()) == settings
    if made and all(path.is_file() for path in (folder / POSES, *paths)):
        return folder
    file.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    _remove_others(folder, paths)
    poses: dict[str, np.ndarray] = {}
    for video_id, pose in parallel_map(_make_clip, jobs):
        poses[video_id] = pose
        if progress is not None:
            progress(len(poses), len(jobs))
    with replacing(folder / POSES) as partial:
        save_file(poses, partial)
    with replacing(file) as partial:
        partial.write_text(json.dumps(settings))
    (folder / UNFINISHED).unlink()
    return folder


def _remove_others(folder: Path, wanted: set[Path]) -> None:
    """Delete clips of other settings, because all files of a class folder belong to the set."""
    for subset in ("training", "validation"):
        for path in (folder / subset).glob(f"*/{subset}_*.mp4"):
            if path not in wanted:
                path.unlink()
