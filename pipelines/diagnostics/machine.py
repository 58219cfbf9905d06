"""What a node is made of, and whether that suffices."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from pipelines.data.streaming import store_needed
from pipelines.diagnostics.finding import Finding, fail, note, ok
from pipelines.diagnostics.nodes import Node
from re2tal.reversible.convolutions import WRONG_GRADIENTS, wrong_gradients

CHECK = "machine"

_GIB = 2**30
_SHM = Path("/dev/shm")  # noqa: S108
_PIXELS = 224 * 224 * 3
_SMALLEST_BATCH = 128 * _PIXELS  # one window of what a small run reads
_USUAL_BATCH = 768 * _PIXELS  # one window of the recipes for THUMOS-14 and ActivityNet
_FULL_DISK = 0.95  # Ray's own limit: it then makes no objects any more
_LITTLE_DISK = 10 * _GIB
_FULL_MEMORY = 0.95  # Ray's own limit: it then ends tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Facts of a node.

    Attributes:
        threads: hardware threads that a process may use.
        cores: real ones of the machine; 0 if that cannot be told.
        memory: bytes that there are, or that the container may use.
        memory_used: share of the machine's memory that is in use.
        shm: bytes of /dev/shm, free or not.
        disk: bytes of the disk on which Ray's folder is.
        disk_free: bytes of it that are free.
        wrong_gradients: whether PyTorch computes wrong ones on its CPU, as `wrong_gradients` says.
    """

    threads: int
    cores: int
    memory: int
    memory_used: float
    shm: int
    disk: int
    disk_free: int
    wrong_gradients: bool = False


def examine(folders: Mapping[str, str]) -> Machine:
    """On a node: looks at the machine.

    Args:
        folders: where Ray keeps its files, by the ids of the nodes.
    """
    folder = folders[str(ray.get_runtime_context().get_node_id())]
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    return Machine(
        threads=len(os.sched_getaffinity(0)),
        cores=psutil.cpu_count(logical=False) or 0,
        memory=min(memory.total, _memory_limit()),
        memory_used=memory.percent / 100,
        shm=shutil.disk_usage(_SHM).total if _SHM.is_dir() else 0,
        disk=disk.total,
        disk_free=disk.free,
        wrong_gradients=wrong_gradients(),
    )


def _memory_limit() -> int:
    """Of the container, in bytes; a number larger than any machine if there is none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            return int(text)
    return 2**63


def check_machine(node: Node, machine: Machine) -> list[Finding]:
    """Judges a node.

    Args:
        node: what Ray says of it.
        machine: what was found there.

    Returns:
        One line of facts, and one for each thing that is too small.
    """
    facts = (
        f"{node.name}: {node.cpus:g} CPUs for Ray, {machine.threads} threads on "
        f"{machine.cores or 'an unknown number of'} cores, {_gib(machine.memory)} of memory "
        f"({machine.memory_used:.0%} in use), object store {_gib(node.store)}, /dev/shm "
        f"{_gib(machine.shm)}, {_gib(machine.disk_free)} free for Ray's files in {node.folder}."
    )
    found = [*_processors(node, machine), *_store(node, machine), *_memory(node, machine)]
    found += _disk(node, machine)
    if machine.wrong_gradients:
        found.append(note(CHECK, f"{node.name}: {WRONG_GRADIENTS}"))
    failed = any(finding.verdict == "FAIL" for finding in found)
    return [note(CHECK, facts) if failed else ok(CHECK, facts), *found]


def _processors(node: Node, machine: Machine) -> list[Finding]:
    if node.cpus <= machine.threads:
        return []
    text = (
        f"{node.name} offers {node.cpus:g} CPUs, but has {machine.threads} threads: its tasks will "
        "wait for one another. Start Ray there with the right --num-cpus, or without it."
    )
    return [note(CHECK, text)]


def _store(node: Node, machine: Machine) -> list[Finding]:
    least, usual = store_needed(_SMALLEST_BATCH), store_needed(_USUAL_BATCH)
    advice = (
        "Start Ray there with more (ray start --object-store-memory), and a container with a "
        "larger /dev/shm (--shm-size; in Kubernetes an emptyDir of medium Memory)."
    )
    have = f"{node.name} has an object store of {_gib(node.store)}, but"
    if node.store < least:
        return [
            fail(CHECK, f"{have} windows of 128 frames of 224 pixels need {_gib(least)}. {advice}")
        ]
    found = []
    if node.store < usual:
        text = (
            f"{have} windows of 768 frames of 224 pixels need {_gib(usual)}: Ray will spill them "
        )
        found.append(note(CHECK, f"{text}to the disk. {advice}"))
    if node.store > machine.shm:
        text = f"{node.name} has an object store of {_gib(node.store)}, more than its /dev/shm of "
        text += f"{_gib(machine.shm)}: Ray keeps it in files on the disk, which is slow. {advice}"
        found.append(note(CHECK, text))
    return found


def _memory(node: Node, machine: Machine) -> list[Finding]:
    if machine.memory_used <= _FULL_MEMORY:
        return []
    text = (
        f"{machine.memory_used:.0%} of the memory of {node.name} is in use, and Ray ends tasks "
        f"above {_FULL_MEMORY:.0%}: end what else runs there."
    )
    return [fail(CHECK, text)]


def _disk(node: Node, machine: Machine) -> list[Finding]:
    free = (
        f"{node.name} has {_gib(machine.disk_free)} of {_gib(machine.disk)} free where Ray keeps "
    )
    free += f"its files ({node.folder})"
    advice = "free some, or start Ray with --temp-dir on another disk"
    if machine.disk_free < (1 - _FULL_DISK) * machine.disk:
        text = (
            f"{free}, and Ray makes no objects on a disk that is {_FULL_DISK:.0%} full: {advice}."
        )
        return [fail(CHECK, text)]
    if machine.disk_free < _LITTLE_DISK:
        return [note(CHECK, f"{free}, to which it spills and unpacks jobs: {advice}.")]
    return []


def _gib(count: float) -> str:
    return f"{count / _GIB:.1f} GiB"
