"""Asks every node of the cluster something, and waits no longer than told."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.diagnostics.reasons import reason

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's.
        name: for people.
        cpus: that Ray hands out there.
        gpus: that Ray hands out there.
        store: bytes of the object store.
        folder: where Ray keeps its files there.
    """

    id: str
    name: str
    cpus: float
    gpus: float
    store: float
    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer(Generic[T]):
    """What came back from a node.

    Attributes:
        node: which one.
        value: what the function returned; None if it failed.
        error: why it failed, in one line; empty if it did not.
    """

    node: Node
    value: T | None = None
    error: str = ""


def alive_nodes() -> list[Node]:
    """Lists the nodes of the cluster that this process has joined, in the order of their names."""
    nodes = [_node(entry) for entry in ray.nodes() if entry["Alive"]]
    counts = Counter(node.name for node in nodes)
    told_apart = [
        node if counts[node.name] == 1 else replace(node, name=f"{node.name} {node.id[:6]}")
        for node in nodes
    ]
    return sorted(told_apart, key=lambda node: node.name)


def _node(entry: dict[str, Any]) -> Node:
    resources = entry["Resources"]
    return Node(
        id=entry["NodeID"],
        name=f"{entry['NodeManagerHostname']} ({entry['NodeManagerAddress']})",
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        store=resources.get("object_store_memory", 0.0),
        # the socket lies in a folder of the session's
        folder=str(Path(entry["ObjectStoreSocketName"]).parents[1]),
    )


def _attempt(function: Callable[..., T], arguments: tuple[Any, ...]) -> tuple[T | None, str]:
    """Runs on the node; an exception travels as text, since not every one can be pickled."""
    try:
        return function(*arguments), ""
    except Exception as error:
        return None, reason(error)


def ask(
    nodes: Sequence[Node], function: Callable[..., T], *arguments: Any, seconds: float
) -> list[Answer[T]]:
    """Calls a function on each node at the same time.

    It takes no CPU from Ray: a cluster that is busy answers too.

    Args:
        nodes: which ones.
        function: of a module of the project.
        arguments: that it gets.
        seconds: to wait for all of them.

    Returns:
        An answer of each node, in their order.
    """
    references = [_start(node, function, arguments) for node in nodes]
    end = time.monotonic() + seconds
    return [
        _await(node, reference, max(0.0, end - time.monotonic()), seconds)
        for node, reference in zip(nodes, references, strict=True)
    ]


def _start(node: Node, function: Callable[..., T], arguments: tuple[Any, ...]) -> Any:
    there = NodeAffinitySchedulingStrategy(node.id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_attempt)
    return task.remote(function, arguments)


def _await(node: Node, reference: Any, seconds: float, asked: float) -> Answer[T]:
    try:
        value, error = ray.get(reference, timeout=seconds)
    except GetTimeoutError:
        ray.cancel(reference, force=True)
        return Answer(node=node, error=f"it did not answer within {asked:g} s (--timeout)")
    except RayError as failed:
        return Answer(node=node, error=_without_code(reason(failed)))
    return Answer(node=node, value=value, error=error)


def _without_code(text: str) -> str:
    if "No module named" not in text:
        return text
    return (
        f"{text}. What the driver runs is not installed there: submit with `ray job submit "
        "--working-dir .`, and set up the same environment on every node"
    )


def all_of(nodes: int) -> str:
    """Names them in a sentence.

    Args:
        nodes: their number, at least one.
    """
    return "the node" if nodes == 1 else f"all {nodes} nodes"
