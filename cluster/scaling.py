"""Compute the tables of SCALING.md from measurements: ``python -m cluster.scaling``.

Every number that was not measured is an assumption, with its source here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

GB, MB = 1e9, 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """End-to-end training of the recipe `thumos_re2_swin_t_actionformer`.

    Attributes:
        step_seconds: seconds of a step with one clip, measured (H200,
            pipelines/experiments/devices.py).
        frames: frames of the clip.
        pixels: side of the square frames.
        parameters: number of the detector's parameters.
        decoded_a_second: frames per core and second, measured (pipelines/experiments/decoding.py).
        compressed: bytes per frame in a file, measured (pipelines/experiments/shards.py).
        plan_bytes: bytes of the plan per video, measured (toy annotations, 5.7 instances each).
        window_bytes: bytes of a window in a worker, measured.
        window_seconds: seconds to cut a window, measured.
        windows: windows of a video of two minutes (1024 frames at 15 fps), gaps included.
    """

    step_seconds: float = 0.36
    frames: int = 768
    pixels: int = 224
    parameters: float = 55.1e6
    decoded_a_second: float = 556
    compressed: float = 7.06 * MB / 1800
    plan_bytes: float = 297
    window_bytes: float = 469
    window_seconds: float = 63e-6
    windows: int = 3

    @property
    def speed(self) -> float:
        """Frames per GPU and second."""
        return self.frames / self.step_seconds

    @property
    def raw(self) -> float:
        """Bytes of decoded frames per GPU and second."""
        return self.speed * self.pixels**2 * 3

    @property
    def gradients(self) -> float:
        """Bytes that a step exchanges, in float32."""
        return self.parameters * 4

    @property
    def checkpoint(self) -> float:
        """Bytes of weights, their EMA, the EMA's file for users, and AdamW's two moments."""
        return self.parameters * 4 * 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Node with eight GPUs.

    Attributes:
        gpus: number of GPUs.
        cores: number of physical cores (a p5.48xlarge has 96).
        inside: bytes per second and GPU over NVLink (vendor, one direction).
        network: bytes per second from a node to others (100 Gbit/s; EFA and InfiniBand have 32
            times that).
        price: dollars per GPU and hour (order of magnitude of on-demand prices in 2025).
    """

    gpus: int = 8
    cores: int = 96
    inside: float = 450 * GB
    network: float = 12.5 * GB
    price: float = 4.0


WORKLOAD, MACHINE = Workload(), Machine()
HIDDEN = 0.7
"""Share of the exchange that backward hides: DDP sends gradients while it computes others."""


def exchange(gpus: int, work: Workload = WORKLOAD, node: Machine = MACHINE) -> float:
    """Return the seconds of the gradients' all-reduce: a ring in each node, one between nodes."""

    def ring(members: int, speed: float) -> float:
        # each member sends 2 (n - 1) / n of the bytes: reduce-scatter, then all-gather
        return 2 * (members - 1) / members * work.gradients / speed

    nodes = max(1, gpus // node.gpus)
    return ring(min(gpus, node.gpus), node.inside) + ring(nodes, node.network)


def rows(gpus: Sequence[int] = (8, 64, 512)) -> list[list[str]]:
    """Make the large table: a heading with the numbers of GPUs, and a row for each quantity."""
    work, node = WORKLOAD, MACHINE
    table = [["", *(f"{n} GPUs" for n in gpus)]]

    def add(name: str, values: Sequence[str]) -> None:
        table.append([name, *values])

    add("nodes", [str(max(1, n // node.gpus)) for n in gpus])
    times = [exchange(n) for n in gpus]
    add("exchange of gradients, ms of a step of 360", [f"{t * 1e3:.0f}" for t in times])
    efficiency = [work.step_seconds / (work.step_seconds + (1 - HIDDEN) * t) for t in times]
    add("speed, of linear", [f"{e:.2f}" for e in efficiency])
    frames = [n * work.speed * e for n, e in zip(gpus, efficiency, strict=True)]
    add("frames a second", [f"{f:,.0f}" for f in frames])
    add("cores that decode, in all", [f"{f / work.decoded_a_second:,.0f}" for f in frames])
    shares = [
        f / n * node.gpus / work.decoded_a_second / node.cores for n, f in _pairs(gpus, frames)
    ]
    add("of a node's cores", [f"{share:.0%}" for share in shares])
    add(
        "frames through a node's object store, GB/s",
        [f"{node.gpus * work.raw / GB:.1f}"] * len(gpus),
    )
    add("read from the bucket, GB/s", [f"{f * work.compressed / GB:.2f}" for f in frames])
    hours = [1e6 * 120 * 15 / f / 3600 for f in frames]
    add(
        "an epoch of a million videos (2 minutes, 15 frames/s), hours", [f"{h:,.1f}" for h in hours]
    )
    add("its price, dollars", [f"{h * n * node.price:,.0f}" for n, h in _pairs(gpus, hours)])
    add("checkpoint, GB (rank 0 writes it)", [f"{work.checkpoint / GB:.1f}"] * len(gpus))
    writing = work.checkpoint / (0.5 * GB)
    add("seconds to write it, at 0.5 GB/s", [f"{writing:.0f}"] * len(gpus))
    return table


def million() -> list[list[str]]:
    """Make the small table: the costs of a million videos before the first step."""
    work, videos = WORKLOAD, 1e6
    windows = videos * work.windows
    return [
        ["", "a million videos"],
        ["plan, sent to each worker, GB", f"{videos * work.plan_bytes / GB:.1f}"],
        ["cutting an epoch's windows, in each worker, s", f"{windows * work.window_seconds:.0f}"],
        ["memory of the windows in each worker, GB", f"{windows * work.window_bytes / GB:.1f}"],
        ["in a node's eight workers, GB", f"{8 * windows * work.window_bytes / GB:.0f}"],
        ["opening every video, at 50 ms, on 768 cores, minutes", f"{videos * 0.05 / 768 / 60:.0f}"],
    ]


def _pairs(gpus: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    return list(zip(gpus, values, strict=True))


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Format a heading and rows as a table of SCALING.md."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


if __name__ == "__main__":
    print(markdown(rows()), markdown(million()), sep="\n\n")
