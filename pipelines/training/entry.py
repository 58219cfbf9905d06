"""Function that Ray Train starts on every worker.

Ray Train's controller, a process of its own, also loads this function and its configuration, but
needs none of a worker's imports, which take ten seconds. So only the worker imports them, and its
configuration lies in the object store.
"""

from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from pipelines.training.worker import TrainingProblem


def train_worker(config: dict[str, Any]) -> "dict[str, float] | TrainingProblem":
    """Train one worker's share of a run.

    Args:
        config: dictionary, as Ray Train asks for, with a reference to a
            `pipelines.training.worker.Job` under "job".

    Returns:
        The metrics of the last epoch, or the problem that stopped all workers alike.
    """
    from pipelines.training.worker import train  # see above

    return train(ray.get(config["job"]))
