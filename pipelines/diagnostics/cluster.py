"""Joins the cluster, or starts a local Ray, and ends it."""

import os
import threading
from collections.abc import Sequence

import ray

from pipelines.config.command_line import unreachable
from pipelines.core.cluster import init_ray
from pipelines.diagnostics.finding import Finding, fail, ok
from pipelines.diagnostics.nodes import Node, alive_nodes
from pipelines.diagnostics.reasons import reason

CHECK = "ray"


def check_ray(*, seconds: float) -> tuple[list[Finding], list[Node]]:
    """Joins the cluster that `RAY_ADDRESS` names, or starts a Ray here.

    Args:
        seconds: to wait for it.

    Returns:
        What was found, and the nodes; none if there is no Ray.
    """
    address = os.environ.get("RAY_ADDRESS")
    problem = _join(address, seconds) if address else _start()
    if problem:
        return [fail(CHECK, _advised(address, problem))], []
    nodes = alive_nodes()
    what = f"the cluster at {address}" if address else "a Ray started here"
    count = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    return [ok(CHECK, f"{ray.__version__}, {what}: {count}.")], nodes


def _start() -> str:
    """Why there is no Ray; empty if there is.

    A Ray that is started here must be by the main thread: its processes end with the thread.
    """
    try:
        init_ray()
    except Exception as error:
        return reason(error)
    return ""


def _join(address: str, seconds: float) -> str:
    """Why the cluster could not be joined; empty if it was."""
    if problem := unreachable(address):
        return problem
    outcome: list[str] = []
    thread = threading.Thread(target=lambda: outcome.append(_start()), daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"it did not answer within {seconds:g} s"


def _advised(address: str | None, problem: str) -> str:
    if address is None:
        return (
            f"Ray does not start on this machine ({problem}). End what an earlier Ray left behind "
            "(ray stop), and see that its folder for temporary files can be written."
        )
    return (
        f"The cluster at {address} cannot be joined ({problem}). Start it (ray start --head), "
        "correct RAY_ADDRESS, or unset it to use this machine alone; and give RAY_AUTH_MODE the "
        "value that the cluster was started with."
    )


def end_ray(nodes: Sequence[Node]) -> None:
    """Leaves the cluster; a Ray that was started here is ended.

    Ray's folder stays, as after any program: another Ray on this machine may be using its link.

    Args:
        nodes: what `check_ray` returned.
    """
    if nodes:
        ray.shutdown()
