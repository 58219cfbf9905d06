"""GPUs of the nodes: those that the driver shows, and whether PyTorch can compute on them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pynvml

from pipelines.diagnostics.finding import Finding, fail, note, ok
from pipelines.diagnostics.nodes import Answer, Node
from pipelines.diagnostics.reasons import reason

CHECK = "gpu"
_SECONDS = 50.0  # a driver that is broken may hang

# In a process of its own, because what PyTorch allocates on a GPU stays until its process ends.
_COMPUTE = """
import json, torch
errors = [] if torch.cuda.is_available() else ["torch.cuda.is_available() is false"]
for number in range(torch.cuda.device_count()):
    try:
        assert torch.ones(2, device=f"cuda:{number}").sum().item() == 2, "1 + 1 is not 2"
    except Exception as error:
        errors.append(f"GPU {number}: {error}".splitlines()[0])
print(json.dumps({"torch": f"{torch.__version__}, CUDA {torch.version.cuda}", "errors": errors}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """The GPUs of a node.

    Attributes:
        driver: its version.
        cuda: the newest version of CUDA that the driver knows.
        names: of each GPU.
        memory: bytes of each.
        free: bytes of each that are not in use.
        torch: version of PyTorch, and of CUDA that it was built for.
        error: why PyTorch cannot compute on them; empty if it can.
    """

    driver: str
    cuda: str
    names: tuple[str, ...]
    memory: tuple[int, ...]
    free: tuple[int, ...]
    torch: str
    error: str


def find_gpus() -> Gpus | None:
    """Looks for the GPUs of the machine that this runs on.

    Returns:
        None if there is no NVIDIA driver or GPU.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        if not handles:
            return None
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        names = tuple(map(pynvml.nvmlDeviceGetName, handles))
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    torch, error = _compute()
    return Gpus(
        driver=driver,
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        names=names,
        memory=tuple(info.total for info in memory),
        free=tuple(info.free for info in memory),
        torch=torch,
        error=error,
    )


def _compute() -> tuple[str, str]:
    """PyTorch's versions, and why it cannot compute on a GPU."""
    command = [sys.executable, "-c", _COMPUTE]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_SECONDS, check=True
        )
        told = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return "unknown", f"it did not answer within {_SECONDS:g} s"
    except subprocess.CalledProcessError as failed:
        return "unknown", (failed.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    except (OSError, ValueError, LookupError) as error:
        return "unknown", reason(error)
    return told["torch"], "; ".join(told["errors"])


def check_gpus(answers: Sequence[Answer[Gpus | None]]) -> list[Finding]:
    """Judges the GPUs of all nodes.

    Args:
        answers: what `find_gpus` returned on them.
    """
    failed = [answer for answer in answers if answer.error]
    findings = [fail(CHECK, f"{_name(answer)} were not seen: {answer.error}.") for answer in failed]
    seen = [answer for answer in answers if not answer.error]
    if seen and not any(answer.value or answer.node.gpus for answer in seen):
        where = "There is" if len(seen) == 1 else f"On {len(seen)} nodes there is"
        return [*findings, note(CHECK, f"{where} no NVIDIA GPU: runs will use the CPUs.")]
    return findings + [_judge(answer.node, answer.value) for answer in seen]


def _name(answer: Answer[Gpus | None]) -> str:
    return f"The GPUs of {answer.node.name}"


def _judge(node: Node, gpus: Gpus | None) -> Finding:
    if gpus is None and node.gpus:
        text = (
            f"Ray offers {node.gpus:g} GPUs on {node.name}, but there is no NVIDIA driver that "
            "answers: install it (in a container, start that with --gpus all), or start Ray with "
            "the right --num-gpus."
        )
        return fail(CHECK, text)
    if gpus is None:
        return note(CHECK, f"{node.name} has no NVIDIA GPU.")
    facts = f"{node.name}: {_listed(gpus)}; driver {gpus.driver} for CUDA up to {gpus.cuda}"
    if gpus.error:
        text = (
            f"{facts}, but PyTorch ({gpus.torch}) cannot compute on them: {gpus.error}. Install a "
            "build of PyTorch for that driver and these GPUs, or a newer driver."
        )
        return fail(CHECK, text)
    facts += f", PyTorch {gpus.torch}"
    if node.gpus < len(gpus.names):
        return note(CHECK, f"{facts}; Ray offers {node.gpus:g} of {len(gpus.names)}.")
    return ok(CHECK, f"{facts}.")


def _listed(gpus: Gpus) -> str:
    each = zip(gpus.names, gpus.memory, gpus.free, strict=True)
    return ", ".join(
        f"{name} {total / 2**30:.1f} GiB ({free / 2**30:.1f} free)" for name, total, free in each
    )
