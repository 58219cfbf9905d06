"""Ray without its own output: a run prints its progress, and errors, and nothing else."""

import logging
import os
import socket
from typing import Any

import ray
import ray.data

from re2tal.errors import UserError

_KNOCK_SECONDS = 5.0

# Read when Ray's modules are imported or its processes start, so they are set before `ray.init`.
_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # `ray.train.report` waits for the controller's next poll: 2 s by default, for every epoch
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def init_ray(*, trains: bool = False, cpus: int | None = None) -> None:
    """Join the cluster that `RAY_ADDRESS` names (as in a Ray job), else start one here.

    Args:
        trains: start the cluster's server too, which takes some seconds: Ray Train asks it whether
            its controller lives.
        cpus: logical CPUs of a cluster started here; None for those of this machine.

    Raises:
        UserError: nothing answers at `RAY_ADDRESS`.
    """
    if ray.is_initialized():  # as in a Ray task
        quiet_data()
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # here, because a process that streams frames has no command line, and need not import PyTorch
    from pipelines.config.choices import own_code

    # uploaded, because no other machine has it
    environment: dict[str, Any] = {"py_modules": code} if (code := own_code()) else {}
    if (address := os.environ.get("RAY_ADDRESS")) is not None:
        if problem := unreachable(address):
            raise UserError(
                f"The cluster at {address} (RAY_ADDRESS) cannot be joined ({problem}). Start it "
                "(ray start --head), correct the variable, or unset it to use this machine alone."
            )
        environment["env_vars"] = {name: os.environ[name] for name in _ENVIRONMENT}
        ray.init(logging_level="ERROR", log_to_driver=False, runtime_env=environment)
    else:
        # this machine is not taken away, as a preemptible node is
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # an idle decoding process would be ended after a second, and its imports paid for again
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
        port = free_port()
        if trains:
            # Without an address Ray Train would ask the cluster that was last started with `ray
            # start`, running or not: it then waits in vain, or takes its own controller for dead
            # and takes the workers away.
            os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        # "local", so that a cluster left running on this machine is not joined by accident
        ray.init(
            address="local",
            num_cpus=cpus,
            logging_level="ERROR",
            log_to_driver=False,
            include_dashboard=trains,
            dashboard_port=port,
            runtime_env=environment or None,
        )
    quiet_data()


def unreachable(address: str) -> str:
    """Try to connect to a cluster's address: Ray itself would wait for minutes, and say nothing.

    Returns:
        The reason why nothing answers; empty if something does, or `address` is no host and port.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdigit():
        return ""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS):
            return ""
    except OSError as error:
        return str(error) or type(error).__name__


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet_data() -> None:
    """Turn off Ray Data's progress bars, and its remark that they are off, in this process."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
