"""A check that the cluster can hold the run: Ray itself would wait for ever."""

import os

import ray

from pipelines.config.recipe import ScaleConfig
from re2tal.errors import UserError

CLUSTER_MAX = "RE2TAL_CLUSTER_MAX"
"""Variable with what a cluster that starts nodes by itself may come to have."""


def check_resources(scale: ScaleConfig) -> None:
    """Compares what a run needs with what the cluster has in all.

    Args:
        scale: how the run is laid out.

    Raises:
        UserError: if CPUs or GPUs do not suffice for all workers and one decoding task.
    """
    workers = scale.workers if scale.min_workers is None else scale.min_workers
    require_resources(
        cpus=workers * scale.cpus_per_worker + scale.cpus_per_decoder,
        gpus=workers if scale.gpu else 0,
        who=f"{workers} workers and the decoding",
        advice="Lower --scale.workers or --scale.cpus-per-worker, or train without GPUs "
        "(--scale.no-gpu).",
    )


def require_resources(*, cpus: float, gpus: int, who: str, advice: str) -> None:
    """Compares what is needed with what the cluster has in all, or may grow to.

    Args:
        cpus: logical CPUs.
        gpus: GPUs.
        who: needs them, for the message.
        advice: what to do, a sentence.

    Raises:
        UserError: if they do not suffice.
    """
    have = capacity()
    need = {"CPU": cpus, "GPU": float(gpus)}
    missing = [
        f"{need[name]:g} {name}s (it has {have.get(name, 0.0):g})"
        for name in need
        if need[name] > have.get(name, 0.0)
    ]
    if missing:
        raise UserError(f"The cluster is too small: {who} need {' and '.join(missing)}. {advice}")


def capacity() -> dict[str, float]:
    """What the cluster has of each resource or, if it starts nodes by itself, may come to have.

    Ray does not tell jobs what its autoscaler may start, so who makes a cluster says it in the
    environment of its head: `RE2TAL_CLUSTER_MAX=CPU=128,GPU=8`.

    Raises:
        UserError: if that cannot be read.
    """
    have = dict(ray.cluster_resources())
    stated = os.environ.get(CLUSTER_MAX, "")
    try:
        pairs = [part.split("=") for part in stated.split(",") if part]
        most = {name.strip(): float(number) for name, number in pairs}
    except ValueError:
        raise UserError(
            f"{CLUSTER_MAX}={stated} cannot be read: give numbers of resources, such as "
            "CPU=128,GPU=8."
        ) from None
    return have | {name: max(number, have.get(name, 0.0)) for name, number in most.items()}
