"""Proof that a block of a class without a family is a chain of residual branches.

1. A copy of the block gets random weights: a scale that is initialised to zero would hide a branch.
2. It runs on a random input of a shape that its parts suggest. Its forward is recorded and read as
   a chain ``x + F_1(x)``, ``... + F_2(...)``.
3. In training and in eval mode the chain is compared with the block's own result on another random
   input, with the same random numbers. The two must agree to 1e-4 of what the block adds.
4. Each branch is run on a few tokens, and on one sample, to find out whether it can be cut.

This is done once for all blocks of the same structure. The result is a `Plan`.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_flatten

from re2tal.reversible.branches import (
    ChangesShapeError,
    NoFamilyError,
    NotReversibleError,
)
from re2tal.reversible.containers import Rewired
from re2tal.reversible.families.example_inputs import example_inputs
from re2tal.reversible.families.recording import (
    DependsOnValuesError,
    Recording,
    Value,
    record,
    tensors_of,
)
from re2tal.reversible.families.residual import (
    NotResidualError,
    Residual,
    drops_path,
    ends_in_sum,
    residuals,
)
from re2tal.reversible.families.vit import differentiable_path, has_rows
from re2tal.reversible.replay import GeneratorStates, ReversibleError

_LOG = logging.getLogger(__name__)

_TOLERANCE = 1e-4
"""Largest error of the chain, relative to what the block adds to its input."""

_DEPTH = 3
"""Levels of nested modules in which skip connections are searched."""

_ATTEMPTS = 160
"""Largest number of inputs to try."""

_READINGS = 2
"""Number of inputs that run without leading to a proof, after which the search ends: another shape
has seldom helped then."""

_REMEMBERED = 256
"""Largest number of recordings that a plan keeps."""


class UnprovedError(NotReversibleError):
    """No proof was found that a block is a chain of residual branches; the message says why."""


Forms = tuple[Recording, list[Residual]]


@dataclass(kw_only=True, slots=True)
class Plan:
    """Branches of all blocks of one structure, as proved, and recordings for later inputs.

    Attributes:
        inlined: names of the modules that recordings look into.
        proved: recording and branches by mode: False for eval, True for training.
        cuts: way to cut each branch into pieces: "tokens", "samples" or None.
        recorded: recordings and branches for inputs met since, by shape and other conditions.
        kept: number of elements that a unit keeps alive, by branch, unit's shape and conditions.
    """

    inlined: frozenset[str]
    proved: Mapping[bool, Forms]
    cuts: Sequence[str | None]
    recorded: dict[Any, Forms] = field(default_factory=dict)
    kept: dict[Any, int | None] = field(default_factory=dict)

    def forms(self, block: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Forms:
        """Return the recording and the branches for an input; record the forward if it is new.

        Raises:
            ReversibleError: if the forward for this input has other branches than in the proof.
        """
        key = _conditions(block, x, args, kwargs)
        if key not in self.recorded:
            with _generators_kept(x):
                recording = record(block, x, args, kwargs, self.inlined)
            try:
                found = residuals(recording, block)
            except NotResidualError as error:
                raise ReversibleError(
                    f"A {type(block).__name__} called with {tuple(x.shape)} is not the chain of "
                    f"branches that it was with random inputs: {error}. Call unwire(model)."
                ) from error
            if len(found) != len(self.cuts):
                raise ReversibleError(
                    f"A {type(block).__name__} called with {tuple(x.shape)} has {len(found)} "
                    f"branches, and had {len(self.cuts)} with random inputs. Call unwire(model)."
                )
            if len(self.recorded) >= _REMEMBERED:
                self.recorded.pop(next(iter(self.recorded)))
            self.recorded[key] = recording, found
        return self.recorded[key]


def _conditions(block: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Any:
    """Return everything that a recording depends on, except the block's structure."""
    leaves, structure = tree_flatten((args, kwargs))
    given = tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else _plain(leaf) for leaf in leaves
    )
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    modes = tuple(module.training for module in block.modules())
    return x.shape, x.dtype, x.device, cast, modes, given, str(structure)


def _plain(leaf: Any) -> Any:
    return leaf if isinstance(leaf, int | float | bool | str | None) else id(leaf)


