"""Reports of a trial's epochs to Ray Tune.

Ray Train's controller and workers import this module, so it does not import a trial's modules.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines.core.metric_names import MAP, MEMORY, UNSCORED

RUN_ID = "run_id"


class EpochReports(TuneReportCallback):
    """Callback that forwards each evaluated epoch's report to Ray Tune."""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        # Ray Tune requires all searched metrics in every report; memory is known only at the end
        self._always = {RUN_ID: run_id, MEMORY: math.nan}

    def after_report(
        self,
        run_context: Any,
        metrics: Sequence[Mapping[str, Any]],
        checkpoint: Checkpoint | None,
    ) -> None:
        """Report the metrics of rank 0."""
        if metrics[0].get(MAP, UNSCORED) != UNSCORED:
            whole = {**self._always, **metrics[0]}
            super().after_report(run_context, [whole, *metrics[1:]], checkpoint)
