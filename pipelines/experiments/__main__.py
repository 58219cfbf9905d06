"""Experiments by name, in this process: `python -m pipelines.experiments NAME --help`.

  python -m pipelines.experiments NAME [--output FILE.json] [--threads N] [--resume] [options]
  python -m pipelines.experiments paper [options of pipelines/reproduce.py]
  python -m pipelines.experiments tables [FOLDER]

Results go to results/NAME.json beside this file. `--resume` reuses results of jobs that the same
code finished before. `paper` makes the report of pipelines/reproduce.py without Ray and MLflow, and
`tables` prints all results as Markdown.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from pipelines.experiments.harness import all_results, run_command
from re2tal.errors import UserError

RESULTS = Path(__file__).parent / "results"
_PROG = "python -m pipelines.experiments"

EXPERIMENTS = {
    "memory": "the paper's claim on memory: peaks of four ways to train, and clips that fit",
    "accuracy": "the paper's claim on rewired backbones: top-1 before and after finetuning",
    "tal": "the paper's claim on localization: features, end to end plain and reversible",
    "tunings": "accuracy of full finetuning, adapters, LoRA and a frozen backbone on toy data",
    "finetuning": "memory of full finetuning against that of adapters, and the longest windows",
    "exactness": "gradients against those of stored activations, also of other libraries",
    "speed": "time of a step in all ways to train, paired in one process, and over depth",
    "drift": "errors of gradients, on the grid and without it, over families and couplings",
    "kinds": "49 kinds of backbones of torchvision, timm and transformers, rewired",
    "verify": "time of the comparison of rebuilt inputs",
    "operators": "operators that a piece of a branch calls, and the bytes that they move",
    "devices": "peak memory and time of a step on an accelerator",
    "decoding": "frames per second, paired with those of other decoders that can be imported",
    "augmentation": "time that augmentation adds to a training step",
    "throughput": "frames that Ray Data delivers, against plain decoding in as many processes",
    "executions": "CPU and memory of Ray Data's executions, one beside each worker or one shared",
    "shards": "size of shards, and speed of reading windows, against raw files",
    "scaling": "a training step with more workers, and the share of gradient exchange",
    "nms": "soft-NMS of many videos, against a detection at a time",
    "evaluation": "mAP and recall of whole test sets, against a prediction at a time",
}
"""Experiments by name: those of the paper are classes `Name`, others functions `measure_NAME`."""

_MODULES = {
    "drift": "exactness",
    "executions": "throughput",
    "verify": "speed",
    "operators": "speed",
    "nms": "detections",
    "evaluation": "detections",
}
"""Modules of experiments whose module has another name."""


def main(arguments: Sequence[str]) -> None:
    """Run an experiment and print its results, or print all results.

    Raises:
        UserError: if there is no such experiment, or some of its jobs failed.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\n" + "\n".join(f"  {n:<13} {text}" for n, text in EXPERIMENTS.items()))
    elif name == "tables":
        print(all_results(Path(rest[0]) if rest else RESULTS))
    elif name == "paper":
        paper = import_module("pipelines.experiments.paper")
        asked = paper.parse(rest, __doc__ or "", prog=f"{_PROG} paper")
        paper.carry_out(asked).refuse_failures()
    elif name in EXPERIMENTS:
        module = import_module(f"pipelines.experiments.{_MODULES.get(name, name)}")
        settings = getattr(module, f"measure_{name}", None) or getattr(module, name.capitalize())
        run_command(rest, settings, prog=f"{_PROG} {name}", output=RESULTS / f"{name}.json")
    else:
        raise UserError(
            f"There is no experiment {name!r}. Choose one of: {', '.join(EXPERIMENTS)}; or paper, "
            "for all five of the paper; or tables."
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as problem:
        sys.exit(f"error: {problem}")
