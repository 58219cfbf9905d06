"""Runs the official ActivityNet evaluators on whole test sets, and keeps their numbers.

Run by hand: those evaluators are no part of this repository. To make
`data/official_evaluation.json` again, check out github.com/activitynet/ActivityNet at `COMMIT`,
make `Evaluation/eval_detection.py`, `eval_proposal.py` and `utils.py` run under Python 3 (`print`,
`iteritems`, `xrange`, `urllib2`, `np.float`, `np.int`; nothing that computes), and name the folder:

    python -m tests.detection.official_numbers ActivityNet/Evaluation

That takes about half an hour of one core, and writes the times of both, too, to
`pipelines/experiments/results/evaluation_official.json`. All scores of the test sets are
different, because the official code visits equal ones in any order.

What is kept now was made by these functions in several processes, each with some of the classes,
and they were stopped before the official code had worked through all of ActivityNet's 200.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipelines.experiments.__main__ import RESULTS
from pipelines.experiments.detections import ACTIVITYNET, THUMOS, RandomTestSet, Videos
from pipelines.experiments.experiment import Row, Section
from pipelines.experiments.harness import Chapter, circumstances, write
from re2tal.detection import Detections, average_recall, mean_average_precision

COMMIT = "82304fa9f4a7219421df13dae6347a445c4cf5bc"
NUMBERS = Path(__file__).parent / "data" / "official_evaluation.json"
WORKLOADS = {"thumos": THUMOS, "activitynet": ACTIVITYNET}
_ROUNDS = 10  # how often ours runs, spread over the classes that the official code works through
_DIGITS = 9  # of the numbers that are kept


def frame(videos: Mapping[str, Detections]) -> Any:
    """Table in which the official code keeps its segments."""
    rows = [
        (video, start, end, label, score)
        for video, part in videos.items()
        for (start, end), label, score in zip(
            part.segments.tolist(), part.labels.tolist(), part.scores.tolist(), strict=True
        )
    ]
    return pd.DataFrame(rows, columns=["video-id", "t-start", "t-end", "label", "score"])


def timed(way: Callable[..., Any], *arguments: Any, **settings: Any) -> tuple[Any, float]:
    """Result, and the seconds that this process computed, whatever else runs beside it."""
    before = time.process_time()
    result = way(*arguments, **settings)
    return result, time.process_time() - before


def average_precisions(
    load: RandomTestSet, truth: Videos, found: Videos, official: Any
) -> tuple[dict[str, list[float]], Row]:
    """By class the average precisions `(K,)` of the official code; seconds of both."""
    sides = [frame(videos).groupby("label") for videos in (truth, found)]
    ours, theirs, values = [], [], {}
    for label in range(load.classes):
        if label % max(1, load.classes // _ROUNDS) == 0:
            _, seconds = timed(
                mean_average_precision,
                truth,
                found,
                num_classes=load.classes,
                thresholds=load.thresholds,
            )
            ours.append(seconds)
        of_class = [side.get_group(label).reset_index(drop=True) for side in sides]
        row, seconds = timed(
            official.compute_average_precision_detection,
            *of_class,
            tiou_thresholds=np.array(load.thresholds),
        )
        theirs.append(seconds)
        values[str(label)] = row.round(_DIGITS).tolist()
        sys.stderr.write(f"{load.title}: class {label}, {sum(theirs):.0f} s\n")
    return values, _row("mAP", sum(theirs), ours)


def recalls(truth: Videos, found: Videos, official: Any) -> tuple[dict[str, Any], Row]:
    """Recalls of up to 100 proposals a video by the official code; seconds of both."""
    ours = [timed(average_recall, truth, found)[1] for _ in range(3)]
    (recall, average, numbers), theirs = timed(
        official.average_recall_vs_avg_nr_proposals,
        frame(truth),
        frame(found),
        max_avg_nr_proposals=100,
    )
    # `evaluate` prints this; np.trapz, which it takes, has another name by now
    area = 100.0 * float(np.trapezoid(average, numbers)) / float(numbers[-1])
    values = {
        "recall": recall.round(_DIGITS).tolist(),
        "average_recall": average.round(_DIGITS).tolist(),
        "auc": area,
    }
    return values, _row("average recall", theirs, ours)


def _row(metric: str, theirs: float, ours: list[float]) -> Row:
    return {
        "metric": metric,
        "official code, seconds": theirs,
        "ours, seconds": median(ours),
        "times as fast": theirs / median(ours),
    }


def main(folder: str) -> None:
    """Writes the numbers and the times."""
    torch.set_num_threads(1)
    sys.path.insert(0, folder)
    of_detection, of_proposals = map(importlib.import_module, ("eval_detection", "eval_proposal"))
    numbers, tables = {}, {}
    for name, load in WORKLOADS.items():
        truth, found = load.build()
        precision, detecting = average_precisions(load, truth, found, of_detection)
        recall, proposing = recalls(truth, found, of_proposals)
        numbers[name] = {"checksum": load.checksum(), "average_precision": precision, **recall}
        tables[load.title] = [detecting, proposing]
    NUMBERS.parent.mkdir(exist_ok=True)
    NUMBERS.write_text(json.dumps({"commit": COMMIT, "workloads": numbers}) + "\n")
    command = "python -m tests.detection.official_numbers ActivityNet/Evaluation"
    title = "Evaluation of whole test sets, against the official ActivityNet code"
    chapter = Chapter(
        name="evaluation_official", section=Section(title=title, text="", tables=tables)
    )
    facts = circumstances(command, torch.device("cpu"))
    write([chapter], facts, RESULTS / "evaluation_official.json")


if __name__ == "__main__":
    main(sys.argv[1])
