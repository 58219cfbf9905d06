"""Resources of the cluster, and checks that a run fits; without them Ray would wait for ever."""

import math
import os
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config.recipe import PoolConfig, ScaleConfig
from pipelines.core.gpus import free_memory
from re2tal.errors import UserError

_ASKED_SECONDS = 120.0
CLUSTER_MAX = "RE2TAL_CLUSTER_MAX"
"""Environment variable with the largest resources of a cluster with an autoscaler."""


def check_resources(scale: ScaleConfig) -> None:
    """Compare the needs of a run with the resources of the whole cluster.

    Raises:
        UserError: CPUs or GPUs do not suffice for all workers, one evaluation beside them, if it is
            to run there, and one decoding task.
    """
    workers = scale.workers if scale.min_workers is None else scale.min_workers
    beside = min(1, scale.validation_workers)
    require_resources(
        cpus=(workers + beside) * scale.cpus_per_worker + scale.cpus_per_decoder,
        gpus=workers + beside if scale.gpu else 0,
        who=f"{workers} workers{', an evaluation beside them' * beside} and the decoding",
        advice="Lower --scale.workers or --scale.cpus-per-worker, "
        f"{'leave out --scale.validation-workers, ' * beside}or train without GPUs "
        "(--scale.no-gpu).",
    )


def evaluations_at_a_time(scale: ScaleConfig) -> int:
    """Return the number of evaluations that the cluster can hold beside all workers of a run.

    More would wait for resources, and take those of a worker that is lost before it is replaced.
    """
    have = capacity()
    fit = [scale.validation_workers]
    if scale.cpus_per_worker:
        left = have["CPU"] - scale.workers * scale.cpus_per_worker - scale.cpus_per_decoder
        fit.append(math.floor(left / scale.cpus_per_worker + 1e-6))
    if scale.gpu:
        fit.append(int(have.get("GPU", 0.0)) - scale.workers)
    return max(0, min(fit))


def require_resources(*, cpus: float, gpus: int, who: str, advice: str) -> None:
    """Compare needs with the resources that the whole cluster has or may grow to.

    Args:
        cpus: number of logical CPUs that are needed.
        gpus: number of GPUs that are needed.
        who: subject of the error's message, in the plural.
        advice: last sentence of the error's message.

    Raises:
        UserError: the cluster is too small.
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
    """Return the cluster's resources by name, including nodes that its autoscaler may start.

    Ray does not tell jobs the limits of its autoscaler. The cluster's configuration sets them in
    the environment of the head: `RE2TAL_CLUSTER_MAX=CPU=128,GPU=8`.

    Raises:
        UserError: the variable cannot be parsed.
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


def free_gpu_memory() -> list[int]:
    """List the free bytes of all GPUs of this machine, or of the cluster that was joined.

    The tasks that read them request no CPU and no GPU, so that busy nodes answer too.

    Raises:
        UserError: a node does not answer.
    """
    if not ray.is_initialized():
        return free_memory()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU", 0.0) > 0]
    answers = [
        ray.remote(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
        )(free_memory).remote(hidden=True)  # Ray hides GPUs from tasks that request none
        for n in nodes
    ]
    try:
        return [size for sizes in ray.get(answers, timeout=_ASKED_SECONDS) for size in sizes]
    except (GetTimeoutError, RayError) as failed:
        reason = (str(failed).splitlines() or [type(failed).__name__])[-1]
        raise UserError(
            f"The free memory of the cluster's GPUs could not be read: {reason}"
        ) from failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """`PoolConfig` with all defaults filled in for a cluster."""

    actors: int
    gpu: bool
    config: PoolConfig

    @property
    def device(self) -> str:
        """Device of each actor."""
        return "cuda" if self.gpu else "cpu"

    def map_batches(
        self, dataset: Any, actor: type, *, batch_size: int = 1, **arguments: Any
    ) -> Any:
        """Map the actors over the rows of a Ray Dataset.

        Args:
            dataset: decoded rows.
            actor: class whose instances are called with batches of NumPy arrays.
            batch_size: number of rows in a batch.
            arguments: arguments of the actor's `__init__`.
        """
        return dataset.map_batches(
            actor,
            fn_constructor_kwargs=arguments,
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=self.actors),
            num_cpus=self.config.cpus_per_actor,
            num_gpus=1 if self.gpu else None,
        )


def pool_for(config: PoolConfig, *, cpu_share: float = 0.0) -> Pool:
    """Fill in the defaults of a pool, and check that the cluster can hold it.

    Args:
        config: options of the pool.
        cpu_share: without GPUs, default number of actors as a share of the CPUs; at least one.

    Raises:
        UserError: CPUs or GPUs do not suffice for the actors and one decoding task.
    """
    gpu = capacity().get("GPU", 0.0) > 0 if config.gpu is None else config.gpu
    now = ray.cluster_resources()
    there = now.get("GPU", 0.0) if gpu else cpu_share * now.get("CPU", 0.0)
    actors = config.actors or max(1, int(there))
    require_resources(
        cpus=actors * config.cpus_per_actor + config.cpus_per_decoder,
        gpus=actors if gpu else 0,
        who=f"{actors} actors and the decoding",
        advice="Lower --actors or --cpus-per-actor, or go without GPUs (--gpu False).",
    )
    return Pool(actors=actors, gpu=gpu, config=config)
