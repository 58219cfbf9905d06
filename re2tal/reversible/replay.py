"""Run a branch, and later run it once more so that it computes the same thing and nothing else.

The backward pass of a reversible stage repeats every branch. The repetition must meet the first
run's conditions (random masks, autocast, train or eval mode, parameters), and must leave no trace:
random generators and BatchNorm statistics have already moved once.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase

from re2tal.reversible.branches import Branch
from re2tal.reversible.randomness import GeneratorStates
from re2tal.reversible.streams import stream_dtype


class ReversibleError(RuntimeError):
    """A reversible stage cannot compute what was asked for; computing on would be wrong."""


def run_branch(branch: Branch, stream: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """``F(stream)``: the branch sees the stage's own dtype, its result is as precise as the stream.

    Args:
        branch: the branch to run.
        stream: ``x_{i-1}``, in the stream's dtype.
        dtype: dtype of the stage's input, which the block was made for.
        where: the branch's place in the model, for errors.

    Raises:
        ReversibleError: if the branch changes the shape, or its input.
    """
    version = None if stream.is_inference() else stream._version
    result = branch(stream.to(dtype))
    if version is not None and stream._version != version:
        raise ReversibleError(
            f"{where} modifies its input in place, and with it the skip connection. Use the "
            "out-of-place form of its first operation, for example ReLU(inplace=False)."
        )
    if result.shape != stream.shape:
        raise ReversibleError(
            f"{where} turns the shape {tuple(stream.shape)} into {tuple(result.shape)}, but a "
            "residual branch keeps it. Let the family raise NotReversibleError for such blocks."
        )
    return result.to(stream_dtype(dtype))


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


class Replay:
    """One run of a branch, with what its repetition needs.

    Args:
        branch: the branch.
        dtype: dtype of the stage's input.
        autocast: the state in which the stage runs.
        where: the branch's place in the model, for errors.
    """

    def __init__(
        self, branch: Branch, dtype: torch.dtype, autocast: Autocast, where: str = "a branch"
    ) -> None:
        self.where = where
        self._branch = branch
        self._dtype = dtype
        self._autocast = autocast
        # A module that two entries share (a drop path, say) counts once.
        self._modules = list(dict.fromkeys(m for top in branch.modules for m in top.modules()))
        self.parameters = _parameters(self._modules)
        self._training: Sequence[bool] = ()
        self._generators: GeneratorStates | None = None
        self._counted: list[tuple[nn.Module, str]] = []
        self._unchanged: list[tuple[str, Tensor, int]] = []

    def first(self, stream: Tensor) -> Tensor:
        """Run the branch on ``stream`` and remember how."""
        self._training = [m.training for m in self._modules]
        # Fake tensors draw nothing, and cannot be mixed with real generator states.
        fake = isinstance(stream, FakeTensor)
        generators = None if fake else GeneratorStates.now(self._devices(stream))
        watched = self._watch_buffers()
        with uncached():
            result = run_branch(self._branch, stream, self._dtype, self.where)
        if generators is not None and generators.moved():
            self._generators = generators
        self._refuse_changed(watched)
        self._unchanged += [(f"the buffer {name!r}", b, v) for _, name, b, v in watched]
        self._unchanged += [("a parameter", p, p._version) for p in self.parameters]
        return result

    def again(self, stream: Tensor) -> Tensor:
        """Repeat the run, with gradients or without as the caller has it.

        Raises:
            ReversibleError: if the branch is no longer the one that ran first.
        """
        self._check_unchanged()
        with ExitStack() as stack:
            stack.enter_context(self._modes())
            stack.enter_context(self._statistics_kept())
            if self._generators is not None:
                stack.enter_context(self._generators.revisited())
            stack.enter_context(self._autocast.restored())
            return run_branch(self._branch, stream, self._dtype, self.where)

    def _devices(self, stream: Tensor) -> set[torch.device]:
        return {stream.device, *(p.device for p in self.parameters)}

    def _watch_buffers(self) -> list[tuple[nn.Module, str, Tensor, int]]:
        """Every buffer that the run should not change, with its version.

        Running statistics in training mode are set apart: they do not enter the result, so that the
        replay may start from other values. (Their kernels do not even count a new version.)
        """
        watched = []
        for module in self._modules:
            counts = isinstance(module, _NormBase) and module.training
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
    def _statistics_kept(self) -> Iterator[None]:
        """Throwaway copies in place of the running statistics, which have been counted already."""
        real = [(module, name, module._buffers[name]) for module, name in self._counted]
        for module, name, buffer in real:
            module._buffers[name] = None if buffer is None else buffer.clone()
        try:
            yield
        finally:
            for module, name, buffer in real:
                module._buffers[name] = buffer


def _parameters(modules: Sequence[nn.Module]) -> tuple[nn.Parameter, ...]:
    """The parameters that these modules hold themselves, each once."""
    return tuple(dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None))
