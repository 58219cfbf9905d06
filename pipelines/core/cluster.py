"""Ray without its own output: a run prints its progress, and errors, and nothing else."""

import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import ray
import ray.data
from ray._private import ray_constants, services
from ray._private import worker as ray_worker

from pipelines.core.progress import doing
from re2tal.errors import UserError

_KNOCK_SECONDS = 5.0
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # after which Ray ends the process
_WATCH_SECONDS = 1.0  # between two looks at Ray's head process
# Seconds from the start of this process to here, which tell how slow the machine is just now.
_START_SECONDS = time.time() - psutil.Process().create_time()

# Read when Ray's modules are imported or its processes start, so they are set before `ray.init`.
_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # `ray.train.report` waits for the controller's next poll: 2 s by default, for every epoch
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # runs and workers in the dashboard's API
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def start_ray(*, trains: bool = False) -> None:
    """Join or start Ray as `init_ray` does, and show that this is being done."""
    with nullcontext() if ray.is_initialized() else doing("starting Ray"):
        init_ray(trains=trains)


def init_ray(*, trains: bool = False, cpus: int | None = None) -> None:
    """Join the cluster that `RAY_ADDRESS` names (as in a Ray job), else start one here.

    Args:
        trains: start the cluster's server too, which takes some seconds: Ray Train asks it whether
            its controller lives.
        cpus: logical CPUs of a cluster started here; None for those of this machine.

    Raises:
        UserError: nothing answers at `RAY_ADDRESS`, or Ray does not start.
    """
    if ray.is_initialized():  # as in a Ray task
        quiet_data()
        return
    hide_noise()
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
        with _told(f"The cluster at {address} (RAY_ADDRESS) cannot be joined", _JOIN_ADVICE):
            ray.init(logging_level="ERROR", log_to_driver=False, runtime_env=environment)
        # the head of a cluster may be started again
        patience = 0.8 * float(os.environ.get(_RECONNECT, "60"))
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
        seconds = start_limit(_START_SECONDS)
        advice = {"timed out|overloaded": _SLOW.format(seconds=seconds), **_START_ADVICE}
        with _told("Ray does not start on this machine", advice), _waiting(seconds):
            ray.init(
                address="local",
                num_cpus=cpus,
                logging_level="ERROR",
                log_to_driver=False,
                include_dashboard=trains,
                dashboard_port=port,
                runtime_env=environment or None,
            )
        patience = 0.0
    if not str(address).startswith("ray://"):
        gcs = ray.get_runtime_context().gcs_address
        threading.Thread(target=watch, args=(gcs, patience, _give_up), daemon=True).start()
    quiet_data()


# The raylet counts processes that are started at once; a run needs all of them, once.
_NOT_TO_ACT_ON = re.compile("worker processes have been started on node")


def hide_noise() -> None:
    """Keep lines of the raylet that no user can act on from the driver's output."""
    shown = ray_worker.print_to_stdstream
    if getattr(shown, "hides_noise", False):
        return

    def print_rest(data: dict[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if not _NOT_TO_ACT_ON.search(line)]
        if lines:
            shown(data | {"lines": lines}, ignore_prefix)

    vars(print_rest)["hides_noise"] = True
    ray_worker.print_to_stdstream = print_rest


def start_limit(seconds: float) -> int:
    """Return the seconds that Ray has to start: six times those that this process took, or 60.

    A process that took long because it did something else, such as a notebook, is not waited for
    longer than ten minutes.
    """
    return int(min(600, max(60, 6 * seconds)))


@contextmanager
def _waiting(seconds: int) -> Iterator[None]:
    """Let Ray wait longer for its own processes than its fixed 30 s."""
    get_node, dashboard = services.get_node, ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S

    def patient(gcs_address: str, node_id: str) -> Any:
        until = time.monotonic() + seconds
        while True:
            try:
                return get_node(gcs_address, node_id)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(seconds))
    os.environ.setdefault("RAY_worker_register_timeout_seconds", str(seconds))
    services.get_node = patient
    ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S = max(seconds, dashboard)
    try:
        yield
    finally:
        services.get_node = get_node
        ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S = dashboard


# advice by pattern of Ray's reason: the first that is found in it, so the last is for all others
_SLOW = (
    "It was waited for {seconds} s: the machine is too busy, or short of memory. End other "
    "programs, and give the same command again."
)
_START_ADVICE = {
    "occupied|already (in )?use|port is": "End the program that has the port (ray stop ends a Ray "
    "that was left behind), and give the same command again.",
    "dev/shm|object store|plasma": "Make room in /dev/shm (in Docker: --shm-size), or let Ray use "
    "its slower folder for temporary files: RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE=1.",
    "no space left": "Make room in the folder for temporary files, or name another: RAY_TMPDIR.",
    "path length": "Name a folder for temporary files with a shorter path: RAY_TMPDIR.",
    "": "End what an earlier Ray left behind (ray stop), and see that its folder for temporary "
    "files (RAY_TMPDIR, else /tmp) is writable.",
}
_JOIN_ADVICE = {
    "": "Start it again, and give RAY_AUTH_MODE the value that it was started with.",
}
_SHOWN = 400  # characters of a reason
_BESIDE = re.compile(  # what Ray's logs hold beside a reason
    r"\[[^\]]*\] \(\w+\) \S+\.cc:\d+:|An unexpected system state.*?Check failed: \S+"
)


@contextmanager
def _told(what: str, advice: dict[str, str]) -> Iterator[None]:
    """Turn whatever Ray raises into one sentence with its reason, and what to do.

    Raises:
        UserError: Ray raised something.
    """
    try:
        yield
    except Exception as error:
        text = " ".join(_BESIDE.sub("", str(error)).split()) or type(error).__name__
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
        matching = [told for pattern, told in advice.items() if re.search(pattern, text.lower())]
        raise UserError(f"{what} ({text}). {matching[0]}") from error


def watch(address: str, patience: float, give_up: Callable[[str], None]) -> None:
    """Look after Ray's head process until Ray is shut down, and give up when it is gone.

    Ray itself says nothing for a minute and then ends this process, without an exception.

    Args:
        address: host and port of the process.
        patience: seconds for which it may be silent; 0 if nobody would start it again, and it is
            gone once its port is closed.
        give_up: function that gets the sentence which says so.
    """
    silent_since = None
    while _is_joined(address):
        problem = unreachable(address)
        now = time.monotonic()
        if not problem or (not patience and "refused" not in problem.lower()):
            silent_since = None
        elif silent_since is None:
            silent_since = now
            if patience:
                print(
                    f"warning: the head of the cluster at {address} does not answer ({problem}); "
                    f"it is waited for, {patience:.0f} s.",
                    file=sys.stderr,
                    flush=True,
                )
        elif now - silent_since > patience:
            give_up(
                f"Ray's head process at {address} is gone ({problem}), and nothing can go on "
                "without it. It may have been killed for want of memory: see gcs_server.out among "
                "Ray's logs. Give the same command again: it goes on."
            )
            return
        time.sleep(_WATCH_SECONDS)


def _is_joined(address: str) -> bool:
    try:
        return ray.is_initialized() and str(ray.get_runtime_context().gcs_address) == address
    except Exception:  # it is being shut down
        return False


def _give_up(sentence: str) -> None:
    """End this process as failed: its main thread waits within Ray, and hears no exception."""
    from pipelines.core.tracking import end_all  # here, since decoding processes need no MLflow

    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    for problem in end_all("FAILED", error=sentence):
        print(problem, file=sys.stderr, flush=True)
    os._exit(1)


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
