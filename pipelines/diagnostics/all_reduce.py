"""Two workers, on two nodes where there are two, add up a tensor as DDP does."""

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util import get_node_ip_address, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipelines.diagnostics.finding import Finding, fail, note, ok
from pipelines.diagnostics.nodes import Node
from pipelines.diagnostics.reasons import reason

CHECK = "all-reduce"
_WORKERS = 2
_NUMBERS = 16 * 2**20  # float32: 64 MiB
_TIMES = 3
_CPUS = 0.01  # a bundle must hold something


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduced:
    """What the workers measured.

    Attributes:
        backend: "gloo" or "nccl".
        nodes: Ray's ids of where each of them ran.
        right: whether all of them got the right sum.
        seconds: of an all-reduce of 64 MiB, the fastest of a few.
    """

    backend: str
    nodes: tuple[str, ...]
    right: bool
    seconds: float


class _Worker:
    """One of the two; torch is imported here and not in the driver, which has no use for it."""

    def listen(self, seconds: float) -> tuple[str, int]:
        """Opens the store at which the workers meet."""
        from torch.distributed import TCPStore

        host, wait = get_node_ip_address(), datetime.timedelta(seconds=seconds)
        self._store = TCPStore(host, 0, _WORKERS, True, wait, wait_for_workers=False)
        return host, self._store.port

    def reduce(
        self, rank: int, address: tuple[str, int], backend: str, seconds: float
    ) -> tuple[str, bool, float]:
        """Meets the other, and reduces; returns the node, whether the sum is right, and seconds."""
        import torch
        from torch import distributed

        wait = datetime.timedelta(seconds=seconds)
        store = distributed.TCPStore(*address, _WORKERS, False, wait)
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=_WORKERS, timeout=wait
        )
        device = "cuda" if backend == "nccl" else "cpu"
        numbers = torch.full((_NUMBERS,), float(rank + 1), device=device)
        distributed.all_reduce(numbers)
        right = bool((numbers == sum(range(1, _WORKERS + 1))).all())
        took = min(self._time(numbers, device) for _ in range(_TIMES))
        distributed.destroy_process_group()
        return str(ray.get_runtime_context().get_node_id()), right, took

    @staticmethod
    def _time(numbers: Any, device: str) -> float:
        import torch

        began = time.perf_counter()
        torch.distributed.all_reduce(numbers)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def choose_backend(nodes: Sequence[Node]) -> str:
    """NCCL if every node on which workers may run has GPUs, and there is one for each of the two.

    Args:
        nodes: of the cluster.
    """
    working = [node for node in nodes if node.cpus > 0]
    enough = sum(node.gpus for node in working) >= _WORKERS
    return "nccl" if enough and all(node.gpus >= 1 for node in working) else "gloo"


def measure(backend: str, *, seconds: float) -> Reduced:
    """Starts the workers, lets them reduce, and ends them.

    Args:
        backend: "gloo" or "nccl".
        seconds: to wait for their places and processes, and as long again for the rest.

    Raises:
        TimeoutError: if they find no place.
        RayError: if they fail or do not end in time.
    """
    gpus = 1 if backend == "nccl" else 0
    bundle = {"CPU": _CPUS, **({"GPU": gpus} if gpus else {})}
    group = placement_group([bundle] * _WORKERS, strategy="SPREAD")
    workers: list[Any] = []
    try:
        if not group.wait(timeout_seconds=seconds):
            needs = f"{gpus} GPU" if gpus else f"{_CPUS} CPUs"
            raise TimeoutError(f"no place with {needs} for each of them within {seconds:g} s")
        for index in range(_WORKERS):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            actor = ray.remote(num_cpus=_CPUS, num_gpus=gpus, scheduling_strategy=place)(_Worker)
            workers.append(actor.remote())
        address = ray.get(workers[0].listen.remote(seconds), timeout=seconds)
        calls = [
            worker.reduce.remote(rank, address, backend, seconds / 2)
            for rank, worker in enumerate(workers)
        ]
        nodes, right, took = zip(*ray.get(calls, timeout=seconds), strict=True)
        return Reduced(backend=backend, nodes=nodes, right=all(right), seconds=max(took))
    finally:
        for worker in workers:
            ray.kill(worker)
        remove_placement_group(group)


def check_all_reduce(nodes: Sequence[Node], *, seconds: float) -> list[Finding]:
    """Lets two workers reduce, and tells how fast.

    Args:
        nodes: of the cluster.
        seconds: to wait for their start, and as long again for the rest.
    """
    backend = choose_backend(nodes)
    try:
        return [judge(measure(backend, seconds=seconds), nodes)]
    except GetTimeoutError:
        return [failed(backend, f"they did not end within {seconds:g} s (--timeout)")]
    except (RayError, TimeoutError) as error:
        return [failed(backend, reason(error))]


def failed(backend: str, why: str) -> Finding:
    """What to say when the workers did not get through.

    Args:
        backend: "gloo" or "nccl".
        why: in a few words.
    """
    text = f"Two workers with {backend} did not get through: {why}. "
    if "no place" in why:
        return fail(CHECK, f"{text}Others hold them: see `ray status`, or wait for their end.")
    return fail(
        CHECK,
        f"{text}Open all ports between the nodes, and name the network interface that joins them "
        f"in {backend.upper()}_SOCKET_IFNAME on every node, before Ray starts there.",
    )


def judge(reduced: Reduced, nodes: Sequence[Node]) -> Finding:
    """Tells what was measured.

    Args:
        reduced: that.
        nodes: of the cluster.
    """
    names = {node.id: node.name for node in nodes}
    where = " and ".join(sorted({names.get(one, one) for one in reduced.nodes}))
    speed = _NUMBERS * 4 / reduced.seconds / 1e9
    facts = f"two workers on {where}, {reduced.backend}, 64 MiB in {reduced.seconds * 1e3:.0f} ms "
    facts += f"({speed:.2f} GB/s)"
    if not reduced.right:
        text = f"The sum is wrong: {facts}. The network or a GPU alters what it carries: try other "
        return fail(CHECK, f"{text}nodes, and another {reduced.backend.upper()}_SOCKET_IFNAME.")
    if len(set(reduced.nodes)) == 1 and len(nodes) > 1:
        return note(
            CHECK, f"{facts}; Ray found no second node with room: nothing is known of the network."
        )
    return ok(CHECK, f"{facts}.")
