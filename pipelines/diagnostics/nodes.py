"""Nodes of the cluster: running functions on each, and a check that two can reach each other."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.diagnostics.findings import Finding, fail, ok, reason, within
from re2tal.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """Machine of the cluster, and its resources in Ray."""

    id: str  # Ray's id of the node
    name: str  # host name and address
    cpus: float = 0.0
    gpus: float = 0.0
    store: float = 0.0  # bytes of the object store
    folder: str = ""  # folder of Ray's files


DRIVER = Node(id="driver", name="The driver")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer(Generic[T]):
    """Value that a function returned on a node, or the reason of its failure in one line."""

    node: Node
    value: T | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes (none without Ray), and the seconds within which all of them must answer."""

    nodes: tuple[Node, ...] = ()
    seconds: float

    @property
    def everyone(self) -> str:
        """Phrase for the driver and all nodes, for sentences."""
        others = {0: "", 1: " and the only node"}
        return f"the driver{others.get(len(self.nodes), f' and all {len(self.nodes)} nodes')}"

    def ask(
        self, function: Callable[..., T], *arguments: Any, alone: bool = False
    ) -> list[Answer[T]]:
        """Call a module's function, with the node and arguments, on every node at the same time.

        The tasks request no CPU, so that a busy cluster answers too. With `alone`, their processes
        end afterwards and free their GPU memory, which other processes keep.
        """
        options = {"num_cpus": 0, "max_retries": 0, "max_calls": int(alone)}
        references = []
        for node in self.nodes:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            task = ray.remote(**options, scheduling_strategy=there)(attempt)
            references.append(task.remote(function, node, arguments))
        end = time.monotonic() + self.seconds
        return [
            self._await(node, reference, max(0.0, end - time.monotonic()))
            for node, reference in zip(self.nodes, references, strict=True)
        ]

    def ask_after_driver(self, function: Callable[..., T], *arguments: Any) -> list[Answer[T]]:
        """Call a function in this process, and on every node if it succeeded here."""
        here: Answer[T] = attempt(function, DRIVER, arguments)
        return [here] if here.error else [here, *self.ask(function, *arguments)]

    def _await(self, node: Node, reference: Any, seconds: float) -> Answer[Any]:
        try:
            answer: Answer[Any] = ray.get(reference, timeout=seconds)
        except GetTimeoutError:
            ray.cancel(reference, force=True)
            answer = Answer(
                node=node, error=f"no answer within {self.seconds:g} s (give more with --timeout)"
            )
        except RayError as failed:
            error = reason(failed)
            if "No module named" in error:
                error += ". The driver's code is not installed there: submit with `ray job submit "
                error += "--working-dir .`, and set up the same environment on every node"
            answer = Answer(node=node, error=error)
        return answer


def attempt(function: Callable[..., T], node: Node, arguments: Sequence[Any]) -> Answer[T]:
    """Call a function; an exception becomes text, because not every exception can be pickled."""
    try:
        return Answer(node=node, value=function(node, *arguments))
    except Exception as error:
        return Answer(node=node, error=reason(error))


@contextmanager
def joined(*, seconds: float) -> Iterator[tuple[Finding, Cluster]]:
    """Join the cluster that `RAY_ADDRESS` names, or start Ray here; leave or stop it at the end.

    Ray's folder stays, as after any program: another Ray on this machine may be using its link.
    """
    from pipelines.core.cluster import init_ray  # here: tasks on nodes start faster without it

    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            within(seconds, init_ray)
        else:  # in the main thread: a Ray that is started here ends with its thread
            init_ray()
        cluster = Cluster(nodes=alive_nodes(), seconds=seconds)
    except UserError as error:
        yield fail(str(error)), Cluster(seconds=seconds)
    except Exception as error:
        text = f"Ray does not start on this machine ({reason(error)})."
        if address:
            text = f"The cluster at {address} (RAY_ADDRESS) cannot be joined ({reason(error)}). "
            text += "Start it again, and give RAY_AUTH_MODE the value that it was started with."
        yield fail(text), Cluster(seconds=seconds)
    else:
        where = f"the cluster at {address}" if address else "a Ray started here"
        count = "1 node" if len(cluster.nodes) == 1 else f"{len(cluster.nodes)} nodes"
        try:
            yield ok(f"{ray.__version__}, {where}: {count}."), cluster
        finally:
            ray.shutdown()


