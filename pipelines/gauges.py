"""A worker's speed, waiting and memory in Prometheus form, beside Ray's own metrics.

Ray's agent of each node hands them out; cluster/README.md says where, and has a Grafana dashboard.
"""

from collections.abc import Mapping

from ray.util.metrics import Gauge

from re2tal.memory.units import MEGABYTE

# Metric of a step, gauge, what it is, and what a metric's unit is in Prometheus' base units.
_GAUGES = (
    ("train/frames_per_second", "frames_per_second", "Frames a second that a worker trains on.", 1),
    ("train/data_wait_share", "data_wait_share", "Share of the time spent waiting for frames.", 1),
    ("train/loss", "loss", "Loss of the last step, over all workers.", 1),
    ("memory/cuda_peak_mb", "cuda_peak_bytes", "Peak of PyTorch's GPU memory, step.", MEGABYTE),
    ("memory/rss_peak_mb", "rss_peak_bytes", "Peak of a worker's host memory, step.", MEGABYTE),
)
PREFIX = "re2tal_"
"""Before the names of gauges; Ray puts `ray_` before that."""


class Gauges:
    """What a worker of a run shows of itself.

    Args:
        run_id: of the MLflow run.
        rank: of the worker.
        world_size: number of workers; speeds that are those of all are divided by it.
    """

    def __init__(self, *, run_id: str, rank: int, world_size: int) -> None:
        tags = {"run": run_id, "rank": str(rank)}
        self._world_size = world_size
        self._gauges: dict[str, tuple[Gauge, float]] = {}
        for metric, name, description, unit in _GAUGES:
            gauge = Gauge(f"{PREFIX}{name}", description=description, tag_keys=tuple(tags))
            gauge.set_default_tags(tags)
            self._gauges[metric] = (gauge, unit)

    def set(self, metrics: Mapping[str, float]) -> None:
        """Shows what a step measured.

        Args:
            metrics: as the training loop logs them.
        """
        for name, value in metrics.items():
            if name in self._gauges:
                gauge, unit = self._gauges[name]
                share = self._world_size if name == "train/frames_per_second" else 1
                gauge.set(value * unit / share)
