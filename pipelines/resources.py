"""A check that the cluster can hold the run: Ray itself would wait for ever."""

import math
import os
from typing import Any

import ray

from pipelines.settings import ScaleConfig
from pipelines.streaming import store_needed
from pipelines.task import AnyRecipe
from re2tal.reversible.convolutions import WRONG_GRADIENTS, wrong_gradients

CLUSTER_MAX = "RE2TAL_CLUSTER_MAX"
"""Variable with what a cluster that starts nodes by itself may come to have."""


class ResourceError(Exception):
    """The cluster is too small for the run; the message says by how much."""


def check_resources(scale: ScaleConfig) -> None:
    """Compares what a run needs with what the cluster has in all.

    Args:
        scale: how the run is laid out.

    Raises:
        ResourceError: if CPUs or GPUs do not suffice for all workers and one decoding task.
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
        ResourceError: if they do not suffice.
    """
    have = capacity()
    need = {"CPU": cpus, "GPU": float(gpus)}
    missing = [
        f"{need[name]:g} {name}s (it has {have.get(name, 0.0):g})"
        for name in need
        if need[name] > have.get(name, 0.0)
    ]
    if missing:
        raise ResourceError(
            f"The cluster is too small: {who} need {' and '.join(missing)}. {advice}"
        )


def capacity() -> dict[str, float]:
    """What the cluster has of each resource or, if it starts nodes by itself, may come to have.

    Ray does not tell jobs what its autoscaler may start, so who makes a cluster says it in the
    environment of its head: `RE2TAL_CLUSTER_MAX=CPU=128,GPU=8`.

    Raises:
        ResourceError: if that cannot be read.
    """
    have = dict(ray.cluster_resources())
    stated = os.environ.get(CLUSTER_MAX, "")
    try:
        pairs = [part.split("=") for part in stated.split(",") if part]
        most = {name.strip(): float(number) for name, number in pairs}
    except ValueError:
        raise ResourceError(
            f"{CLUSTER_MAX}={stated} cannot be read: give numbers of resources, such as "
            "CPU=128,GPU=8."
        ) from None
    return have | {name: max(number, have.get(name, 0.0)) for name, number in most.items()}


def remarks(recipe: AnyRecipe, nodes: list[dict[str, Any]]) -> list[str]:
    """List, in sentences, what makes a run with a backbone slower than it looks.

    Args:
        recipe: configuration of the run.
        nodes: nodes of the cluster, as `ray.nodes` lists them.
    """
    found = [remark] if (remark := _store_remark(recipe, nodes)) else []
    if recipe.optim.precision == "bfloat16" and not recipe.scale.gpu and wrong_gradients():
        found.append(WRONG_GRADIENTS)
    return found


def _store_remark(recipe: AnyRecipe, nodes: list[dict[str, Any]]) -> str | None:
    """What to say when frames on their way to the workers do not fit the object store.

    The run would work, but slowly: Ray spills to the disk what does not fit.

    Args:
        recipe: the run's configuration.
        nodes: of the cluster, as `ray.nodes` lists them.

    Returns:
        A sentence, or None if they fit.
    """
    data = recipe.data
    size = max(data.size, data.augmentation.decoded_size(data.size))
    batch = recipe.batch_size * data.window.frames * size * size * 3
    stores = [
        node["Resources"].get("object_store_memory", 0.0)
        for node in nodes
        if node["Alive"] and node["Resources"].get("CPU", 0.0) > 0  # else no worker is there
    ]
    if not stores:
        return None  # they are still to be started
    workers = math.ceil(recipe.scale.workers / len(stores))
    need, have = workers * store_needed(batch), min(stores)
    if need <= have:
        return None
    return (
        f"The frames on their way to {workers} workers of a node need an object store of "
        f"{need / 2**30:.1f} GiB, but it has {have / 2**30:.1f}: Ray will spill to the disk. Start "
        "it with a larger one (ray start --object-store-memory), or lower --batch-size."
    )
