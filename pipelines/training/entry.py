"""What Ray Train starts on every worker.

Ray Train's controller, a process of its own, reads this function and its configuration too. It has
no use for what a worker imports, which takes ten seconds: so that is imported by the worker alone,
and what it is told lies in the object store.
"""

from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from pipelines.training.worker import TrainingProblem


def train_worker(config: dict[str, Any]) -> "dict[str, float] | TrainingProblem":
    """Trains one worker's share of a run.

    Args:
        config: under "job" a reference to a `pipelines.training.worker.Job`; Ray Train hands over
            dictionaries.

    Returns:
        The metrics of the last epoch, or what all workers alike came upon.
    """
    from pipelines.training.worker import train  # see above

    return train(ray.get(config["job"]))
