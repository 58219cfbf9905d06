"""The toy data sets, made in several processes when they are missing."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from re2tal.videos.toy import ToyConfig, TrimmedToyConfig, make_toy, make_trimmed_toy


def toy_videos(folder: Path, config: ToyConfig | None = None) -> None:
    """Makes the untrimmed videos and their annotations.

    Args:
        folder: where to; what is there with the same settings stays.
        config: how many.
    """
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        make_toy(folder, config, parallel_map=pool.map, progress=_shown("videos", 10))


def toy_clips(folder: Path, config: TrimmedToyConfig | None = None) -> None:
    """Makes the trimmed clips.

    Args:
        folder: where to; what is there with the same settings stays.
        config: how many.
    """
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        make_trimmed_toy(folder, config, parallel_map=pool.map, progress=_shown("clips", 300))


def _shown(what: str, every: int) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        if done % every == 0 or done == total:
            print(f"  {done} of {total} {what}", flush=True)

    return show
