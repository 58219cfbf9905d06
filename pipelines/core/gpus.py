"""GPUs of this machine, read from NVIDIA's driver, which uses no GPU memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """GPU or MIG instance; `total` and `free` are bytes of memory."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """NVIDIA's driver: its version, the CUDA version (1000 * major + 10 * minor), and the GPUs."""

    version: str
    cuda: int
    gpus: tuple[Gpu, ...]


def nvidia_driver(*, visible: str | None = None) -> Driver | None:
    """Read the driver's version and GPUs; None without a driver.

    Args:
        visible: value of `CUDA_VISIBLE_DEVICES`, to list only those GPUs; None for all GPUs.
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
        except pynvml.NVMLError:  # as in CUDA, all GPUs after a wrong name are invisible
            return
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        yield Gpu(name=pynvml.nvmlDeviceGetName(handle), total=memory.total, free=memory.free)


def free_memory(*, hidden: bool = False) -> list[int]:
    """List the free bytes of each GPU of this machine; empty without GPUs.

    The driver is asked because PyTorch would occupy half a GiB of each GPU with a CUDA context.

    Args:
        hidden: also list GPUs that `CUDA_VISIBLE_DEVICES` leaves out.
    """
    driver = nvidia_driver(visible=None if hidden else os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [gpu.free for gpu in driver.gpus] if driver else []
