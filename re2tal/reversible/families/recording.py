"""Recordings of a block's forward: its operators, and the results that each of them uses.

A block runs once under a `TorchFunctionMode`, on fake tensors where that works. Everything that it
does to tensors is recorded: calls of its modules, and operators between them. Decisions that Python
makes on the way (by shapes, modes, settings) are fixed in the recording, so it holds for inputs of
one shape only. A `Program` is a part of a recording that can be run on other tensors.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from re2tal.reversible.replay import statistics_kept


@dataclass(frozen=True, slots=True)
class Value:
    """Result of an operator, or an input; input 0 is the stream, the others are arguments."""

    number: int


@dataclass(frozen=True, slots=True)
class Own:
    """Parameter, buffer or other tensor attribute of the block or of a module inside it."""

    name: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """Tensor whose origin the recorder did not see."""

    shape: tuple[int, ...]


STREAM = Value(0)


class DependsOnValuesError(ValueError):
    """A forward decides by the values of tensors, so no recording of it holds."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Operator:
    """One recorded call of a function or module.

    Attributes:
        function: the function, or the name of the module in the block.
        arguments: pytree leaves of the arguments, with references in place of tensors.
        structure: pytree structure that makes ``(args, kwargs)`` from these leaves.
        results: values by their place among the leaves of the result.
        changed: new values of arguments that the call changed in place, by their place.
        same: results that are one of the arguments, unchanged, with the argument's value.
    """

    function: Callable[..., Any] | str
    arguments: tuple[Any, ...]
    structure: TreeSpec
    results: Mapping[int, Value]
    changed: Mapping[int, Value]
    same: Mapping[Value, Value]

    @property
    def name(self) -> str:
        """Name of the function or module."""
        if isinstance(self.function, str):
            return self.function
        return str(getattr(self.function, "__name__", self.function))

    @property
    def uses(self) -> list[Value | Own | Unknown]:
        """Tensors among the arguments."""
        return [a for a in self.arguments if isinstance(a, (Value, Own, Unknown))]

    @property
    def values(self) -> list[Value]:
        """Results of other operators among the arguments."""
        return [a for a in self.arguments if isinstance(a, Value)]

    def call(self, block: nn.Module, value: Callable[[Value], Tensor]) -> Any:
        """Call the function or module again.

        Args:
            block: the block whose modules and tensors are used.
            value: function from a recorded value to the tensor that takes its place.
        """

        def of(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return value(leaf)
            return own_tensor(block, leaf.name) if isinstance(leaf, Own) else leaf

        args, kwargs = tree_unflatten([of(leaf) for leaf in self.arguments], self.structure)
        function = self.function
        if isinstance(function, str):
            function = block.get_submodule(function)
        return function(*args, **kwargs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """All operators of one forward.

    Attributes:
        operators: the operators in order.
        inputs: number of tensors that the block was called with; values ``0 ... inputs - 1``.
        output: pytree leaves of the block's result, with references in place of tensors.
        structure: pytree structure that makes the result from these leaves.
        shapes: shapes of the values.
        made_by: operator that made a value; inputs have none.
    """

    operators: tuple[Operator, ...]
    inputs: int
    output: tuple[Any, ...]
    structure: TreeSpec
    shapes: Mapping[Value, torch.Size]
    made_by: Mapping[Value, Operator] = field(default_factory=dict)

    def original(self, value: Value) -> Value:
        """Follow a value back over operators that returned it unchanged, to where it was made."""
        while value in self.made_by and value in self.made_by[value].same:
            value = self.made_by[value].same[value]
        return value


class Program:
    """Operators of a recording that lead from one value to others.

    Args:
        recording: the recording.
        results: values to compute.
        source: value that is given.
        skip: operators that return their first tensor instead of being called.

    Attributes:
        operators: the operators in order.
        called: the operators without the skipped ones.
        leaves: inputs of the block that the operators use, without the source.
    """

    def __init__(
        self,
        recording: Recording,
        results: Sequence[Value],
        source: Value,
        skip: Collection[Operator] = (),
    ) -> None:
        self.results, self.source, self._skip = tuple(results), source, tuple(skip)
        needed, found = [*results], set[Value]()
        operators: dict[int, Operator] = {}
        while needed:
            value = needed.pop()
            if value in found or value == source:
                continue
            found.add(value)
            operator = recording.made_by.get(value)
            if operator is not None:
                operators[id(operator)] = operator
                needed += operator.values
        self.leaves = {v for v in found if v not in recording.made_by}
        self.operators = [o for o in recording.operators if id(o) in operators]
        last = {v: o for o in self.operators for v in o.values}  # last use, after which to free it
        self.called = [o for o in self.operators if o not in self._skip]
        self._spent: dict[int, list[Value]] = {}
        for value, operator in last.items():
            if value not in self.results:
                self._spent.setdefault(id(operator), []).append(value)

    def run(self, block: nn.Module, x: Tensor, inputs: Sequence[Tensor] = ()) -> list[Tensor]:
        """Compute the results.

        Args:
            block: the block whose modules and tensors are used.
            x: the source.
            inputs: all tensors that the block was called with, in their order.
        """
        values: dict[Value, Tensor] = {Value(i): t for i, t in enumerate(inputs)}
        values[self.source] = x
        for operator in self.operators:
            if operator in self._skip:
                (made,) = operator.results.values()
                values[made] = values[operator.values[0]]
            else:
                self._call(operator, block, values)
            for value in self._spent.get(id(operator), ()):
                values.pop(value, None)
        return [values[result] for result in self.results]

    @staticmethod
    def _call(operator: Operator, block: nn.Module, values: dict[Value, Tensor]) -> None:
        before = {place: values[operator.arguments[place]] for place in operator.changed}
        leaves = tree_leaves(operator.call(block, values.__getitem__))
        for place, made in operator.results.items():
            values[made] = leaves[place]
        for place, made in operator.changed.items():  # the same tensor, changed in place
            values[made] = before[place]


def own_tensor(block: nn.Module, name: str) -> Tensor:
    """Find a parameter, a buffer or another tensor of a block by its name."""
    module, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(block.get_submodule(module), attribute)
    return tensor


def record(
    block: nn.Module,
    x: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inlined: Collection[str],
) -> Recording:
    """Run a block's own forward, and record what it does.

    Args:
        block: the block.
        x: its input, of which only shape, dtype and device count.
        args: its other arguments.
        kwargs: its keyword arguments.
        inlined: names of modules to look into; a call of any other module is one operator.

    Raises:
        DependsOnValuesError: if the forward depends on values of tensors.
    """
    try:
        return _recorded(block, x, args, kwargs, inlined, fake=True)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise DependsOnValuesError(f"its forward decides by values of tensors ({error})") from error
    except Exception:  # a forward that fails on fake tensors may run on real ones
        if isinstance(x, FakeTensor):
            raise
        return _recorded(block, x, args, kwargs, inlined, fake=False)


def _recorded(
    block: nn.Module,
    x: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inlined: Collection[str],
    *,
    fake: bool,
) -> Recording:
    counted = [(m, name) for m in block.modules() for name in m._buffers]
    with ExitStack() as stack:
        stack.enter_context(statistics_kept(counted))
        stack.enter_context(_attributes_kept(block))
        stack.enter_context(torch.no_grad())
        if fake:
            stack.enter_context(fake_mode(x))
        x, args, kwargs = tree_map(_fresh, (x, tuple(args), dict(kwargs)))
        recorder = _Recorder(block, tensors_of(x, args, kwargs))
        stack.enter_context(recorder.watching(inlined))
        with recorder:
            output = type(block).forward(block, x, *args, **kwargs)
    return recorder.finished(output)


@contextmanager
def _attributes_kept(block: nn.Module) -> Iterator[None]:
    """Restore the attributes of modules, of which one may have kept a fake result for later."""
    before = [(vars(module), dict(vars(module))) for module in block.modules()]
    held = [v for _, attributes in before for v in attributes.values() if type(v) is dict]
    contents = [(kept, dict(kept)) for kept in held]
    try:
        yield
    finally:
        for now, then in (*before, *contents):
            for name in now.keys() - then.keys():
                del now[name]
            now.update(then)


@contextmanager
def fake_mode(x: Tensor) -> Iterator[None]:
    """Compute with shapes only, hidden from dispatch modes that count operators or tensors."""
    own = FakeTensorMode(allow_non_fake_inputs=True)
    with _disable_current_modes(), x.fake_mode if isinstance(x, FakeTensor) else own:
        yield


def fake_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the fake tensor for a tensor, in the fake mode of another one."""
    if isinstance(tensor, FakeTensor):
        return tensor
    assert isinstance(like, FakeTensor)
    fake: Tensor = like.fake_mode.from_tensor(tensor)
    return fake


def _fresh(leaf: Any) -> Any:
    # A new tensor object of the same kind, so that an argument that occurs twice is two inputs.
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_like(leaf) if leaf.is_floating_point() else leaf.detach()


def tensors_of(x: Tensor, args: Any, kwargs: Any) -> list[Tensor]:
    """List the tensors that a block is called with, the stream first."""
    return [x, *(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))]


class _Recorder(TorchFunctionMode):
    """Recorder of operators on tensors; a call of a module that is not inlined is one operator."""

    def __init__(self, block: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._block = block
        self._inputs = len(inputs)
        self._shapes: dict[Value, torch.Size] = {}
        self._operators: list[Operator] = []
        self._kept: list[Any] = []  # keeps tensors alive, so that Python reuses none of their ids
        self._depth = 0  # of nested calls of modules that are not looked into
        self._entered: list[tuple[Any, Any]] = []
        self._known: dict[int, Value | Own] = {}
        for module_name, module in block.named_modules():
            prefix = f"{module_name}." if module_name else ""
            held = (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
            for name, tensor in held:
                if isinstance(tensor, Tensor):
                    self._known.setdefault(id(tensor), Own(prefix + name))
        for tensor in inputs:
            self._new(tensor)

    @contextmanager
    def watching(self, inlined: Collection[str]) -> Iterator[None]:
        """Make each call of a module one operator, except calls of inlined modules."""
        with ExitStack() as stack:
            for name, module in self._block.named_modules():
                if module is self._block or name in inlined:
                    continue
                for hook in (
                    module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
                    module.register_forward_hook(self._leaver(name), with_kwargs=True),
                ):
                    stack.callback(hook.remove)
            yield

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        """Call an operator and record it."""
        kwargs = kwargs or {}
        if self._depth:
            return func(*args, **kwargs)
        before = self._noted(args, kwargs)
        out = func(*args, **kwargs)
        self._write(func, before, out)
        return out

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        if not self._depth:
            self._entered.append(self._noted(args, kwargs))
        self._depth += 1

    def _leaver(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
            self._depth -= 1
            if not self._depth:
                self._depth += 1  # `_write` asks tensors for shapes, which must not be recorded
                self._write(name, self._entered.pop(), output)
                self._depth -= 1

        return leave

    def _noted(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        with torch._C.DisableTorchFunction():
            leaves, structure = tree_flatten((args, kwargs))
            noted = [
                (leaf, self._reference(leaf), leaf._version) if isinstance(leaf, Tensor) else leaf
                for leaf in leaves
            ]
        return noted, structure

    def _write(self, function: Callable[..., Any] | str, before: tuple[Any, Any], out: Any) -> None:
        with torch._C.DisableTorchFunction():
            noted, structure = before
            tensors = {
                place: (leaf[0], leaf[1], leaf[0]._version != leaf[2])
                for place, leaf in enumerate(noted)
                if isinstance(leaf, tuple) and len(leaf) == 3 and isinstance(leaf[0], Tensor)
            }
            references = {id(t): (ref, changed) for t, ref, changed in tensors.values()}
            results, changed, same = {}, {}, {}
            for place, leaf in enumerate(tree_leaves(out)):
                if not isinstance(leaf, Tensor):
                    continue
                ref, touched = references.get(id(leaf), (None, True))
                results[place] = self._new(leaf)
                if not touched and isinstance(ref, Value):
                    same[results[place]] = ref
            returned = {id(leaf) for leaf in tree_leaves(out)}
            for place, (tensor, _, touched) in tensors.items():
                if touched and id(tensor) not in returned:
                    changed[place] = self._new(tensor)
            if not (results or changed):
                return
            arguments = tuple(
                tensors[place][1] if place in tensors else leaf for place, leaf in enumerate(noted)
            )
            self._kept.append(noted)
            self._operators.append(
                Operator(
                    function=function,
                    arguments=arguments,
                    structure=structure,
                    results=results,
                    changed=changed,
                    same=same,
                )
            )

    def _new(self, tensor: Tensor) -> Value:
        value = Value(len(self._shapes))
        self._shapes[value] = tensor.shape
        self._known[id(tensor)] = value
        self._kept.append(tensor)
        return value

    def _reference(self, tensor: Tensor) -> Value | Own | Unknown:
        return self._known.get(id(tensor)) or Unknown(tuple(tensor.shape))

    def finished(self, output: Any) -> Recording:
        """Return the recording, given what the forward returned."""
        leaves, structure = tree_flatten(output)
        made_by = {
            value: operator
            for operator in self._operators
            for value in (*operator.results.values(), *operator.changed.values())
        }
        return Recording(
            operators=tuple(self._operators),
            inputs=self._inputs,
            output=tuple(
                self._reference(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves
            ),
            structure=structure,
            shapes=self._shapes,
            made_by=made_by,
        )
