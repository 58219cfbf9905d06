"""Checks of each node: software, memory and disk, and GPUs."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.core.checkout import code_fingerprint
from pipelines.core.gpus import nvidia_driver
from pipelines.diagnostics.findings import Finding, fail, installed, note, ok
from pipelines.diagnostics.nodes import DRIVER, Answer, Cluster, Node

CODE = "the project's code"
_PACKAGES = ("ray", "torch", "av")  # PyAV too: decoded frames depend on its version


def software(_: Node) -> dict[str, str]:
    """Return the versions of the software on the node, and a fingerprint of the code."""
    versions = {name: installed(name) or "none" for name in _PACKAGES}
    return {"Python": platform.python_version(), **versions, CODE: code_fingerprint()[:12]}


def check_software(cluster: Cluster) -> list[Finding]:
    """Check that every node runs the same software as the driver."""
    here = software(DRIVER)
    findings = []
    for answer in cluster.ask(software):
        if answer.value is None:
            findings.append(fail(f"{answer.node.name} cannot run the project: {answer.error}."))
            continue
        for name, version in here.items():
            if (there := answer.value.get(name)) != version:
                advice = (
                    "submit with `ray job submit --working-dir .`, or bring both to the same commit"
                    if name == CODE
                    else "install the same version on both, from requirements.txt"
                )
                text = f"{answer.node.name} has {name} {there}, but the driver {version}: {advice}"
                findings.append(fail(f"{text}, and start Ray there again."))
    listed = ", ".join(f"{name} {version}" for name, version in here.items())
    return findings or [ok(f"The same on {cluster.everyone}: {listed}.")]


_GIB = 2**30
_SHM = Path("/dev/shm")  # noqa: S108
_PIXELS = 224 * 224 * 3
_SMALLEST_BATCH = 128 * _PIXELS  # one window of a small run
_USUAL_BATCH = 768 * _PIXELS  # one window of the recipes for THUMOS-14 and ActivityNet
_FULL_DISK = 0.95  # Ray's own limit, above which it creates no objects
_LITTLE_DISK = 10 * _GIB
_FULL_MEMORY = 0.95  # Ray's own limit, above which it kills tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Facts of a node; sizes are bytes."""

    threads: int  # hardware threads that a process may use
    cores: int  # 0 if unknown
    memory: int  # the container's limit, if lower than the machine's memory
    memory_used: float  # share of the whole machine's memory
    shm: int  # size of /dev/shm, free or not
    disk: int  # size of the disk with Ray's folder
    disk_free: int
    wrong_gradients: bool = False  # PyTorch computes wrong gradients on this CPU


def examine(node: Node) -> Machine:
    """Gather the facts of this machine; runs on each node."""
    from re2tal.reversible.convolutions import wrong_gradients  # imports torch

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(node.folder)
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
    """Return the container's memory limit in bytes; without one, more than any machine has."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            return int(text)
    return 2**63


def check_machines(cluster: Cluster) -> Iterator[Finding]:
    """Check the hardware of every node."""
    for answer in cluster.ask(examine):
        if answer.value is None:
            yield fail(f"{answer.node.name} could not be examined: {answer.error}.")
        else:
            yield from judge_machine(answer.node, answer.value)


def judge_machine(node: Node, machine: Machine) -> list[Finding]:
    """Return one finding with the facts, and one for each resource that is too small."""
    facts = (
        f"{node.name}: {node.cpus:g} CPUs for Ray, {machine.threads} threads on "
        f"{machine.cores or 'an unknown number of'} cores, {_gib(machine.memory)} of memory "
        f"({machine.memory_used:.0%} in use), object store {_gib(node.store)}, /dev/shm "
        f"{_gib(machine.shm)}, {_gib(machine.disk_free)} free for Ray's files in {node.folder}."
    )
    found = [*_short(node, machine), *_small_store(node, machine)]
    failed = any(finding.verdict == "FAIL" for finding in found)
    return [note(facts) if failed else ok(facts), *found]


def _short(node: Node, machine: Machine) -> Iterator[Finding]:
    from re2tal.reversible.convolutions import WRONG_GRADIENTS

    if node.cpus > machine.threads:
        yield note(
            f"{node.name} offers {node.cpus:g} CPUs, but has {machine.threads} threads: its tasks "
            "will compete for them. Start Ray there with the right --num-cpus, or without it."
        )
    if machine.memory_used > _FULL_MEMORY:
        yield fail(
            f"{machine.memory_used:.0%} of the memory of {node.name} is in use, and Ray kills "
            f"tasks above {_FULL_MEMORY:.0%}: end other programs there."
        )
    free = f"{node.name} has {_gib(machine.disk_free)} of {_gib(machine.disk)} free where Ray "
    free += f"keeps its files ({node.folder})"
    advice = "free some, or start Ray with --temp-dir on another disk"
    if machine.disk_free < (1 - _FULL_DISK) * machine.disk:
        full = f"Ray creates no objects on a disk that is {_FULL_DISK:.0%} full"
        yield fail(f"{free}, and {full}: {advice}.")
    elif machine.disk_free < _LITTLE_DISK:
        yield note(f"{free}, spills objects and unpacks jobs: {advice}.")
    if machine.wrong_gradients:
        yield note(f"{node.name}: {WRONG_GRADIENTS}")


def _small_store(node: Node, machine: Machine) -> Iterator[Finding]:
    from pipelines.data.streaming import store_needed  # here: tasks on nodes need not import it

    least, usual = store_needed(_SMALLEST_BATCH), store_needed(_USUAL_BATCH)
    have = f"{node.name} has an object store of {_gib(node.store)}"
    advice = (
        "Start Ray there with more (ray start --object-store-memory), and a container with a "
        "larger /dev/shm (--shm-size; in Kubernetes an emptyDir of medium Memory)."
    )
    need = "but windows of {} frames of 224 pixels need {}"
    if node.store < least:
        yield fail(f"{have}, {need.format(128, _gib(least))}. {advice}")
        return
    if node.store < usual:
        spills = "Ray will spill them to disk"
        yield note(f"{have}, {need.format(768, _gib(usual))}: {spills}. {advice}")
    if node.store > machine.shm:
        slow = f"Ray keeps the store in files on disk, which is slow. {advice}"
        yield note(f"{have}, more than its /dev/shm of {_gib(machine.shm)}: {slow}")


def _gib(count: float) -> str:
    return f"{count / _GIB:.1f} GiB"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """GPUs of a node's driver, and the reason why PyTorch cannot compute on them, if so."""

    facts: str
    count: int
    error: str


