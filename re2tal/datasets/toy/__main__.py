"""Make a toy data set in several processes, unless it exists with the same settings.

python -m re2tal.datasets.toy videos data/toy
python -m re2tal.datasets.toy unseen data/unseen
python -m re2tal.datasets.toy clips data/toy_trimmed --training 210 --validation 70
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from re2tal.datasets.toy import ToyConfig, TrimmedToyConfig, make_toy, make_trimmed_toy, unseen_toy

_SETS: dict[str, tuple[Any, Callable[..., Any], int]] = {
    "videos": (ToyConfig(), make_toy, 10),
    "unseen": (unseen_toy(), make_toy, 10),
    "clips": (TrimmedToyConfig(), make_trimmed_toy, 300),
}
"""Name of a set -> its settings, function that makes it, and files between progress reports."""


def main(arguments: Sequence[str]) -> None:
    """Make the set named on the command line."""
    options = vars(_parser().parse_args(arguments))
    name, folder, processes = (options.pop(key) for key in ("set", "folder", "processes"))
    default, make, every = _SETS[name]
    if isinstance(options["seconds"], list):
        options["seconds"] = tuple(options["seconds"])

    def show(done: int, total: int) -> None:
        if done % every == 0 or done == total:
            sys.stdout.write(f"  {done} of {total} {name}\n")
            sys.stdout.flush()

    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        make(folder, replace(default, **options), parallel_map=pool.map, progress=show)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m re2tal.datasets.toy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="set", required=True)
    for name, (default, _, _) in _SETS.items():
        kind = kinds.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        kind.add_argument("folder", help="output folder")
        for subset in ("training", "validation"):
            value = getattr(default, subset)
            kind.add_argument(f"--{subset}", type=int, default=value, help="number of files")
        if isinstance(default.seconds, tuple):
            text, count = "shortest and longest duration", len(default.seconds)
            kind.add_argument(
                "--seconds", type=float, nargs=count, default=default.seconds, help=text
            )
        else:
            kind.add_argument("--seconds", type=float, default=default.seconds, help="duration")
        kind.add_argument("--seed", type=int, default=default.seed, help="seed of the whole set")
        kind.add_argument("--processes", type=int, default=None, help="None: one per core")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
