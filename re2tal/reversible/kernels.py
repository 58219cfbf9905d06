"""The choice of kernels: a repetition must meet those of the first run, which round alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


@dataclass(frozen=True, slots=True)
class AttentionKernels:
    """Which kernels `scaled_dot_product_attention` may choose from, as `sdpa_kernel` sets them."""

    enabled: tuple[bool, ...]

    @classmethod
    def now(cls) -> "AttentionKernels":
        """At this moment."""
        return cls(tuple(getattr(torch.backends.cuda, f"{k}_sdp_enabled")() for k in _ATTENTION))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """These, for a block of code."""
        found = self.now()
        self._set()
        try:
            yield
        finally:
            found._set()

    def _set(self) -> None:
        for kernel, enabled in zip(_ATTENTION, self.enabled, strict=True):
            getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(enabled)


@dataclass(frozen=True, slots=True)
class ConvolutionKernels:
    """Whether cuDNN times its kernels, and whether it may use those that add in any order."""

    benchmark: bool
    deterministic: bool

    @classmethod
    def now(cls) -> "ConvolutionKernels":
        """At this moment."""
        return cls(torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """These, for a block of code."""
        found = self.now()
        self._set()
        try:
            yield
        finally:
            found._set()

    def _set(self) -> None:
        torch.backends.cudnn.benchmark = self.benchmark
        torch.backends.cudnn.deterministic = self.deterministic


@contextmanager
def repeatable_kernels(device: torch.device) -> Iterator[None]:
    """Keep cuDNN from choosing one kernel for the forward and another for its repetition."""
    if device.type != "cuda":
        yield
        return
    with ConvolutionKernels(benchmark=False, deterministic=True).restored():
        yield
