"""Decodes files whose bytes are changed at random: `python -m tests.videos.fuzzing FILE...`.

Run as a process of its own, because what it looks for may end the process. It writes each example
down before it tries it, and ends with how many gave something and how many were refused.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from re2tal.videos.decoding import Limits, VideoError, decode, decode_intact, probe

TIMES = np.array([0.05, 0.7, 0.35, 1.1])
LIMITS = Limits(seconds=20, pixels=1 << 20, result_bytes=1 << 24)
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]

# What is done to a file: at a place (a share of the file, as its ends matter most often near 0 and
# 1) bytes are set, taken out or repeated.
places = st.one_of(st.floats(0, 1), st.floats(0, 0.1), st.floats(0.9, 1))
values = st.one_of(st.sampled_from(INTERESTING), st.integers(0, 255))
changes = st.one_of(
    st.tuples(st.just("set"), places, st.lists(values, min_size=1, max_size=8)),
    st.tuples(st.sampled_from(["cut", "twice"]), places, st.integers(1, 300)),
    st.tuples(st.just("end"), st.floats(0.2, 1), st.just(0)),
)


def changed(content: bytes, todo: list[tuple[str, float, Any]]) -> bytes:
    """A file after changes."""
    result = bytearray(content)
    for kind, share, what in todo:
        place = int(share * (len(result) - 1)) if result else 0
        if kind == "set":
            result[place : place + len(what)] = bytes(what)
        elif kind == "cut":
            del result[place : place + what]
        elif kind == "twice":
            result[place:place] = result[place : place + what]
        else:
            del result[place:]
    return bytes(result)


def try_to_decode(content: bytes) -> int:
    """Probes and decodes in all ways; the number of them that gave something."""
    given_out = 0
    try:
        info = probe(content, limits=LIMITS)
        assert info.duration > 0, info
        assert info.frames >= 0, info
        given_out += 1
    except VideoError:
        given_out += 0
    for threads in (1, 2):
        try:
            frames = decode(content, TIMES, size=16, threads=threads, limits=LIMITS)
        except VideoError:
            continue
        assert frames.dtype == np.uint8
        assert frames.ndim == 4
        assert frames.shape[0] == len(TIMES)
        assert min(frames.shape[1:3]) == 16
        assert frames.shape[3] == 3
        given_out += 1
    try:
        found = decode_intact(content, TIMES, size=16, limits=LIMITS)
        assert found.frames.shape[0] == len(TIMES)
        assert found.intact.any()
        given_out += 1
    except VideoError:
        given_out += 0
    return given_out


def fuzz(path: Path, examples: int, number: int | None, log: Path) -> list[int]:
    """Changes a file in many ways; what `try_to_decode` says of each."""
    content, outcomes = path.read_bytes(), []

    @settings(
        deadline=None,
        database=None,
        derandomize=number is None,
        max_examples=examples,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(todo=st.lists(changes, min_size=1, max_size=4))
    def run(todo: list[tuple[str, float, Any]]) -> None:
        log.write_text(json.dumps({"file": str(path), "changes": todo}))
        outcomes.append(try_to_decode(changed(content, todo)))

    (run if number is None else seed(number)(run))()
    return outcomes


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--examples", type=int, default=100, help="of each file")
    parser.add_argument("--seed", type=int, help="the same ones every time if it is not given")
    parser.add_argument("--log", type=Path, required=True, help="takes the example in progress")
    options = parser.parse_args()
    outcomes = [
        outcome
        for path in options.files
        for outcome in fuzz(path, options.examples, options.seed, options.log)
    ]
    given_out = sum(map(bool, outcomes))
    print(json.dumps({"given": given_out, "refused": len(outcomes) - given_out}))


if __name__ == "__main__":
    main()
