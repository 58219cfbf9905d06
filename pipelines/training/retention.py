"""Checkpoints of a run: those that are there, the best of them, and those that may go.

All of it follows from the folders and from the metrics that `complete.json` holds in each. Ray
Train's own list would not do: it is written after the checkpoints and not atomically, so that a
kill leaves it cut short, or without the last checkpoint.
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
    """A checkpoint of a run whose files are all there.

    Attributes:
        uri: path or URI of its folder.
        metrics: metrics of the run where it was written; of an earlier version's, none.
        waits: whether its evaluation is still to come.
    """

    uri: str
    metrics: dict[str, float]
    waits: bool

    @property
    def name(self) -> str:
        """Name of its folder; names sort as the positions in the run."""
        return self.uri.rpartition("/")[2]

    def rank(self, score: str) -> tuple[float, str]:
        """Return a key that sorts checkpoints by a metric; of equal ones, the later is better."""
        value = self.metrics.get(score, UNSCORED)
        return (-math.inf if math.isnan(value) else value, self.name)


def checkpoint_name(*, epoch: int, step: int) -> str:
    """Return the name of a checkpoint's folder.

    It follows from the position, so that a checkpoint that is written again replaces what is left
    of the first one, and the order of the names does not depend on a clock.
    """
    return f"{_PREFIX}epoch_{epoch:04d}_step_{step:08d}"


def checkpoints(folder: str) -> tuple[list[Kept], dict[str, str]]:
    """List the checkpoints of a run.

    Args:
        folder: folder of the run, a path or URI.

    Returns:
        Those whose files are all there, the newest last; by name, what the others lack.
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
    """Remove what interrupted copies left of checkpoints, and check the room for another.

    Args:
        folder: folder of the run, a path or URI.
        name: name of the checkpoint to come; one of that name was found damaged.
        wanted: its bytes.

    Raises:
        UserError: there is no room, or the folder cannot be written to.
    """
    with writing_to(folder, what="a checkpoint"):
        remove_partial(folder, name)
    require_room(folder, wanted, what="a checkpoint")


def remove_partial(folder: str, *more: str) -> None:
    """Remove checkpoints that are not whole, and more of them by name, if they are there."""
    kept, rest = checkpoints(folder)
    for name in [*rest, *(one.name for one in kept if one.name in more)]:
        remove_folder(join(folder, name))


def remove_surplus(
    folder: str, config: CheckpointConfig, score: str, *, written: str | None = None
) -> None:
    """Remove the checkpoints that a run does not keep, and those that are not whole.

    The newest stays in any case, to go on from; and those whose evaluation is still to come.

    Args:
        folder: folder of the run, a path or URI.
        config: number and kind of checkpoints that stay.
        score: metric that makes a checkpoint better than another.
        written: name of the one that was written just now. Any behind it was found damaged when
            the run went on.
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
    return [*ranked[-config.keep :], *kept[-1:]]


@contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """Give a checkpoint as a local folder, copied there if it is remote."""
    import ray.train  # here, because the loop by itself does without Ray

    filesystem, path = resolve(uri)
    with ray.train.Checkpoint(path, filesystem).as_directory() as local:
        yield Path(local)


@contextmanager
def best_checkpoint(
    folder: str, score: str, *, say: Callable[[str], object]
) -> Iterator[tuple[Path, dict[str, float]]]:
    """Give the first of `scored_checkpoints`."""
    with closing(scored_checkpoints(folder, score, say=say)) as found:
        yield next(found)


def scored_checkpoints(
    folder: str, score: str, *, say: Callable[[str], object]
) -> Generator[tuple[Path, dict[str, float]]]:
    """Yield the checkpoints whose files are what was written, and their metrics, the best first.

    Args:
        folder: folder of the run, a path or URI.
        score: metric that makes a checkpoint better than another; one without it is not taken.
        say: function that receives a line on each damaged one.

    Raises:
        UserError: there is none.
    """
    whole = 0
    kept = [one for one in checkpoints(folder)[0] if one.metrics.get(score, UNSCORED) != UNSCORED]
    # of equal ones the first, as in the table of results
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
    """Remove Ray Train's list, which may name checkpoints that are gone, or be cut short.

    Metrics of checkpoints of earlier versions stand only there: they are put beside them first.
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
        metrics = {}  # cut short
    for one in checkpoints(folder)[0]:
        if not one.metrics and one.name in metrics:
            listing = replace(read_listing(one.uri), metrics=metrics[one.name])
            with replacing(join(one.uri, COMPLETE_FILE)) as stream:
                stream.write(listing_bytes(listing))
    remove(uri)
