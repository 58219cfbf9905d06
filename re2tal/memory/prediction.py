"""What a training step will use: the bytes of the tensors that it keeps alive.

`predict_peak` counts with fake tensors, which have shapes and no data, so a step of hundreds of
gigabytes can be predicted on a laptop; `measure_activations` counts with real ones. What counts is
the peak over the whole step, not what autograd holds when the forward ends. Sizes are in bytes.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)

from re2tal.memory.breakdown import Breakdown, Record
from re2tal.memory.live import LiveBytes, StepMemory, tensors_in

Step = Callable[..., Any]


def predict_peak(model: nn.Module, *inputs: Any, step: Step | None = None) -> StepMemory:
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
    with _faked(model, inputs) as (fake_model, fake_inputs), LiveBytes(fake_model) as live:
        _run(fake_model, fake_inputs, step)
    return live.memory()


def explain_peak(model: nn.Module, *inputs: Any, step: Step | None = None) -> Breakdown:
    """The prediction of `predict_peak`, with the place of the peak and what it is made of.

    Args:
        model: as in `predict_peak`.
        inputs: likewise.
        step: likewise.

    Raises:
        ValueError: as `predict_peak`.
    """
    with (
        _faked(model, inputs) as (fake_model, fake_inputs),
        Record(fake_model) as record,
        LiveBytes(fake_model, record) as live,
    ):
        _run(fake_model, fake_inputs, step)
    return record.breakdown(live.memory())


def measure_activations(model: nn.Module, *inputs: Any, step: Step | None = None) -> StepMemory:
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
    with _gradients_set_aside(model), torch.random.fork_rng(), LiveBytes(model) as live:
        _run(model, inputs, step)
        return live.memory()


@contextmanager
def _faked(model: nn.Module, inputs: Any) -> Iterator[tuple[nn.Module, Any]]:
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        # One copy of both: a tensor that they share stays shared.
        fake_model, fake_inputs = copy.deepcopy((model, inputs))
    for parameter in fake_model.parameters():
        parameter.grad = None
    try:
        with fake:
            yield fake_model, fake_inputs
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"The memory of this {type(model).__name__} cannot be predicted: {error} depends on "
            "values. Write it with fixed shapes (torch.where instead of boolean indexing), or give "
            "a step that runs only the part without it."
        ) from error


def _run(model: nn.Module, inputs: Any, step: Step | None) -> None:
    """Forward and backward, of the sum of all that needs a gradient."""
    result = model(*inputs) if step is None else step(model, *inputs)
    terms = [t.sum() for t in tensors_in(result) if t.requires_grad]
    if not terms:
        raise ValueError(
            f"The forward of this {type(model).__name__} returned nothing that needs a "
            "gradient. Put it in training mode, or give a step that returns the loss."
        )
    del result
    torch.stack(terms).sum().backward()


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
