"""Replays: they restore the conditions of a forward, and have no side effects.

The backward pass of a reversible stage replays every branch. A replay must run under the conditions
of its forward: autocast, train or eval mode, parameters, choice of kernels, and the random numbers
of dropout and drop path. It must not change anything else: running statistics of BatchNorm are
counted once, in the forward, and the program's random generators stay where they are. PyTorch's
default generators of the CPU and of the devices in use are covered; Python's `random`, NumPy and
private generators of modules are not.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase


class ReversibleError(RuntimeError):
    """A reversible stage cannot do what it was asked to; going on would give wrong results."""


class _State(Protocol):
    """Copy of a global state of PyTorch."""

    def set(self) -> None:
        """Make this copy the current state."""
        ...


@contextmanager
def _exchanged(found: _State, wanted: _State) -> Iterator[None]:
    """Set one state for a block of code, and another one when the block ends."""
    wanted.set()
    try:
        yield
    finally:
        found.set()


_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


@dataclass(frozen=True, slots=True)
class _AttentionKernels:
    """Kernels that `scaled_dot_product_attention` may choose from, as `sdpa_kernel` sets them."""

    enabled: tuple[bool, ...]

    @classmethod
    def now(cls) -> "_AttentionKernels":
        """Read the current choice."""
        return cls(tuple(getattr(torch.backends.cuda, f"{k}_sdp_enabled")() for k in _ATTENTION))

    def restored(self) -> AbstractContextManager[None]:
        """Allow these kernels for a block of code."""
        return _exchanged(self.now(), self)

    def set(self) -> None:
        """Allow these kernels."""
        for kernel, enabled in zip(_ATTENTION, self.enabled, strict=True):
            getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(enabled)


@dataclass(frozen=True, slots=True)
class _ConvolutionKernels:
    """Settings of cuDNN: autotuning (``benchmark``), and kernels that add in a fixed order only."""

    benchmark: bool
    deterministic: bool

    @classmethod
    def now(cls) -> "_ConvolutionKernels":
        """Read the current settings."""
        return cls(torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)

    def restored(self) -> AbstractContextManager[None]:
        """Use these settings for a block of code."""
        return _exchanged(self.now(), self)

    def set(self) -> None:
        """Use these settings."""
        torch.backends.cudnn.benchmark = self.benchmark
        torch.backends.cudnn.deterministic = self.deterministic


def _same_convolutions(device: torch.device) -> AbstractContextManager[None]:
    """Make cuDNN choose the same kernel for the forward and for its replay."""
    if device.type != "cuda":
        return nullcontext()
    return _ConvolutionKernels(benchmark=False, deterministic=True).restored()


class Autocast:
    """Autocast state of the CPU and of a device's type, captured on construction."""

    def __init__(self, device: torch.device) -> None:
        self._states = tuple(
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in dict.fromkeys(["cpu", device.type])
            if torch.amp.is_autocast_available(kind)
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Use the captured state, without the cache of cast weights (see `uncached`)."""
        with ExitStack() as stack:
            for kind, dtype, enabled in self._states:
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                )
            yield


@contextmanager
def uncached() -> Iterator[None]:
    """Disable autocast's cache of cast weights.

    The cache would hold a copy of every weight of the stage until the autocast region ends; without
    it, only the copies of one branch exist. Some versions of PyTorch also cache weights that were
    cast while gradients were off, without their history: a later use of such a weight in the region
    would silently get no gradient.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Surroundings:
    """Autocast state and choice of kernels at the call of a backward.

    A replay recomputes a branch under the conditions of its forward, but differentiates it in these
    surroundings, as stored activations would be: under the forward's autocast, gradients would be
    cast.
    """

    def __init__(self, device: torch.device) -> None:
        self._autocast = Autocast(device)
        self._kernels = _ConvolutionKernels.now() if device.type == "cuda" else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Return to the surroundings for a block of code inside a replay."""
        kernels = nullcontext() if self._kernels is None else self._kernels.restored()
        with self._autocast.restored(), kernels:
            yield


_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, weakref_slot=True)
class GeneratorStates:
    """States of the default generators of some devices, as uint8 tensors on the host."""

    states: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> "GeneratorStates":
        """Read the states of the CPU's generator and of those of `devices`."""
        chosen = dict.fromkeys([_CPU, *(d for d in devices if d.type not in ("cpu", "meta"))])
        latest = _LATEST.get(tuple(chosen))
        if latest is not None and not latest.moved():
            # Sharing it saves 5 kB a branch, and lets `Draws` compare states by identity.
            return latest
        found = cls(tuple((device, _generator_state(device)) for device in chosen))
        _LATEST[tuple(chosen)] = found
        return found

    def moved(self) -> bool:
        """Tell whether any of these generators has advanced since."""
        return any(not torch.equal(state, _generator_state(d)) for d, state in self.states)

    def restored(self) -> AbstractContextManager[None]:
        """Run a block of code from these states, then leave the generators as they were found."""
        return _exchanged(GeneratorStates.now(device for device, _ in self.states), self)

    def set(self) -> None:
        """Set the generators to these states."""
        for device, state in self.states:
            if device == _CPU:
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)


