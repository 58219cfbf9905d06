"""Search non-maximum suppression and voting on a run's detections, without training again.

The run must have kept its raw detections (train.py --save-raw; trials of sweeps/localizer.py keep
them):

  python sweeps/postprocessing.py --run RUN_ID
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from pipelines.config.command_line import told_shortly
from pipelines.core.storage import absolute
from pipelines.core.tracking import Run, tracking_uri


@dataclass(frozen=True, kw_only=True, slots=True)
class PostprocessingConfig:
    """Configuration of a search of post-processing.

    Attributes:
        run: id of a training run in MLflow that kept its raw detections.
        trials: number of settings to try.
        seed: seed of the search.
        output: folder of the default MLflow store.
    """

    run: str
    trials: int = 100
    seed: int = 0
    output: str = "runs"


def main(arguments: Sequence[str]) -> None:
    """Search from the command line, without the program's name."""
    config = tyro.cli(PostprocessingConfig, args=arguments, description=__doc__)
    # imported here: Ray and MLflow take seconds, and a mistyped option should fail at once
    from sweeps.suppression import search_postprocessing

    run = Run(uri=tracking_uri(absolute(config.output)), run_id=config.run)
    with told_shortly():
        found = search_postprocessing(
            run, trials=config.trials, seed=config.seed, parent=config.run
        )
        print(f"average mAP {found.before:.4f} with the recipe's settings, {found.after:.4f} with")
        print("  " + " ".join(found.options))
        print(f"MLflow run {found.run.run_id} in {found.run.uri}")


if __name__ == "__main__":
    main(sys.argv[1:])
