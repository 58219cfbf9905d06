"""The trimmed split of the toy data set: short clips in a folder for each class."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from re2tal.atomic import replacing
from re2tal.datasets.toy.dataset import make_clip
from re2tal.datasets.toy.motion import ACTIONS, FRAME_SIZE

NO_ACTION = "no_action"
"""The class of clips whose actor moves but performs no action. A detector has to tell it apart."""

_TURNS = (*ACTIONS, NO_ACTION)  # clip i is of class i mod 7
TRIMMED_CLASSES = tuple(sorted(_TURNS))
POSES = "poses.safetensors"
UNFINISHED = "unfinished"
"""A file of this name lies in the folder while it is being made."""

_SETTINGS = "settings.json"
_VERSION = 2  # counted up when the same settings give other clips


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedToyConfig:
    """How much of it there is.

    Attributes:
        training: number of training clips; the classes take turns.
        validation: number of validation clips.
        seconds: length of a clip.
        seed: of everything random in it.
    """

    training: int = 2100
    validation: int = 210
    seconds: float = 5.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One clip to make: everything that a process of its own needs to know."""

    folder: str
    subset: str
    number: int
    config: TrimmedToyConfig

    @property
    def video_id(self) -> str:
        """Of the clip in its subset: `spin/training_00004`."""
        label = _TURNS[self.number % len(_TURNS)]
        return f"{label}/{self.subset}_{self.number:05d}"

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.subset / f"{self.video_id}.mp4"


def _make(job: _Job) -> tuple[str, np.ndarray]:
    """Renders and writes a clip, and gives its id and poses (T, 4)."""
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
    """Makes the trimmed split, unless it is there already with the same settings.

    An actor performs one action from the first frame to the last, or none. Training clips show
    other sprites and other backgrounds than the untrimmed videos; validation clips show theirs, so
    that what is measured on them is what the untrimmed videos will need. No seed is shared.

    Args:
        folder: gets `training/<class>/*.mp4`, `validation/<class>/*.mp4` and `poses.safetensors`:
            of each clip, `<class>/<name>`, where its actor is at each frame, float32 (T, 4): x and
            y as shares of the side, logarithm of the size, angle in radians.
        config: how much of it; the default takes some minutes on two cores.
        parallel_map: what runs the clips' jobs, as `map` does; it may run them in other processes
            and in any order.
        progress: called with the number of clips made and the number in all.

    Returns:
        The folder.
    """
    config = config or TrimmedToyConfig()
    folder = Path(folder)
    jobs = [
        _Job(folder=str(folder), subset=subset, number=number, config=config)
        for subset, count in (("training", config.training), ("validation", config.validation))
        for number in range(count)
    ]
    settings = {"version": _VERSION, **asdict(config)}
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
    for video_id, pose in parallel_map(_make, jobs):
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
    """Deletes clips that other settings made: a folder for each class is read as it is."""
    for subset in ("training", "validation"):
        for path in (folder / subset).glob(f"*/{subset}_*.mp4"):
            if path not in wanted:
                path.unlink()
