"""What a step did use: the counters of the operating system and of the CUDA allocator."""

import threading
from pathlib import Path
from typing import ClassVar, Self

import psutil
import torch

from re2tal.memory.units import MEGABYTE


class MemoryMeter:
    """Host and GPU memory of this process over a block of code: ``with MemoryMeter() as meter``.

    The host's peak is the kernel's own high-water mark where it can be reset (Linux), otherwise the
    most that a thread saw every 5 ms. Meters may be nested; they belong to one thread.

    Args:
        device: the accelerator to read as well; None or a CPU reads the host alone.

    Attributes:
        rss: resident bytes of the process at the end.
        rss_peak: the most resident bytes since the start.
        cuda_allocated: bytes in tensors on the device at the end; None without a CUDA device.
        cuda_reserved: bytes that the caching allocator held at the end.
        cuda_peak: the most bytes in tensors since the start.
    """

    _active: ClassVar[list["MemoryMeter"]] = []

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = torch.device(device or "cpu")
        self.rss = self.rss_peak = 0
        self.cuda_allocated: int | None = None
        self.cuda_reserved: int | None = None
        self.cuda_peak: int | None = None
        self._sampler: _Sampler | None = None

    def __enter__(self) -> Self:
        # Resetting the marks would hide what the meters around this one have seen.
        for meter in self._active:
            meter._read()
        self._active.append(self)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self.cuda_peak = 0
        if not _reset_high_water_mark():
            self._sampler = _Sampler()
        return self

    def __exit__(self, *_error: object) -> None:
        self._read()
        if self._sampler is not None:
            self._sampler.stop()
        self._active.remove(self)

    def metrics(self) -> dict[str, float]:
        """The attributes that were read, in megabytes (10^6 bytes), as ``name_mb``."""
        names = ("rss", "rss_peak", "cuda_allocated", "cuda_reserved", "cuda_peak")
        sizes = {name: getattr(self, name) for name in names}
        return {f"{k}_mb": size / MEGABYTE for k, size in sizes.items() if size is not None}

    def _read(self) -> None:
        self.rss = psutil.Process().memory_info().rss
        mark = self._sampler.peak if self._sampler is not None else _high_water_mark()
        self.rss_peak = max(self.rss_peak, self.rss, mark)
        if self._device.type == "cuda":
            self.cuda_allocated = torch.cuda.memory_allocated(self._device)
            self.cuda_reserved = torch.cuda.memory_reserved(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
            self.cuda_peak = max(self.cuda_peak or 0, peak)


def _reset_high_water_mark() -> bool:
    """Start the kernel's record of this process's peak anew; False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _high_water_mark() > 0
    except OSError:
        return False


def _high_water_mark() -> int:
    """The kernel's record in bytes; 0 if it keeps none."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class _Sampler:
    """A thread that watches the resident memory."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.005):
            self.peak = max(self.peak, process.memory_info().rss)