_LATEST: WeakValueDictionary[tuple[torch.device, ...], GeneratorStates] = WeakValueDictionary()


def _generator_state(device: torch.device) -> Tensor:
    if device == _CPU:
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


class Draws:
    """Generator states before each part of a forward, so that any part can be replayed."""

    def __init__(self) -> None:
        self._marks: list[GeneratorStates] = []

    def mark(self, stream: Tensor, devices: Iterable[torch.device]) -> None:
        """Record the states at the beginning of a part.

        Args:
            stream: tensor on which the part runs.
            devices: devices whose generators may be drawn from.
        """
        # Fake tensors draw nothing, and cannot be mixed with real generator states.
        if not isinstance(stream, FakeTensor):
            self._marks.append(GeneratorStates.now(devices))

    def settle(self) -> None:
        """Record the states at the end of the forward; drop all states if nothing was drawn."""
        if not self._marks:
            return
        self._marks.append(GeneratorStates.now(device for device, _ in self._marks[0].states))
        # States between which nothing was drawn are one object; see `GeneratorStates.now`.
        if all(mark is self._marks[0] for mark in self._marks):
            self._marks.clear()

    def replayed(self, part: int) -> AbstractContextManager[None]:
        """Restore the states before a part for a block of code, if the part drew any numbers."""
        if not self._marks or self._marks[part] is self._marks[part + 1]:
            return nullcontext()
        return self._marks[part].restored()


class Conditions:
    """Conditions under which some modules ran their forward, to be restored for the replay.

    Args:
        modules: modules that run; their submodules are included.
        device: device on which they run.
        autocast: autocast state of the forward.
        where: their name in the model, for errors.
        hooked: modules among them whose own hooks run around the forward and around its backward.

    Raises:
        ReversibleError: if FSDP shards a module that is not in `hooked`, or flattens parameters.
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
        # Each once: two branches may share a module, such as a drop path.
        self._modules = list(dict.fromkeys(m for top in modules for m in top.modules()))
        _refuse_sharded(self._modules, hooked, where)
        self.parameters = _parameters(self._modules)
        self._training: Sequence[bool] = ()
        self._attention = _AttentionKernels.now()
        self._counted: list[tuple[nn.Module, str]] = []
        self._unchanged: list[tuple[str, Tensor, int]] = []

    @property
    def devices(self) -> set[torch.device]:
        """Devices whose generators may be drawn from."""
        return {self._device, *(p.device for p in self.parameters)}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record the conditions of the forward that runs in this context.

        Raises:
            ReversibleError: if the forward changes a buffer other than running statistics.
        """
        self._training = [m.training for m in self._modules]
        self._attention = _AttentionKernels.now()
        watched = self._watch_buffers()
        with uncached(), _same_convolutions(self._device):
            yield
        self._refuse_changed(watched)
        self._unchanged += [(f"the buffer {name!r}", b, v) for _, name, b, v in watched]
        # Parameters are not copied for the replay, so their versions must not change until then.
        self._unchanged += [("a parameter", p, p._version) for p in self.parameters]

    @contextmanager
    def met_again(self) -> Iterator[None]:
        """Restore the recorded conditions for the replay that runs in this context.

        Raises:
            ReversibleError: if parameters or buffers have changed since the forward.
        """
        self._check_unchanged()
        with (
            self._modes(),
            statistics_kept(self._counted),
            _same_convolutions(self._device),
            self._attention.restored(),
            self._autocast.restored(),
        ):
            yield

    def _watch_buffers(self) -> list[tuple[nn.Module, str, Tensor, int]]:
        """List every buffer that the forward must not change, with its version.

        Running statistics in training mode are excluded: they do not enter the result, so the
        replay may run on any values of them. (Their kernels do not even count a new version.)
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
        """Set every module to the train or eval mode that it had in the forward."""
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
    """Run a block of code on copies of buffers, given by module and name, then discard these."""
    real = [(module, name, module._buffers[name]) for module, name in counted]
    by_dtype: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = defaultdict(list)
    for module, name, buffer in real:
        if buffer is not None:
            by_dtype[buffer.dtype].append((module, name, buffer))
    for group in by_dtype.values():
        # One kernel on a GPU copies all buffers of a dtype.
        copies = torch._foreach_add([buffer for *_, buffer in group], 0)
        for (module, name, _), copy in zip(group, copies, strict=True):
            module._buffers[name] = copy
    try:
        yield
    finally:
        for module, name, buffer in real:
            module._buffers[name] = buffer


def counts_statistics(module: nn.Module) -> bool:
    """Tell whether the module computes statistics over the batch now, and updates its buffers."""
    return takes_statistics(module) and module.training


def takes_statistics(module: nn.Module) -> bool:
    """Tell whether the module computes statistics over the batch in training mode."""
    return isinstance(module, _NormBase)


def _refuse_sharded(modules: Iterable[nn.Module], hooked: Sequence[nn.Module], where: str) -> None:
    """Refuse modules whose parameters FSDP keeps elsewhere while a branch is replayed."""
    # Importing FSDP takes long, and a model that is sharded has imported it.
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
    """List the parameters that these modules themselves hold, not their submodules, each once."""
    return tuple(dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None))