def alive_nodes() -> tuple[Node, ...]:
    """List the nodes of the cluster that this process has joined, by their names."""
    nodes = [
        Node(
            id=entry["NodeID"],
            name=f"{entry['NodeManagerHostname']} ({entry['NodeManagerAddress']})",
            cpus=entry["Resources"].get("CPU", 0.0),
            gpus=entry["Resources"].get("GPU", 0.0),
            store=entry["Resources"].get("object_store_memory", 0.0),
            # the socket lies in a subfolder of the session's folder
            folder=str(Path(entry["ObjectStoreSocketName"]).parents[1]),
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return tuple(sorted(nodes, key=lambda node: node.name))


_NUMBERS = 16 * 2**20  # float32: 64 MiB


def reduce(_: Node, address: tuple[str, int], backend: str, seconds: float) -> tuple[bool, float]:
    """Join another worker in a process group, and all-reduce 64 MiB as DDP does.

    Returns:
        Whether the sum was right, and the seconds of the fastest of three rounds.
    """
    import torch
    from torch import distributed

    patience = timedelta(seconds=seconds)
    store = distributed.TCPStore(*address, is_master=False, timeout=patience)
    rank = store.add("rank", 1) - 1  # an atomic counter: who comes first is rank 0
    distributed.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=patience)
    # two workers on one node must have a GPU each
    device = f"cuda:{rank % torch.cuda.device_count()}" if backend == "nccl" else "cpu"
    numbers = torch.full((_NUMBERS,), rank + 1.0, device=device)  # 1 and 2: the sum is 3
    distributed.all_reduce(numbers)
    right = bool((numbers == 3).all())
    times = []
    for _round in range(3):
        began = time.perf_counter()
        distributed.all_reduce(numbers)
        numbers[0].item()  # synchronizes with the GPU
        times.append(time.perf_counter() - began)
    distributed.destroy_process_group()
    return right, min(times)


def choose_pair(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], str]:
    """Choose the nodes of two workers (one node twice if no other has CPUs), and their backend."""
    working = [node for node in nodes if node.cpus > 0] or list(nodes)
    pair = (working[0], working[1 % len(working)])
    enough = sum(node.gpus for node in set(pair)) >= len(pair)
    return pair, "nccl" if enough and all(node.gpus >= 1 for node in working) else "gloo"


def check_all_reduce(cluster: Cluster) -> list[Finding]:
    """Check that two workers, on two nodes if possible, reach each other, and measure the speed."""
    from torch.distributed import TCPStore

    pair, backend = choose_pair(cluster.nodes)
    host = get_node_ip_address()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    workers = replace(cluster, nodes=pair)
    answers = workers.ask(reduce, (host, store.port), backend, cluster.seconds / 2, alone=True)
    where = " and ".join(dict.fromkeys(node.name for node in pair))
    interface = f"{backend.upper()}_SOCKET_IFNAME"
    reduced = [answer.value for answer in answers if answer.value]
    if len(reduced) < len(pair):
        why = next(answer.error for answer in answers if answer.error)
        text = f"Two workers with {backend} on {where} cannot communicate: {why}. Open all ports "
        text += "between the nodes, and name the network interface that connects them in "
        return [fail(f"{text}{interface} on every node, before Ray starts there.")]
    seconds = max(took for _, took in reduced)
    facts = f"two workers on {where}, {backend}, 64 MiB in {seconds * 1e3:.0f} ms "
    facts += f"({_NUMBERS * 4 / seconds / 1e9:.2f} GB/s)"
    if not all(right for right, _ in reduced):
        text = f"The sum is wrong: {facts}. The network or a GPU corrupts data: try other nodes, "
        return [fail(f"{text}and another {interface}.")]
    return [ok(f"{facts}.")]
