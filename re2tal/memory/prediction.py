"""Prediction of a training step's memory: bytes of the tensors that are alive.

`predict_peak` counts fake tensors, which have shapes but no data, so a step of hundreds of
gigabytes can be predicted on a laptop. `measure_activations` counts real tensors. The result is the
peak over the whole step, not the bytes that autograd holds after the forward. Sizes are in bytes.
"""

import copy
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.autograd.graph import Node
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from re2tal.memory.live import LiveBytes, StepMemory, tensors_in


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Operator and module that made a tensor.

    Attributes:
        kind: field of `StepMemory`: parameters, buffers, inputs, gradients or activations.
        module: name of the innermost module whose forward or backward was running; "" is the model
            itself.
        operator: operator of PyTorch's ATen library, such as "native_layer_norm". Only activations
            have a module and an operator; otherwise both are "".
        phase: "forward" or "backward", which includes forwards recomputed in the backward.
    """

    kind: str
    module: str
    operator: str
    phase: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Peak of a step, split by the origins of the live tensors.

    Attributes:
        memory: sizes of the step.
        peak: origin of the tensor with which the peak was reached.
        parts: bytes alive at the peak by origin, the largest first. Their sum is ``memory.peak``.
    """

    memory: StepMemory
    peak: Origin
    parts: tuple[tuple[Origin, int], ...]


Step = Callable[..., Any]


def predict_peak(model: nn.Module, *inputs: Any, step: Step | None = None) -> StepMemory:
    """Predict the memory of a training step with fake tensors: nothing is computed or allocated.

    Args:
        model: model as it would be trained (device, dtype, train mode, rewired or not). A model on
            a GPU needs a GPU to be present, because of autocast; on a CPU, sizes are the same if
            the same operators run. A model on the "meta" device, which takes no memory, is
            predicted as on a CPU.
        inputs: examples of the model's inputs; only shapes, dtypes and devices matter.
        step: forward, called as ``step(model, *inputs)`` with fake copies; use it for autocast or
            keyword arguments. By default the model is called. Every tensor in the result that needs
            a gradient counts as a loss term.

    Raises:
        ValueError: nothing in the result needs a gradient, or shapes in the forward depend on
            values, which fake tensors do not have.
    """
    with _faked(model, inputs) as (fake_model, fake_inputs), LiveBytes(fake_model) as live:
        _run(fake_model, fake_inputs, step)
    return live.memory()


def explain_peak(model: nn.Module, *inputs: Any, step: Step | None = None) -> Breakdown:
    """Predict like `predict_peak`, and return the place of the peak and its parts.

    Args:
        model: see `predict_peak`.
        inputs: see `predict_peak`.
        step: see `predict_peak`.

    Raises:
        ValueError: see `predict_peak`.
    """
    with (
        _faked(model, inputs) as (fake_model, fake_inputs),
        _Record(fake_model) as record,
        LiveBytes(fake_model, record) as live,
    ):
        _run(fake_model, fake_inputs, step)
    return record.breakdown(live.memory())