def find_gpus(_: Node) -> Gpus | None:
    """Find this machine's GPUs, and compute on each; None without an NVIDIA driver or GPU."""
    found = nvidia_driver()
    if found is None or not found.gpus:
        return None
    each = [f"{g.name} {_gib(g.total)} ({g.free / _GIB:.1f} free)" for g in found.gpus]
    driver, cuda = found.version, found.cuda
    import torch

    facts = f"{', '.join(each)}; driver {driver} for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}"
    facts += f", PyTorch {torch.__version__} for CUDA {torch.version.cuda}"
    return Gpus(facts=facts, count=len(each), error="; ".join(_compute()))


def _compute() -> Iterator[str]:
    """Yield the reasons why PyTorch cannot compute on the GPUs."""
    import torch

    if not torch.cuda.is_available():
        yield "torch.cuda.is_available() is false"
    for index in range(torch.cuda.device_count()):
        try:
            if (total := torch.ones(2, device=f"cuda:{index}").sum().item()) != 2:
                yield f"GPU {index}: 1 + 1 is {total}"
        except RuntimeError as error:
            yield f"GPU {index}: {error}".splitlines()[0]


def check_gpus(cluster: Cluster) -> list[Finding]:
    """Check the GPUs of all nodes."""
    answers = cluster.ask(find_gpus, alone=True)
    if not any(answer.error or answer.value or answer.node.gpus for answer in answers):
        where = "There is" if len(answers) == 1 else f"On {len(answers)} nodes there is"
        return [note(f"{where} no NVIDIA GPU: runs will use the CPUs.")]
    return [_judge_gpus(answer) for answer in answers]


def _judge_gpus(answer: Answer[Gpus | None]) -> Finding:
    node, gpus = answer.node, answer.value
    if answer.error:
        return fail(f"The GPUs of {node.name} could not be examined: {answer.error}.")
    if gpus is None and node.gpus:
        return fail(
            f"Ray offers {node.gpus:g} GPUs on {node.name}, but no NVIDIA driver answers: install "
            "it (or start the container with --gpus all), or start Ray with the right --num-gpus."
        )
    if gpus is None:
        return note(f"{node.name} has no NVIDIA GPU.")
    facts = f"{node.name}: {gpus.facts}"
    if gpus.error:
        text = f"{facts}, but PyTorch cannot compute on them: {gpus.error}. Install a build of "
        return fail(f"{text}PyTorch for that driver and these GPUs, or a newer driver.")
    if node.gpus < gpus.count:
        return note(f"{facts}; Ray offers {node.gpus:g} of {gpus.count}.")
    return ok(f"{facts}.")