def title_of(block: nn.Module, residual: Residual) -> str:
    """Name a branch by its modules with the most parameters."""
    tops: dict[str, int] = {}
    for name in residual.modules:
        top = name.partition(".")[0]
        count = sum(p.numel() for p in block.get_submodule(name).parameters())
        tops[top] = tops.get(top, 0) + count
    largest = max(tops.values(), default=0)
    return ", ".join(top for top, count in tops.items() if count > largest / 4) or "branch"


def activation_of(block: nn.Module, residual: Residual) -> Callable[[Tensor], Tensor] | None:
    """Return the activation that a block applies after adding a branch; None if there is none."""
    operator = residual.activation
    if operator is None:
        return None

    module = block.get_submodule(operator.name) if isinstance(operator.function, str) else None
    in_place = operator.name.endswith("_") or getattr(module, "inplace", False)

    def activate(x: Tensor) -> Tensor:
        # An in-place activation gets a copy: the branch's result may be a view of something else.
        given = x.clone() if in_place else x
        result: Tensor = operator.call(block, lambda _: given)
        return result

    return activate


def differentiable_kernels(block: nn.Module) -> AbstractContextManager[None]:
    """Disable the inference fast path of `nn.MultiheadAttention` if the block contains one."""
    if any(isinstance(module, nn.MultiheadAttention) for module in block.modules()):
        return differentiable_path()
    return nullcontext()


_PLANS: dict[Any, Plan | NotReversibleError] = {}


def plan_of(block: nn.Module) -> Plan:
    """Return the plan of a block's structure; search and prove it at the first call.

    Raises:
        NotReversibleError: if no plan can be proved.
    """
    structure = _structure(block)
    if structure not in _PLANS:
        try:
            _PLANS[structure] = _proved_on_copy(block)
        except NotReversibleError as error:
            _PLANS[structure] = error
    plan = _PLANS[structure]
    if isinstance(plan, NotReversibleError):
        raise type(plan)(*plan.args)
    return plan


_Scalar = (int, float, bool, str, type(None))


def _structure(block: nn.Module) -> Any:
    """Summarise everything that may steer a block's forward, except its input and its weights."""
    found: list[Any] = []
    for name, module in block.named_modules():
        own = type(module).__module__.startswith("torch.nn.") or drops_path(module)
        found.append((name, type(module), *([] if own else [_settings(module)])))
        found.append(tuple(k for k, p in module._parameters.items() if p is not None))
        found.append(tuple(module._buffers))
    return tuple(found)


_NOT_SETTINGS = {*vars(nn.Module()), "forward"}


def _settings(module: nn.Module) -> Any:
    found = []
    for name, value in vars(module).items():
        if name in _NOT_SETTINGS or isinstance(value, Tensor):
            continue
        found.append((name, _summary(value)))
    return tuple(found)