def measure_activations(model: nn.Module, *inputs: Any, step: Step | None = None) -> StepMemory:
    """Count like `predict_peak`, over a real forward and backward.

    The model's gradients and the random generators are restored; running statistics of
    normalisation layers advance, as in any forward in training mode.

    Args:
        model: the model.
        inputs: the model's inputs.
        step: see `predict_peak`.

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
        # One deepcopy of both, so that a tensor that they share stays shared.
        fake_model, fake_inputs = copy.deepcopy((model, inputs))
    for parameter in fake_model.parameters():
        parameter.grad = None
    with fake:
        _materialize(fake_model)
    try:
        with fake:
            yield fake_model, fake_inputs
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"The memory of this {type(model).__name__} cannot be predicted: {error} depends on "
            "values. Write it with fixed shapes (torch.where instead of boolean indexing), or give "
            "a step that runs only the part without it."
        ) from error


def _materialize(model: nn.Module) -> None:
    """Replace a model's tensors on the "meta" device by tensors on the CPU, without values."""
    made: dict[int, Tensor] = {}  # by id, so that a tensor that two modules share stays shared

    def on_cpu(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="cpu", requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
        return made[id(tensor)]

    for module in model.modules():
        held: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "meta":
                    tensors[name] = on_cpu(tensor)


def _run(model: nn.Module, inputs: Any, step: Step | None) -> None:
    """Run a forward, and a backward from the sum of all results that need a gradient."""
    result = model(*inputs) if step is None else step(model, *inputs)
    terms = [t.sum() for t in tensors_in(result) if t.requires_grad]
    if not terms:
        raise ValueError(
            f"The forward of this {type(model).__name__} returned nothing that needs a "
            "gradient. Put it in training mode, or give a step that returns the loss."
        )
    del result  # results that are not loss terms are freed before the backward, as in training
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


class _Record:
    """Log of the storages that `LiveBytes` reports, with the modules that were running.

    A context manager around the step, and the observer of `LiveBytes`. Inside the context, the
    backward runs in the thread of the forward, which the log requires.

    Args:
        model: model whose modules are named.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = _Places(model)
        self._operator = ""
        self._alive: dict[int, tuple[Origin, int]] = {}
        self._log: list[tuple[Origin, int]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        places = self._places
        hooks = (
            register_module_forward_pre_hook(places.enter),
            register_module_forward_hook(places.leave, always_call=True),
        )
        for hook in hooks:
            self._hooks.callback(hook.remove)
        self._hooks.enter_context(torch.autograd.set_multithreading_enabled(False))
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooks.close()

    def running(self, operator: Any, inputs: list[Tensor]) -> None:
        """Record the operator and the parameters that it uses."""
        self._operator = operator.overloadpacket.__name__
        self._places.use(inputs)

    def made(self, storage: int, kind: str, size: int) -> None:
        """Record the origin of a storage."""
        module, phase = self._places.now()
        if kind == "activations":
            origin = Origin(kind=kind, module=module, operator=self._operator, phase=phase)
        else:
            origin = Origin(kind=kind, module="", operator="", phase=phase)
        self._alive[storage] = origin, size
        self._log.append((origin, size))

    def gone(self, storage: int) -> None:
        """Record that a storage was freed."""
        origin, size = self._alive.pop(storage)
        self._log.append((origin, -size))

    def breakdown(self, memory: StepMemory) -> Breakdown:
        """List the origins of the bytes that were alive at the peak.

        Args:
            memory: result of `LiveBytes`.
        """
        total = most = end = 0
        for index, (_, change) in enumerate(self._log):
            total += change
            if total > most:
                most, end = total, index
        parts: Counter[Origin] = Counter()
        for origin, change in self._log[: end + 1]:
            parts[origin] += change
        alive = tuple((origin, size) for origin, size in parts.most_common() if size > 0)
        return Breakdown(memory=memory, peak=self._log[end][0], parts=alive)


class _Places:
    """Names of the running modules, in the forward and in the backward.

    A node of the autograd graph has a sequence number, which grows with every node of a thread. A
    node belongs to the module that was running when that number was given.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._names = {id(module): name for name, module in modules.items()}
        self._containers = {
            name
            for name, module in modules.items()
            if isinstance(module, (nn.Sequential, nn.ModuleList))
        }
        self._owners = {
            id(parameter): name
            for name, module in modules.items()
            for parameter in module.parameters(recurse=False)
        }
        self._stack = [""]
        self._numbers = [0]
        self._marks = [("", "")]  # for each number the module, and the result of `_refined`
        self._last_used = ""

    def enter(self, module: nn.Module, _args: Any) -> None:
        self._stack.append(self._names.get(id(module), self._stack[-1]))
        self._mark(0, self._stack[-1], self._stack[-1])

    def leave(self, _module: nn.Module, _args: Any, _result: Any) -> None:
        self._stack.pop()
        self._mark(0, self._stack[-1], self._stack[-1])

    def use(self, inputs: list[Tensor]) -> None:
        """Record the parameters that an operator uses; its node already has its number."""
        for tensor in inputs:
            if id(tensor) in self._owners:
                self._last_used = self._owners[id(tensor)]
        if torch.is_grad_enabled():
            module, _ = self._running()
            refined = self._refined(module)
            if refined not in (module, self._marks[-1][1]):
                self._mark(-1, module, refined)

    def now(self) -> tuple[str, str]:
        """Return the current module and phase."""
        module, phase = self._running()
        return self._refined(module), phase

    def _running(self) -> tuple[str, str]:
        node: Node | None = torch._C._current_autograd_node()
        if node is None:
            return self._stack[-1], "forward"
        if len(self._stack) > 1 and torch.is_grad_enabled():
            return self._stack[-1], "backward"  # a forward is recomputed
        index = bisect_right(self._numbers, node._sequence_nr()) - 1
        module, refined = self._marks[index]
        # The backward of a custom node runs parts of its own, not the part used before its forward.
        own = isinstance(node, torch.autograd.function.FunctionCtx)
        return module if own else refined, "backward"

    def _mark(self, offset: int, module: str, refined: str) -> None:
        self._numbers.append(torch.autograd._get_sequence_nr() + offset)
        self._marks.append((module, refined))

    def _refined(self, name: str) -> str:
        """Refine a container to the part of a block that was used last.

        Rewired containers do not call their blocks, nor some of the blocks' parts, so hooks do not
        see these run.
        """
        inside = f"{name}." if name else ""
        if name not in self._containers or not self._last_used.startswith(inside):
            return name
        return inside + ".".join(self._last_used.removeprefix(inside).split(".")[:2])
