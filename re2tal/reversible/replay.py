"""The conditions of a run, met again when it is repeated, and no trace of the repetition.

The backward pass of a reversible stage repeats every branch. The repetition must meet the first
run's conditions (autocast, train or eval mode, parameters, choice of kernels), and must leave no
trace: BatchNorm statistics have already been counted once. Random draws are in `randomness`.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase

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


class ReversibleError(RuntimeError):
    """A reversible stage cannot compute what was asked for; computing on would be wrong."""


class Autocast:
    """Which types of device compute in which lower precision: captured on construction."""

    def __init__(self, device: torch.device) -> None:
        self._states = tuple(
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in dict.fromkeys(["cpu", device.type])
            if torch.amp.is_autocast_available(kind)
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The captured state, without the cache of cast weights (see `uncached`)."""
        with ExitStack() as stack:
            for kind, dtype, enabled in self._states:
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                )
            yield


@contextmanager
def uncached() -> Iterator[None]:
    """Keep autocast from caching cast weights.

    The cache would hold a copy of every weight of the stage until the autocast region ends, where
    this holds one branch's. And in versions of PyTorch that cache a weight cast where gradients are
    off without its history, another use of the weight in the region would silently get no gradient.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Surroundings:
    """Autocast and the choice of kernels, as the caller of a backward has them.

    Gradients are computed in these, as those of stored activations would be, and not in the
    conditions of the forward: autocast would cast what flows back.
    """

    def __init__(self, device: torch.device) -> None:
        self._autocast = Autocast(device)
        self._kernels = ConvolutionKernels.now() if device.type == "cuda" else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Back to them, for a part of a repetition."""
        with self._autocast.restored(), ExitStack() as stack:
            if self._kernels is not None:
                stack.enter_context(self._kernels.restored())
            yield


class Conditions:
    """Of one run of some modules, for its repetition.

    Args:
        modules: the modules that run; those inside them are found.
        device: where they run.
        autocast: the state in which they run.
        where: their place in the model, for errors.
        hooked: those of them whose own hooks run around the first run and around its backward.

    Raises:
        ReversibleError: if FSDP shards one of the others on its own, or flattens parameters.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device,
        autocast: Autocast,
        where: str,
        *,
        hooked: Sequence[nn.Module] = (),
    ) -> None:
        self.where = where
        self._device = device
        self._autocast = autocast
        # A module that two entries share (a drop path, say) counts once.
        self._modules = list(dict.fromkeys(m for top in modules for m in top.modules()))
        _refuse_sharded(self._modules, hooked, where)
        self.parameters = _parameters(self._modules)
        self._training: Sequence[bool] = ()
        self._attention = AttentionKernels.now()
        self._counted: list[tuple[nn.Module, str]] = []
        self._unchanged: list[tuple[str, Tensor, int]] = []

    @property
    def devices(self) -> set[torch.device]:
        """Where random numbers may be drawn."""
        return {self._device, *(p.device for p in self.parameters)}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """The first run.

        Raises:
            ReversibleError: if a buffer changes, other than statistics that can be kept.
        """
        self._training = [m.training for m in self._modules]
        self._attention = AttentionKernels.now()
        watched = self._watch_buffers()
        with uncached(), repeatable_kernels(self._device):
            yield
        self._refuse_changed(watched)
        self._unchanged += [(f"the buffer {name!r}", b, v) for _, name, b, v in watched]
        self._unchanged += [("a parameter", p, p._version) for p in self.parameters]

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """A repetition, with gradients or without as the caller has it.

        Raises:
            ReversibleError: if the modules are no longer those that ran first.
        """
        self._check_unchanged()
        with ExitStack() as stack:
            stack.enter_context(self._modes())
            stack.enter_context(statistics_kept(self._counted))
            stack.enter_context(repeatable_kernels(self._device))
            stack.enter_context(self._attention.restored())
            stack.enter_context(self._autocast.restored())
            yield

    def _watch_buffers(self) -> list[tuple[nn.Module, str, Tensor, int]]:
        """Every buffer that the run should not change, with its version.

        Running statistics in training mode are set apart: they do not enter the result, so that the
        replay may start from other values. (Their kernels do not even count a new version.)
        """
        watched = []
        for module in self._modules:
            counts = counts_statistics(module)
            for name, buffer in module._buffers.items():
                if counts:
                    self._counted.append((module, name))
                elif buffer is not None:
                    watched.append((module, name, buffer, buffer._version))
        return watched

    def _refuse_changed(self, watched: Sequence[tuple[nn.Module, str, Tensor, int]]) -> None:
        for module, name, buffer, version in watched:
            if buffer._version != version:
                raise ReversibleError(
                    f"{self.where} changed the buffer {name!r} of {type(module).__name__} in its "
                    "forward, and would do so again in its replay. Only the running statistics of "
                    "normalisation layers can be kept from that: leave this block out, or call "
                    "set_reversible(model, False)."
                )

    def _check_unchanged(self) -> None:
        if list(map(id, _parameters(self._modules))) != list(map(id, self.parameters)):
            raise ReversibleError(
                f"{self.where} has other parameters now than in its forward, so its replay would "
                "not be the same. Swapped parameters (torch.func.functional_call) need "
                "set_reversible(model, False)."
            )
        for name, tensor, version in self._unchanged:
            if tensor._version != version:
                raise ReversibleError(
                    f"{self.where}: {name} of shape {tuple(tensor.shape)} was modified in place "
                    "between the forward and its backward, so the replay would not be the same. "
                    "Step the optimizer after the backward; under DDP with two forwards before one "
                    "backward, set broadcast_buffers=False."
                )

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """Train and eval mode of every module as in the first run."""
        found = [m.training for m in self._modules]
        self._set_modes(self._training)
        try:
            yield
        finally:
            self._set_modes(found)

    def _set_modes(self, modes: Sequence[bool]) -> None:
        for module, mode in zip(self._modules, modes, strict=True):
            module.training = mode


@contextmanager
def statistics_kept(counted: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Throwaway copies in place of running statistics, given as modules and names of buffers."""
    real = [(module, name, module._buffers[name]) for module, name in counted]
    for module, name, buffer in real:
        module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in real:
            module._buffers[name] = buffer