def _summary(value: Any, depth: int = 2) -> Any:
    if isinstance(value, _Scalar):
        return value
    if isinstance(value, tuple | list) and depth:
        return tuple(_summary(v, depth - 1) for v in value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    inner = vars(value) if depth and hasattr(value, "__dict__") else {}
    return type(value).__qualname__, tuple((k, _summary(v, 0)) for k, v in inner.items())


def _proved_on_copy(block: nn.Module) -> Plan:
    own = type(block).__module__.startswith("torch.nn.")
    # Nor is a block tried out of which a part is already reversible.
    own |= any(isinstance(module, Rewired) for module in block.modules())
    if own or type(block).forward in (nn.Sequential.forward, nn.Module.forward):
        raise NoFamilyError(f"no family is registered for {type(block).__name__}")
    with unset_fake_temporarily(), _generators_kept(_some_tensor(block)):
        try:
            scrambled = _scrambled(block)
        except Exception as error:
            raise UnprovedError(f"it cannot be copied to be tried out: {error}") from error
        with (
            torch.autocast(_some_tensor(scrambled).device.type, enabled=False),
            differentiable_kernels(block),
        ):
            return _proved(scrambled)


def _some_tensor(block: nn.Module) -> Tensor:
    return next(block.parameters(), torch.empty(0))


@contextmanager
def _generators_kept(x: Tensor) -> Iterator[None]:
    """Restore PyTorch's generators after a block of code."""
    if isinstance(x, FakeTensor):  # fake tensors draw nothing
        yield
        return
    with GeneratorStates.now([x.device]).restored():
        yield


def _scrambled(block: nn.Module) -> nn.Module:
    """Copy a block without its hooks, in float32, with random weights and running statistics."""
    memo: dict[int, Any] = {}
    for tensor in (*block.parameters(), *block.buffers()):
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            real = torch.zeros(tensor.shape, dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(real) if isinstance(tensor, nn.Parameter) else real
    # The forward of a rewired block refers to its container, which deepcopy would copy as well.
    forward = vars(block).pop("forward", None)
    try:
        copied = copy.deepcopy(block, memo)
    finally:
        if forward is not None:
            vars(block)["forward"] = forward
    for module in copied.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks"):
                hooks.clear()
    copied = copied.float().requires_grad_(True)
    with torch.no_grad():
        for parameter in copied.parameters():
            # Weights keep the variance of their input (1 / fan-in). Scales and biases are near 1,
            # so that none switches a branch off.
            if parameter.dim() > 1:
                parameter.normal_(0, min(1.0, parameter[0].numel() ** -0.5))
            else:
                parameter.normal_(1.0, 0.3)
        for module in copied.modules():
            mean, var = (module._buffers.get(f"running_{name}") for name in ("mean", "var"))
            if mean is not None and var is not None:
                mean.normal_()
                var.uniform_(0.5, 2)
    return copied


def _proved(block: nn.Module) -> Plan:
    """Search an input that the block accepts and on which it can be proved to be a chain.

    Raises:
        NotReversibleError: if there is none, with the reason of the attempt that got furthest.
    """
    # Each reason with how far its attempt got: 0 did not run, 1 no tensor, 2 another shape, 3 no
    # chain of sums, 4 a chain that is not the block's function.
    reasons: list[tuple[int, NotReversibleError]] = []
    read = 0
    for count, (x, kwargs) in enumerate(example_inputs(block)):
        if count == _ATTEMPTS or read == _READINGS:
            break
        try:
            y = _output(block.eval()(x, **kwargs))
        except Exception as error:
            reasons.append((0, UnprovedError(_not_run(error))))
            continue
        if not isinstance(y, Tensor) or not y.is_floating_point():
            reasons.append((1, UnprovedError("its forward does not return a tensor first")))
        elif y.shape != x.shape:
            shapes = f"{tuple(x.shape)} into {tuple(y.shape)}"
            reasons.append((2, _changed(block, x, kwargs, f"it turns {shapes}")))
        else:
            read += 1
            for level in range(1, _DEPTH + 1):
                try:
                    return _plan_for(block, x, kwargs, level)
                except NotResidualError as error:
                    reasons.append((3, UnprovedError(str(error))))
                except NotReversibleError as error:
                    reasons.append((4, error))
                except DependsOnValuesError as error:
                    reasons.append((4, UnprovedError(str(error))))
                except Exception as error:  # such as a block that keeps results for its next call
                    _LOG.debug("%s cannot be tried out: %s", type(block).__name__, error)
                    reasons.append((4, UnprovedError(_not_apart(error))))
    if not reasons:
        raise UnprovedError("no shape of an input follows from its parts")
    closest = max(rank for rank, _ in reasons)
    raise next(error for rank, error in reasons if rank == closest)


def _not_run(error: Exception) -> str:
    return f"its forward did not run on any input that its parts suggest ({_first_line(error)})"


def _not_apart(error: Exception) -> str:
    return f"its forward did not run in parts ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {[*str(error).strip().splitlines(), ''][0]}"


def _output(result: Any) -> Any:
    leaves, _ = tree_flatten(result)
    return leaves[0] if leaves else None


def _changed(
    block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], message: str
) -> NotReversibleError:
    """Make the error for a block that changes the shape of its input.

    If the block ends in a sum, as one with a skip connection does, it is a `ChangesShapeError`, and
    `rewire` recomputes the block.
    """
    try:
        recording = record(block, x, (), kwargs, _inlined(block, 2))
    except Exception as error:  # then only its shapes are known
        _LOG.debug("%s cannot be recorded: %s", type(block).__name__, error)
        return UnprovedError(message)
    results = [leaf for leaf in recording.output if isinstance(leaf, Value)]
    if len(results) == 1 and ends_in_sum(recording, block, results[0]):
        return ChangesShapeError(message)
    return UnprovedError(message)


def _inlined(block: nn.Module, level: int) -> frozenset[str]:
    """Name the modules to look into: those above a level of nesting, except basic layers."""
    return frozenset(
        name
        for name, module in block.named_modules()
        if name
        and name.count(".") < level - 1
        and not drops_path(module)
        and (
            isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn.")
        )
    )


def _plan_for(block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], level: int) -> Plan:
    """Prove that a block is a chain of branches on inputs of one shape.

    Raises:
        NotResidualError: if its forward cannot be read as a chain.
        NotReversibleError: if the chain does not compute the block's function.
    """
    inlined = _inlined(block, level)
    proved: dict[bool, Forms] = {}
    for training in (False, True):
        block.train(training)
        recording = record(block, x, (), kwargs, inlined)
        proved[training] = recording, residuals(recording, block)
        _check(block, proved[training], torch.randn_like(x), kwargs)
    if len(proved[False][1]) != len(proved[True][1]):
        raise UnprovedError("its forward has other branches in training mode than in eval mode")
    block.eval()
    places = range(len(proved[True][1]))
    cuts = [_way_to_cut(block, proved, place, x, kwargs, inlined) for place in places]
    return Plan(inlined=inlined, proved=proved, cuts=cuts)


