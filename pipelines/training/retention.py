"""Checkpoints of a run: the list of them, the best one, and the removal of surplus ones.

All of this follows from the folders and the metrics in their `complete.json`. Ray Train's own list
is not used: it is written after the checkpoints and not atomically, so a kill may leave it
truncated or without the last checkpoint.
"""

import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.config.recipe import CheckpointConfig
from pipelines.core.metric_names import UNSCORED
from pipelines.core.storage import (
    file_sizes,
    folders_in,
    join,
    read_bytes,
    remove,
    remove_folder,
    replacing,
    require_room,
    resolve,
    writing_to,
)
from pipelines.training.checkpoints import (
    COMPLETE_FILE,
    DamagedCheckpointError,
    listing_bytes,
    read_listing,
)
from re2tal.errors import UserError

_PREFIX = "checkpoint_"
_RAY_LIST = "checkpoint_manager_snapshot.json"  # Ray Train's list of a run's checkpoints


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Checkpoint of a run whose files are all there.

    Attributes:
        uri: path or URI of its folder.
        metrics: metrics of the run at its step; empty if an earlier version wrote it.
        waits: true if it waits for its evaluation.
    """

    uri: str
    metrics: dict[str, float]
    waits: bool

    @property
    def name(self) -> str:
        """Name of its folder; names sort by position in the run."""
        return self.uri.rpartition("/")[2]

    def rank(self, score: str) -> tuple[float, str]:
        """Return a key that sorts checkpoints by a metric; of equal ones the later is better."""
        value = self.metrics.get(score, UNSCORED)
        return (-math.inf if math.isnan(value) else value, self.name)


def checkpoint_name(*, epoch: int, step: int) -> str:
    """Return the name of a checkpoint's folder.

    The name follows from the position: a checkpoint that is written again replaces the remains of
    the first one, and the order of names does not depend on a clock.
    """
    return f"{_PREFIX}epoch_{epoch:04d}_step_{step:08d}"


def checkpoints(folder: str) -> tuple[list[Kept], dict[str, str]]:
    """List the checkpoints of a run.

    Args:
        folder: folder of the run, a path or URI.

    Returns:
        The complete ones, the newest last; for the others, the problem by name.
    """
    kept, rest = [], {}
    for name in (name for name in folders_in(folder) if name.startswith(_PREFIX)):
        uri = join(folder, name)
        try:
            listing = read_listing(uri)
        except DamagedCheckpointError as problem:
            rest[name] = str(problem)
        else:
            waits = listing.waiting is not None
            kept.append(Kept(uri=uri, metrics=listing.metrics, waits=waits))
    return kept, rest


def newest_checkpoint(folder: str) -> Kept | None:
    """Return the newest checkpoint of a run whose files are all there."""
    kept, _ = checkpoints(folder)
    return kept[-1] if kept else None


def make_room(folder: str, name: str, wanted: int) -> None:
    """Remove the remains of interrupted copies, and check that there is room for a checkpoint.

    Args:
        folder: folder of the run, a path or URI.
        name: name of the checkpoint to come; an existing one of that name was found damaged.
        wanted: bytes of the checkpoint to come.

    Raises:
        UserError: if there is no room, or if the folder cannot be written to.
    """
    with writing_to(folder, what="a checkpoint"):
        remove_partial(folder, name)
    require_room(folder, wanted, what="a checkpoint")


def remove_partial(folder: str, *more: str) -> None:
    """Remove incomplete checkpoints, and those of the given names."""
    kept, rest = checkpoints(folder)
    for name in [*rest, *(one.name for one in kept if one.name in more)]:
        remove_folder(join(folder, name))


def remove_surplus(
    folder: str, config: CheckpointConfig, score: str, *, written: str | None = None
) -> None:
    """Remove the checkpoints that a run does not keep, and incomplete ones.

    The newest always stays, because the run goes on from it, and so do those that wait for their
    evaluation.

    Args:
        folder: folder of the run, a path or URI.
        config: number and kind of checkpoints that stay.
        score: metric that makes a checkpoint better than another.
        written: name of the checkpoint that was just written. Later ones were found damaged when
            the run was resumed, so they are removed.
    """
    kept, rest = checkpoints(folder)
    valid = [one for one in kept if written is None or one.name <= written]
    stay = {one.name for one in _chosen(valid, config, score)}
    stay |= {one.name for one in valid if one.waits}
    for name in [*rest, *(one.name for one in kept if one.name not in stay)]:
        remove_folder(join(folder, name))


def _chosen(kept: Sequence[Kept], config: CheckpointConfig, score: str) -> list[Kept]:
    if config.which == "last":
        return list(kept[-config.keep :])
    ranked = sorted(kept, key=lambda one: one.rank(score))
    return [*ranked[-config.keep :], *kept[-1:]]  # the newest too, however it ranks


@contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """Yield the local folder of a checkpoint, to which it is copied if it is remote."""
    import ray.train  # imported here, because the training loop alone needs no Ray

    filesystem, path = resolve(uri)
    with ray.train.Checkpoint(path, filesystem).as_directory() as local:
        yield Path(local)


@contextmanager
def best_checkpoint(
    folder: str, score: str, *, say: Callable[[str], object]
) -> Iterator[tuple[Path, dict[str, float]]]:
    """Yield the first of `scored_checkpoints`."""
    with closing(scored_checkpoints(folder, score, say=say)) as found:
        yield next(found)


def scored_checkpoints(
    folder: str, score: str, *, say: Callable[[str], object]
) -> Generator[tuple[Path, dict[str, float]]]:
    """Yield the undamaged checkpoints as local folders, with their metrics, the best first.

    Args:
        folder: folder of the run, a path or URI.
        score: metric that ranks checkpoints; those without it are left out.
        say: function that receives a line on each damaged checkpoint.

    Raises:
        UserError: if there is none.
    """
    whole = 0
    kept = [one for one in checkpoints(folder)[0] if one.metrics.get(score, UNSCORED) != UNSCORED]
    # of equal ones the earliest is first (the sort is stable), as in the table of results
    for one in sorted(kept, key=lambda one: one.rank(score)[0], reverse=True):
        with fetched(one.uri) as local:
            try:
                read_listing(local, digests=True)
            except DamagedCheckpointError as problem:
                say(f"warning: {one.name} is left out. {problem}")
                continue
            whole += 1
            yield local, one.metrics
    if not whole:
        raise UserError(
            f"No checkpoint in {folder} is whole and has {score}. Train anew with --no-resume."
        )


def drop_list(folder: str) -> None:
    """Remove Ray Train's list, which may name checkpoints that are gone, or be truncated.

    The metrics of checkpoints that earlier versions wrote are only in this list: they are first
    copied into each `complete.json`.
    """
    uri = join(folder, _RAY_LIST)
    if _RAY_LIST not in file_sizes(folder):
        return
    try:
        listed = json.loads(read_bytes(uri))["checkpoint_results"]
        metrics = {
            one["checkpoint_dir_name"]: {
                name: float(value)
                for name, value in one["metrics"].items()
                if isinstance(value, int | float)
            }
            for one in listed
        }
    except (ValueError, KeyError, TypeError):
        metrics = {}  # the list is truncated
    for one in checkpoints(folder)[0]:
        if not one.metrics and one.name in metrics:
            listing = replace(read_listing(one.uri), metrics=metrics[one.name])
            with replacing(join(one.uri, COMPLETE_FILE)) as stream:
                stream.write(listing_bytes(listing))
    remove(uri)