def counts_statistics(module: nn.Module) -> bool:
    """Whether the module takes statistics over the batch, and counts them in its buffers."""
    return isinstance(module, _NormBase) and module.training


def _refuse_sharded(modules: Iterable[nn.Module], hooked: Sequence[nn.Module], where: str) -> None:
    """Refuse parameters that are not there when a branch looks for them."""
    # Importing FSDP to find out would take long; whoever uses it has.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in modules:
        if not getattr(module, "_fsdp_use_orig_params", True):
            raise ReversibleError(
                f"{where}: FullyShardedDataParallel has flattened the parameters of its "
                f"{type(module).__name__}, which would get no gradients. Use fully_shard from "
                "torch.distributed.fsdp, or call set_reversible(model, False)."
            )
        if isinstance(module, fsdp.FSDPModule) and module not in hooked:
            raise ReversibleError(
                f"{where}: a {type(module).__name__} inside is sharded on its own, and its "
                "parameters would get no gradients. Call fully_shard on the containers that "
                "reversible_stages(model) lists, not on what is inside, or call "
                "set_reversible(model, False)."
            )


def _parameters(modules: Sequence[nn.Module]) -> tuple[nn.Parameter, ...]:
    """The parameters that these modules hold themselves, each once."""
    return tuple(dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None))


CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class GeneratorStates:
    """States of the default generators of some devices, as uint8 tensors on the host."""

    states: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> "GeneratorStates":
        """The states at this moment, of the CPU's generator and of those of `devices`."""
        chosen = dict.fromkeys([CPU, *(d for d in devices if d.type not in ("cpu", "meta"))])
        return cls(tuple((device, _get(device)) for device in chosen))

    def moved(self) -> bool:
        """Whether any of these generators has been drawn from since."""
        return any(not torch.equal(state, _get(device)) for device, state in self.states)

    def set(self) -> None:
        """Put the generators back to these states."""
        for device, state in self.states:
            if device == CPU:
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)

    @contextmanager
    def revisited(self) -> Iterator[None]:
        """Run a block of code from these states, then leave the generators as they were found."""
        found = GeneratorStates.now(device for device, _ in self.states)
        self.set()
        try:
            yield
        finally:
            found.set()


class Draws:
    """Where the generators stood before each part of a run, so that any part can be repeated."""

    def __init__(self) -> None:
        self._marks: list[GeneratorStates] = []

    def mark(self, stream: Tensor, devices: Iterable[torch.device]) -> None:
        """A part of the run begins, on this tensor and with generators of these devices."""
        # Fake tensors draw nothing, and cannot be mixed with real generator states.
        if not isinstance(stream, FakeTensor):
            self._marks.append(GeneratorStates.now(devices))

    def settle(self) -> None:
        """The run has ended: forget the states if it drew nothing."""
        if self._marks and not self._marks[0].moved():
            self._marks.clear()

    def revisited(self, part: int) -> AbstractContextManager[None]:
        """The generators as they stood before a part; as they are if the run drew nothing."""
        return self._marks[part].revisited() if self._marks else nullcontext()


def _get(device: torch.device) -> Tensor:
    if device == CPU:
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state
