"""Start of Ray, without Ray's own output: a run prints only its progress and errors."""

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
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # after this time Ray ends the process
_WATCH_SECONDS = 1.0  # between two checks of Ray's head process
# Seconds from the start of this process to here: a measure of how slow the machine is now.
_START_SECONDS = time.time() - psutil.Process().create_time()

# Ray reads these when it is imported or its processes start: they are set before `ray.init`.
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
        trains: also start the dashboard's server, which takes some seconds: Ray Train asks it
            whether its controller is alive.
        cpus: logical CPUs of a cluster started here; None for those of this machine.

    Raises:
        UserError: nothing answers at `RAY_ADDRESS`, or Ray does not start.
    """
    if ray.is_initialized():  # as inside a Ray task
        quiet_data()
        return
    hide_noise()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # imported here: processes that stream frames do not need it, and need not import PyTorch
    from pipelines.config.choices import own_code

    # the user's own module is uploaded, because no other machine has it
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
        # the head of a cluster may be restarted; give up a little before Ray would end the process
        patience = 0.8 * float(os.environ.get(_RECONNECT, "60"))
    else:
        # this machine is no preemptible node
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # by default Ray ends an idle decoding process after a second, and its imports are repeated
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
        port = free_port()
        if trains:
            # Without an address Ray Train would ask the cluster that was last started with `ray
            # start`, even one that no longer runs. It would then wait in vain, or conclude that its
            # own controller is dead and stop the workers.
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


# The raylet warns of many processes started at once; a run needs them all, but only once.
_NOT_TO_ACT_ON = re.compile("worker processes have been started on node")


def hide_noise() -> None:
    """Remove from the driver's output the raylet's lines that no user can act on."""
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
    """Return the time limit of Ray's start: six times `seconds`, which this process took to start.

    At least a minute; at most ten, because `seconds` may include other work, as in a notebook.
    """
    return int(min(600, max(60, 6 * seconds)))


@contextmanager
def _waiting(seconds: int) -> Iterator[None]:
    """Let Ray wait `seconds` for its own processes, instead of its fixed 30 s."""
    get_node, dashboard = services.get_node, ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S

    def patient(gcs_address: str, node_id: str) -> Any:
        until = time.monotonic() + seconds
        while True:
            try:
                return get_node(gcs_address, node_id)
            except RuntimeError:  # the node is not registered yet
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


# Advice by pattern of Ray's reason. The first match counts; the empty pattern matches all others.
_SLOW = (
    "It did not answer for {seconds} s: the machine is too busy, or short of memory. End other "
    "programs, and give the same command again."
)
_START_ADVICE = {
    "occupied|already (in )?use|port is": "End the program that uses the port (ray stop ends "
    "leftover processes of Ray), and give the same command again.",
    "dev/shm|object store|plasma": "Make room in /dev/shm (in Docker: --shm-size), or let Ray use "
    "its slower folder for temporary files: RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE=1.",
    "no space left": "Make room in the folder for temporary files, or name another: RAY_TMPDIR.",
    "path length": "Name a folder for temporary files with a shorter path: RAY_TMPDIR.",
    "": "End leftover processes of Ray (ray stop), and make sure that its folder for temporary "
    "files (RAY_TMPDIR, else /tmp) is writable.",
}
_JOIN_ADVICE = {
    "": "Start it again, and give RAY_AUTH_MODE the value that it was started with.",
}
_SHOWN = 400  # characters of a reason
_BESIDE = re.compile(  # log prefixes and failed checks around Ray's reason
    r"\[[^\]]*\] \(\w+\) \S+\.cc:\d+:|An unexpected system state.*?Check failed: \S+"
)


@contextmanager
def _told(what: str, advice: dict[str, str]) -> Iterator[None]:
    """Turn any exception of Ray's into one sentence with its reason and advice.

    Raises:
        UserError: Ray raised an exception.
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
    """Watch Ray's head process until Ray is shut down, and give up when the head is gone.

    Ray itself reports nothing for a minute, and then ends this process without an exception.

    Args:
        address: host and port of the head process.
        patience: seconds for which the head may be silent. With 0 nobody restarts it, and it counts
            as gone once its port is closed.
        give_up: function called with a sentence that reports the loss.
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
                    f"waiting {patience:.0f} s for it.",
                    file=sys.stderr,
                    flush=True,
                )
        elif now - silent_since > patience:
            give_up(
                f"Ray's head process at {address} is gone ({problem}), and the run cannot go on "
                "without it. It may have been killed for lack of memory: see gcs_server.out among "
                "Ray's logs. Give the same command again: it continues."
            )
            return
        time.sleep(_WATCH_SECONDS)


def _is_joined(address: str) -> bool:
    try:
        return ray.is_initialized() and str(ray.get_runtime_context().gcs_address) == address
    except Exception:  # Ray is being shut down
        return False


def _give_up(sentence: str) -> None:
    """End this process as failed: its main thread waits inside Ray, out of reach of exceptions."""
    from pipelines.core.tracking import end_all  # here: decoding processes need no MLflow

    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    for problem in end_all("FAILED", error=sentence):
        print(problem, file=sys.stderr, flush=True)
    os._exit(1)


def unreachable(address: str) -> str:
    """Try to connect to a cluster's address; Ray itself would wait for minutes without a word.

    Returns:
        The reason why nothing answers; empty if something does, or `address` is not HOST:PORT.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdigit():
        return ""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS):
            return ""
    except OSError as error:
        return str(error) or type(error).__name__


# Port on which the dashboard of a Ray that starts shows its own metrics, before it binds its own.
_DASHBOARD_METRICS = 44227


def free_port() -> int:
    """Return a free port of this machine, which Ray does not take for itself when it starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        return free_port() if port == _DASHBOARD_METRICS else port  # another, as this one is bound


def quiet_data() -> None:
    """Turn off Ray Data's progress bars in this process, and its message that they are off."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
