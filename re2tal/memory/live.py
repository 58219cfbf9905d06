"""Memory in use: bytes of tensors, counted as operators make them, and bytes of the process.

`LiveBytes` counts storages, whose sizes do not depend on the machine; `MemoryMeter` reads the
memory that this process and its GPU use.
"""

import threading
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEGABYTE = 10**6
"""Bytes per unit of metrics named ``..._mb``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes of one forward and backward, without the optimizer.

    Storages of tensors are counted, each once. The scratch space of operators, fragmentation and
    the allocator's reserve are not counted.

    Attributes:
        parameters: the model's parameters.
        buffers: the model's buffers.
        inputs: every other tensor that existed before the step and was used in it.
        gradients: the parameters' ``.grad`` at the end of the step.
        activations: everything else, at its peak.
        peak: peak of the total. It is less than the sum of the above, because gradients grow while
            activations shrink.
    """

    parameters: int
    buffers: int
    inputs: int
    gradients: int
    activations: int
    peak: int

    @property
    def kept_beside(self) -> int:
        """Bytes that training needs in addition: AdamW's two moments, and the EMA."""
        return 2 * self.gradients + self.parameters + self.buffers

    def metrics(self) -> dict[str, float]:
        """Convert the sizes to megabytes (10^6 bytes), as ``name_mb``."""
        return {f"{name}_mb": getattr(self, name) / MEGABYTE for name in self.__slots__}


class Observer(Protocol):
    """Observer to which `LiveBytes` reports the events of every storage, in order."""

    def running(self, operator: Any, inputs: list[Tensor]) -> None:
        """Report that an operator is about to run on these tensors."""
        ...

    def made(self, storage: int, kind: str, size: int) -> None:
        """Report a new storage, or one of a new kind (a field of `StepMemory`)."""
        ...

    def gone(self, storage: int) -> None:
        """Report a storage that was freed, or will be reported again as another kind or size."""
        ...


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of live storages, from their creation by operators until freed.

    Measure a step of the real training loop with ``with LiveBytes(model) as live: ...`` and
    ``live.memory()``. The counter slows down every operator, so it is for single steps. Inside a
    `FakeTensorMode` it counts fake tensors.

    Args:
        model: model whose parameters, buffers and gradients are counted separately.
        observer: observer of the storages.
    """

    def __init__(self, model: nn.Module, observer: Observer | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's has no types
        self._model = model
        self._observer = observer
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._live = dict.fromkeys(("parameters", "buffers", "inputs", "gradients"), 0)
        self._live["activations"] = 0
        self._total = self._activations_peak = self._peak = 0
        self._hooks = ExitStack()

    def memory(self) -> StepMemory:
        """Return the sizes: peaks so far of activations and the total, live bytes of the rest."""
        return StepMemory(
            parameters=self._live["parameters"],
            buffers=self._live["buffers"],
            inputs=self._live["inputs"],
            gradients=self._live["gradients"],
            activations=self._activations_peak,
            peak=self._peak,
        )

    def __enter__(self) -> Self:
        for parameter in self._model.parameters():
            self._see(parameter, "parameters")
            if parameter.grad is not None:
                self._see(parameter.grad, "gradients")
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._became_gradient)
                self._hooks.callback(hook.remove)
        for buffer in self._model.buffers():
            self._see(buffer, "buffers")
        super().__enter__()  # type: ignore[no-untyped-call]  # PyTorch's has no types
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # PyTorch's has no types
        self._hooks.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; inputs seen for the first time existed before the step."""
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        for tensor in given:
            self._see(tensor, "inputs")
        if self._observer is not None:
            self._observer.running(func, given)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self._see(tensor, "activations")
        return result

    def _see(self, tensor: Tensor, kind: str) -> None:
        if tensor.layout != torch.strided:
            return  # sparse tensors have no storage of their own; no model here makes them
        storage = tensor.untyped_storage()
        key = storage._cdata  # the address of the storage: views of a tensor have the same
        size = storage.nbytes()
        if key not in self._known:
            self._add(weakref.ref(storage, partial(self._remove, key)), key, kind, size)
            return
        _, before, bytes_before = self._known[key]
        if size != bytes_before:
            self._change(key, before, size)

    def _became_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._see(parameter.grad, "gradients")
            key = parameter.grad.untyped_storage()._cdata
            self._change(key, "gradients", self._known[key][2])

    def _change(self, key: int, kind: str, size: int) -> None:
        reference = self._known[key][0]
        self._remove(key)
        self._add(reference, key, kind, size)

    def _add(self, reference: "weakref.ref[Any]", key: int, kind: str, size: int) -> None:
        self._known[key] = reference, kind, size
        self._live[kind] += size
        self._total += size
        self._activations_peak = max(self._activations_peak, self._live["activations"])
        self._peak = max(self._peak, self._total)
        if self._observer is not None:
            self._observer.made(key, kind, size)

    def _remove(self, key: int, _reference: object = None) -> None:
        _, kind, size = self._known.pop(key)
        self._live[kind] -= size
        self._total -= size
        if self._observer is not None:
            self._observer.gone(key)


def tensors_in(tree: Any) -> list[Tensor]:
    """List the tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class MemoryMeter:
    """Host and GPU memory of this process over a block of code: ``with MemoryMeter() as meter``.

    The host's peak is the kernel's high-water mark where it can be reset (Linux), otherwise the
    maximum of samples that a thread takes every 5 ms. Meters may be nested; they must be used in
    one thread.

    Args:
        device: accelerator to read as well; with None or a CPU only the host is read.

    Attributes:
        rss: resident bytes of the process at the end.
        rss_peak: greatest number of resident bytes since the start.
        cuda_allocated: bytes in tensors on the device at the end; None without a CUDA device.
        cuda_reserved: bytes that the caching allocator held at the end.
        cuda_peak: greatest number of bytes in tensors since the start.
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
        # The marks are reset below; read them first for the enclosing meters.
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
        """Convert the attributes that are not None to megabytes (10^6 bytes), as ``name_mb``."""
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
    """Reset the kernel's record of this process's peak; return False where that is impossible."""
    try:
        # 5: reset the peak resident set size, see proc(5)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _high_water_mark() > 0
    except OSError:
        return False


def _high_water_mark() -> int:
    """Read the kernel's record in bytes; return 0 if there is none."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class _Sampler:
    """Thread that samples the resident memory."""

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
