"""What a training step will use: the bytes of the tensors that it keeps alive.

`predict_peak` counts with fake tensors, which have shapes and no data, so a step of hundreds of
gigabytes can be predicted on a laptop; `measure_activations` counts with real ones. What counts is
the peak over the whole step, not what autograd holds when the forward ends. Sizes are in bytes.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from re2tal.memory.units import MEGABYTE


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes of one forward and backward, without the optimizer.

    Counted are the storages of tensors, each once. An operator's own scratch space, fragmentation
    and what the allocator keeps in reserve are not visible to the count.

    Attributes:
        parameters: the model's parameters.
        buffers: the model's buffers.
        inputs: every other tensor that existed before the step and was used in it.
        gradients: the parameters' ``.grad`` at the end of the step.
        activations: everything else, when it was most.
        peak: all of these together, when they were most. Less than their sum, since gradients grow
            while activations shrink.
    """

    parameters: int
    buffers: int
    inputs: int
    gradients: int
    activations: int
    peak: int

    def metrics(self) -> dict[str, float]:
        """The sizes in megabytes (10^6 bytes), as ``name_mb``."""
        return {f"{name}_mb": getattr(self, name) / MEGABYTE for name in self.__slots__}


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the storages that operators make, until they are freed.

    A step of the real training loop is measured with ``with LiveBytes(model) as live: ...`` and
    ``live.memory()``. It slows every operator down, so it is for single steps. Inside a
    `FakeTensorMode` it counts fake tensors.

    Args:
        model: its parameters, buffers and gradients are counted apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._live = dict.fromkeys(("parameters", "buffers", "inputs", "gradients"), 0)
        self._live["activations"] = 0
        self._activations_peak = self._peak = 0
        self._hooks = ExitStack()

    def memory(self) -> StepMemory:
        """Peaks so far for activations and the whole, what is alive now for the rest."""
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
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; whatever it was given and is new here existed before the step."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, "inputs")
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._see(tensor, "activations")
        return result

    def _see(self, tensor: Tensor, kind: str) -> None:
        if tensor.layout != torch.strided:
            return  # sparse tensors have no storage of their own; nothing here makes them
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._known:
            reference, kind, before = self._known[key]
        else:
            reference, before = weakref.ref(storage, partial(self._freed, key)), 0
        self._known[key] = reference, kind, size
        self._add(kind, size - before)

    def _became_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        key = parameter.grad.untyped_storage()._cdata
        self._see(parameter.grad, "gradients")
        reference, kind, size = self._known[key]
        self._known[key] = reference, "gradients", size
        self._add(kind, -size)
        self._add("gradients", size)

    def _freed(self, key: int, _reference: object) -> None:
        _, kind, size = self._known.pop(key)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        self._live[kind] += size
        self._activations_peak = max(self._activations_peak, self._live["activations"])
        self._peak = max(self._peak, sum(self._live.values()))


def predict_peak(
    model: nn.Module, *inputs: Any, step: Callable[..., Any] | None = None
) -> StepMemory:
    """The memory of a training step, from fake tensors: nothing is computed or allocated.

    Args:
        model: the model, as it would be trained (device, dtype, train mode, rewired or not). A
            model on a GPU needs a GPU to be present, for autocast's sake; sizes are the same on a
            CPU where the same operators run.
        inputs: examples of what it is called with; only shapes, dtypes and devices matter.
        step: the forward, called as ``step(model, *inputs)`` with fake copies: the place for
            autocast or keyword arguments. By default the model is called. Every tensor in the
            result that needs a gradient is taken as a loss term.

    Raises:
        ValueError: if nothing in the result needs a gradient, or if shapes in the forward depend on
            values, which fake tensors do not have.
    """
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        # One copy of both: a tensor that they share stays shared.
        fake_model, fake_inputs = copy.deepcopy((model, inputs))
    for parameter in fake_model.parameters():
        parameter.grad = None
    try:
        with fake:
            return _count(fake_model, fake_inputs, step)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"The memory of this {type(model).__name__} cannot be predicted: {error} depends on "
            "values. Write it with fixed shapes (torch.where instead of boolean indexing), or give "
            "a step that runs only the part without it."
        ) from error


def measure_activations(
    model: nn.Module, *inputs: Any, step: Callable[..., Any] | None = None
) -> StepMemory:
    """The same count as `predict_peak` over a real forward and backward.

    The model's gradients and the random generators are left as they were; running statistics of
    normalisation layers advance, as in any forward in training mode.

    Args:
        model: the model.
        inputs: what it is called with.
        step: as in `predict_peak`.

    Raises:
        ValueError: if nothing in the result needs a gradient.
    """
    with _gradients_set_aside(model), torch.random.fork_rng():
        return _count(model, inputs, step)


def _count(model: nn.Module, inputs: Any, step: Callable[..., Any] | None) -> StepMemory:
    with LiveBytes(model) as live:
        result = model(*inputs) if step is None else step(model, *inputs)
        terms = [t.sum() for t in _tensors(result) if t.requires_grad]
        if not terms:
            raise ValueError(
                f"The forward of this {type(model).__name__} returned nothing that needs a "
                "gradient. Put it in training mode, or give a step that returns the loss."
            )
        del result
        torch.stack(terms).sum().backward()
        del terms
    return live.memory()


@contextmanager
def _gradients_set_aside(model: nn.Module) -> Iterator[None]:
    found = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in found:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in found:
            parameter.grad = gradient


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
