"""A check that the cluster can hold the run: Ray itself would wait for ever."""

import ray

from pipelines.recipes import ScaleConfig

DECODE_CPUS = 0.5  # logical CPUs of one decoding task; PyAV decodes with one thread


class ResourceError(Exception):
    """The cluster is too small for the run; the message says by how much."""


def check_resources(scale: ScaleConfig) -> None:
    """Compares what a run needs with what the cluster has in all.

    Args:
        scale: how the run is laid out.

    Raises:
        ResourceError: if CPUs or GPUs do not suffice for all workers and one decoding task.
    """
    have = ray.cluster_resources()
    need = {
        "CPU": scale.workers * scale.cpus_per_worker + DECODE_CPUS,
        "GPU": float(scale.workers if scale.gpu else 0),
    }
    missing = [
        f"{need[name]:g} {name}s (it has {have.get(name, 0.0):g})"
        for name in need
        if need[name] > have.get(name, 0.0)
    ]
    if missing:
        raise ResourceError(
            f"The cluster is too small: {scale.workers} workers and the decoding need "
            f"{' and '.join(missing)}. Lower --scale.workers or --scale.cpus-per-worker, or train "
            "without GPUs (--scale.no-gpu)."
        )