def _check(block: nn.Module, forms: Forms, x: Tensor, kwargs: Mapping[str, Any]) -> None:
    """Compare the chain of branches with the block itself, with the same random numbers.

    Raises:
        NotReversibleError: if ``||chain - block(x)|| > 1e-4 ||block(x) - x||``.
    """
    recording, found = forms
    start = GeneratorStates.now([x.device])
    given = x.clone()
    with torch.no_grad():
        with start.restored():
            truth = _output(block(given, **kwargs))
        if not torch.equal(given, x):
            raise UnprovedError("its forward modifies its input in place")
        with start.restored():
            y = x
            for residual in found:
                y = _after(block, recording, residual, y, kwargs)
    added, error = (truth - x).norm(), (truth - y).norm()
    if not error <= _TOLERANCE * added:
        raise UnprovedError(
            "its forward is not the sum of its branches "
            f"{', '.join(title_of(block, residual) for residual in found)}: on a random input in "
            f"{'training' if block.training else 'eval'} mode they differ by "
            f"{float(error / added):.1e} of what it adds"
        )


def _after(
    block: nn.Module,
    recording: Recording,
    residual: Residual,
    x: Tensor,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """Compute ``a(x + F(x))``, as the engine does with alpha = 1 and beta = 0."""
    result = residual.run(recording, block, tensors_of(x, (), kwargs))
    if residual.drop_path is not None:
        factor = block.get_submodule(residual.drop_path)(x.new_ones(x.shape[0], 1))
        result = result * factor.view(-1, *(1,) * (x.dim() - 1))
    y, activation = x + result, activation_of(block, residual)
    return y if activation is None else activation(y)


def _way_to_cut(
    block: nn.Module,
    proved: Mapping[bool, Forms],
    place: int,
    x: Tensor,
    kwargs: Mapping[str, Any],
    inlined: frozenset[str],
) -> str | None:
    """Test whether a branch treats tokens independently, or samples, or neither (None)."""
    recording, found = proved[False]
    residual = found[place]
    with torch.no_grad():
        whole = residual.run(recording, block, tensors_of(x, (), kwargs))
        drops = [
            n for n in residual.modules if any(map(drops_path, block.get_submodule(n).modules()))
        ]
        if all(forms[1][place].keeps_tokens for forms in proved.values()) and not drops:
            tokens, wanted = (t.reshape(-1, x.shape[-1])[1:6] for t in (x, whole))
            if _agrees(partial(residual.on_tokens, block), tokens, wanted):
                return "tokens"
        if has_rows(x, (), kwargs):
            return None

        def one(sample: Tensor) -> Tensor:
            alone = record(block, sample, (), kwargs, inlined)
            return residuals(alone, block)[place].run(alone, block, tensors_of(sample, (), kwargs))

        return "samples" if _agrees(one, x[1:2], whole[1:2]) else None


def _agrees(run: Callable[[Tensor], Tensor], x: Tensor, wanted: Tensor) -> bool:
    try:
        found = run(x)
    except Exception as error:  # a branch that cannot run on a part of its input is not cut
        _LOG.debug("A branch does not run on %s: %s", tuple(x.shape), error)
        return False
    return found.shape == wanted.shape and bool(
        (found - wanted).norm() <= _TOLERANCE * wanted.norm()
    )
