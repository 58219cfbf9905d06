"""Several runs' predictions of the same videos as one run's.

What can be averaged depends on where it is done. Averaging the outputs of networks point by point
needs networks of one kind and their outputs before anything is left out (as OpenTAD does, with
equal weights). Among detections there are no such pairs: runs find the same action with slightly
different segments. So they are put side by side, each score times its run's share of the weights,
and non-maximum suppression and its voting merge those that overlap. That works for any mixture
of backbones and localizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from re2tal.detection.segments import Detections
from re2tal.detection.wording import listed


def ensemble(
    runs: Sequence[Mapping[str, Detections]], weights: Sequence[float]
) -> dict[str, Detections]:
    """Puts the detections of several runs side by side, before non-maximum suppression.

    A score becomes `score * weight / sum of weights`: what averaging gives if a run scores 0 what
    it did not find. Scores shrink so; a minimum score has to shrink with them.

    Args:
        runs: of each run its detections by video, in seconds, before NMS, with the same classes.
        weights: of each run, above 0; only their ratios matter.

    Returns:
        By video, in the first run's order, the detections of all runs in the order of the runs.

    Raises:
        ValueError: If there are no runs, not as many weights as runs, a weight is not above 0, or
            a run lacks a video that another has; it lists those.
    """
    if not runs or len(runs) != len(weights):
        raise ValueError(
            f"An ensemble needs runs and as many weights, but got {len(runs)} runs and "
            f"{len(weights)} weights."
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(
            f"The weights of an ensemble must be above 0, but are {list(weights)}: leave out the "
            "runs that are to count for nothing."
        )
    _check_videos(runs)
    total = sum(weights)
    return {
        video_id: Detections.concat(
            [
                _scaled(run[video_id], weight / total)
                for run, weight in zip(runs, weights, strict=True)
            ]
        )
        for video_id in runs[0]
    }


def _scaled(found: Detections, factor: float) -> Detections:
    return Detections(segments=found.segments, scores=found.scores * factor, labels=found.labels)


def _check_videos(runs: Sequence[Mapping[str, Detections]]) -> None:
    everything = dict.fromkeys(video_id for run in runs for video_id in run)
    problems = []
    for number, run in enumerate(runs):
        missing = [video_id for video_id in everything if video_id not in run]
        if missing:
            problems.append(f"run {number} lacks {listed(missing)}")
    if problems:
        raise ValueError(
            "The runs of an ensemble must have predictions of the same videos (maybe empty ones), "
            f"but {'; '.join(problems)}."
        )
