"""GPUs of this machine as NVIDIA's driver shows them, which takes no memory on them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """GPU, or a part of one that MIG has made; sizes are bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """NVIDIA's driver: its version, that of CUDA (1000 times the major one), and its GPUs."""

    version: str
    cuda: int
    gpus: tuple[Gpu, ...]


def nvidia_driver(*, visible: str | None = None) -> Driver | None:
    """Read what the driver shows; None without a driver.

    Args:
        visible: value of `CUDA_VISIBLE_DEVICES`, to leave all others out; None for all GPUs.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return Driver(
            version=pynvml.nvmlSystemGetDriverVersion(),
            cuda=pynvml.nvmlSystemGetCudaDriverVersion(),
            gpus=tuple(_gpus(visible)),
        )
    finally:
        pynvml.nvmlShutdown()


def _gpus(visible: str | None) -> Iterator[Gpu]:
    import pynvml

    names = visible.split(",") if visible is not None else range(pynvml.nvmlDeviceGetCount())
    for name in map(str, names):
        try:
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(name))
                if name.strip().isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(name.strip())
            )
        except pynvml.NVMLError:  # as for CUDA, what follows a wrong name is not visible
            return
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        yield Gpu(name=pynvml.nvmlDeviceGetName(handle), total=memory.total, free=memory.free)


def free_memory(*, hidden: bool = False) -> list[int]:
    """List the free bytes of this machine's GPUs, of which there may be none.

    It is read from the driver: PyTorch would take half a GiB of each for a context of its own.

    Args:
        hidden: also list those that `CUDA_VISIBLE_DEVICES` leaves out.
    """
    driver = nvidia_driver(visible=None if hidden else os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [gpu.free for gpu in driver.gpus] if driver else []
