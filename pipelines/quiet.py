"""Ray with its noise turned down: a run prints its own progress, and errors, and nothing else."""

import os

import ray
import ray.data

# Read when Ray's modules are imported or its processes start, so they are set before `ray.init`.
_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # `ray.train.report` waits for the controller's next poll: 2 s by default, for every epoch
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


def init_ray() -> None:
    """Joins the cluster that `RAY_ADDRESS` names (as in a Ray job), else starts one here."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_ADDRESS" in os.environ:
        environment = {"env_vars": {name: os.environ[name] for name in _ENVIRONMENT}}
        ray.init(logging_level="ERROR", log_to_driver=False, runtime_env=environment)
    else:
        # other users of this machine must not be able to submit work to the instance
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        ray.init(address="local", logging_level="ERROR", log_to_driver=False)
    quiet_data()


def quiet_data() -> None:
    """Turns Ray Data's own progress off in this process."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
