"""Families by pattern: blocks of classes that nobody has registered, known by what they do.

A block is run on a random input of a shape that its parts suggest, and its forward is recorded and
read as a chain of residual branches. That is then proved, in training mode and in eval mode, on
other random inputs and with random weights (a scale that starts at zero proves nothing): the
branches' sum is the block's own result, drawn with the same random numbers. How a branch can be cut
is proved likewise, by samples and by tokens. All of it happens on a copy, once for all blocks of
the same structure.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_unflatten

from re2tal.reversible.branches import (
    Branch,
    ChangesShapeError,
    Cut,
    Layout,
    NoFamilyError,
    NotReversibleError,
    Samples,
    Tokens,
    Whole,
)
from re2tal.reversible.containers import Rewired
from re2tal.reversible.families.recording import (
    DependsOnValuesError,
    Own,
    Recording,
    Value,
    fake_mode,
    fake_of,
    own_tensor,
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
from re2tal.reversible.replay import GeneratorStates, ReversibleError, uncached

_TOLERANCE = 1e-4
"""Largest error of the branches' sum, relative to what the block adds to its input."""

_DEPTH = 3
"""Levels of modules inside a block that are looked into for skip connections."""

_BATCH = 3
_MOST_TOKENS = 4096
_ATTEMPTS = 160
_READINGS = 2
"""Inputs that a block may take without being proved; another shape has seldom helped then."""


class UnprovedError(NotReversibleError):
    """A block that no family describes is not proved to be residual; the message says why."""


# The parts of this file that are asked at every forward.


def split(block: nn.Module) -> list[Branch]:
    """List the branches of a block of a class without a family.

    Raises:
        NotReversibleError: if it is not proved to be a chain of residual branches.
    """
    plan = _plan_of(block)
    return [_branch(plan, block, place) for place in range(len(plan.cuts))]


def returned(block: nn.Module, y: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return what the block's ``forward`` would for a result ``y``."""
    recording = _plan_of(block).forms(block, y, args, kwargs)[0]
    inputs = tensors_of(y, args, kwargs)

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Own):
            return own_tensor(block, leaf.name)
        if not isinstance(leaf, Value):
            return leaf
        number = recording.original(leaf).number
        return inputs[number] if 0 < number < recording.inputs else y

    return tree_unflatten(map(of, recording.output), recording.structure)


Forms = tuple[Recording, list[Residual]]


@dataclass(kw_only=True, slots=True)
class _Plan:
    """All that is known of the blocks of one structure.

    Attributes:
        inlined: names of the modules that recordings look into.
        proved: recording in eval mode, and in training mode.
        cuts: way to cut each branch into pieces: "tokens", "samples" or None.
        recorded: recordings for inputs met since, by shape and conditions.
        kept: elements that a unit keeps alive, likewise.
    """

    inlined: frozenset[str]
    proved: Mapping[bool, Forms]
    cuts: Sequence[str | None]
    recorded: dict[Any, Forms] = field(default_factory=dict)
    kept: dict[Any, int | None] = field(default_factory=dict)

    def forms(self, block: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Forms:
        """Find the recording for an input, or make it.

        Raises:
            ReversibleError: if the block does something else with it than with those of the proof.
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


_REMEMBERED = 256


def _conditions(block: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Any:
    """What a recording depends on, beside the block's structure."""
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


def _branch(plan: _Plan, block: nn.Module, place: int) -> Branch:
    _, found = plan.proved[block.training]
    residual = found[place]

    def function(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        recording, branches = plan.forms(block, x, args, kwargs)
        with _kernels(block):
            return branches[place].run(recording, block, tensors_of(x, args, kwargs))

    modules = [block.get_submodule(name) for name in residual.modules]
    held = _Held(block, residual.tensors)
    return Branch(
        _title(block, residual),
        (*modules, *([held] if residual.tensors else [])),
        function,
        activation=_activation(block, residual),
        drop_path=None if residual.drop_path is None else block.get_submodule(residual.drop_path),
        cut=_cut(plan, block, place, function),
    )


class _Held(nn.Module):
    """Tensors that a branch uses without the modules that hold them."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.training = block.training
        for name in names:
            tensor = own_tensor(block, name)
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name.replace(".", "_"), tensor)
            else:
                self.register_buffer(name.replace(".", "_"), tensor)


def _title(block: nn.Module, residual: Residual) -> str:
    """Name a branch by those of its modules that hold most parameters."""
    tops: dict[str, int] = {}
    for name in residual.modules:
        top = name.partition(".")[0]
        count = sum(p.numel() for p in block.get_submodule(name).parameters())
        tops[top] = tops.get(top, 0) + count
    largest = max(tops.values(), default=0)
    return ", ".join(top for top, count in tops.items() if count > largest / 4) or "branch"


def _activation(block: nn.Module, residual: Residual) -> Callable[[Tensor], Tensor] | None:
    operator = residual.activation
    if operator is None:
        return None

    module = block.get_submodule(operator.name) if isinstance(operator.function, str) else None
    in_place = operator.name.endswith("_") or getattr(module, "inplace", False)

    def activate(x: Tensor) -> Tensor:
        # A branch's result may be a view, which must not be overwritten.
        given = x.clone() if in_place else x
        result: Tensor = operator.call(block, lambda _: given)
        return result

    return activate


def _kernels(block: nn.Module) -> AbstractContextManager[None]:
    if any(isinstance(module, nn.MultiheadAttention) for module in block.modules()):
        return differentiable_path()
    return nullcontext()


# Cuts.


@dataclass(frozen=True, slots=True)
class _OnTokens(Tokens):
    """Vectors along the last dimension, of a branch that is called with nothing else."""

    residual: Residual
    block: nn.Module

    def run(
        self,
        branch: Any,  # noqa: ARG002
        piece: Tensor,
        start: int,  # noqa: ARG002
        stop: int,  # noqa: ARG002
        shared: Sequence[Tensor],  # noqa: ARG002
    ) -> Tensor:
        """Run the branch."""
        return self.residual.on_tokens(self.block, piece)


def _cut(plan: _Plan, block: nn.Module, place: int, function: Callable[..., Tensor]) -> Cut | None:
    def by_tokens(x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        x = _as_weights(block, x)
        residual = plan.forms(block, x, args, kwargs)[1][place]
        run = partial(residual.on_tokens, block)
        kept = _kept(plan, place, block, run, x, x.shape[-1:]) if residual.keeps_tokens else None
        if kept is None:
            return Whole(args, kwargs)
        return _OnTokens(args, kwargs, math.prod(x.shape[:-1]), kept, residual, block)

    def by_samples(x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        x = _as_weights(block, x)

        def run(sample: Tensor) -> Tensor:
            return function(sample, *args, **kwargs)

        kept = None if has_rows(x, args, kwargs) else _kept(plan, place, block, run, x, x.shape[1:])
        return Whole(args, kwargs) if kept is None else Samples(args, kwargs, x.shape[0], kept)

    return {"tokens": by_tokens, "samples": by_samples}.get(plan.cuts[place] or "")


def _as_weights(block: nn.Module, x: Tensor) -> Tensor:
    """Return a stream in the dtype in which the branch will meet it; its values do not matter."""
    largest = max(block.parameters(), key=Tensor.numel, default=x)
    return x if largest.dtype == x.dtype else torch.empty_like(x, dtype=largest.dtype)


def _kept(
    plan: _Plan,
    place: int,
    block: nn.Module,
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    unit: Sequence[int],
) -> int | None:
    """Count the elements that a unit keeps alive while a branch is differentiated.

    None means that this cannot be told.
    """
    key = place, tuple(unit), x.dtype, x.device, block.training
    if key not in plan.kept:
        try:
            saved = _saved(block, run, x, (1, *unit))
        except Exception:
            plan.kept[key] = None  # what does not run on fake tensors is not cut
        else:
            # Beside what is saved: the input, the result, a gradient of the largest in between.
            plan.kept[key] = saved * 5 // 4 + 3 * math.prod(unit)
    return plan.kept[key]


def _saved(
    block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, ...]
) -> int:
    """Count what autograd saves of a branch, on fake tensors: without its values and its time."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes() // tensor.element_size()
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    kind = x.device.type
    with fake_mode(x), torch.enable_grad(), torch.autocast(kind, enabled=False), uncached():
        leaf = torch.empty(shape, dtype=x.dtype, device=x.device, requires_grad=True)
        own = [fake_of(p, leaf).untyped_storage() for p in (*block.parameters(), *block.buffers())]
        with saved:
            run(leaf)
    for storage in own:
        storages.pop(storage._cdata, None)
    return sum(storages.values())


# The proof.

_PLANS: dict[Any, _Plan | NotReversibleError] = {}


def _plan_of(block: nn.Module) -> _Plan:
    """Find the plan for a block's structure, or prove one.

    Raises:
        NotReversibleError: if there is none.
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
    """Summarise all that a block's forward may decide by, but for its input and its weights."""
    found: list[Any] = []
    for name, module in block.named_modules():
        own = type(module).__module__.startswith("torch.nn.") or drops_path(module)
        found.append((name, type(module), *([] if own else [_settings(module)])))
        found.append(tuple(k for k, p in module._parameters.items() if p is not None))
        found.append(tuple(module._buffers))
    return tuple(found)


def _settings(module: nn.Module) -> Any:
    found = []
    for name, value in vars(module).items():
        if name in _NOT_SETTINGS or isinstance(value, Tensor):
            continue
        found.append((name, _summary(value)))
    return tuple(found)


_NOT_SETTINGS = {*vars(nn.Module()), "forward"}


def _summary(value: Any, depth: int = 2) -> Any:
    if isinstance(value, _Scalar):
        return value
    if isinstance(value, tuple | list) and depth:
        return tuple(_summary(v, depth - 1) for v in value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    inner = vars(value) if depth and hasattr(value, "__dict__") else {}
    return type(value).__qualname__, tuple((k, _summary(v, 0)) for k, v in inner.items())


def _proved_on_copy(block: nn.Module) -> _Plan:
    own = type(block).__module__.startswith("torch.nn.")
    own |= any(isinstance(module, Rewired) for module in block.modules())  # a part is reversible
    if own or type(block).forward in (nn.Sequential.forward, nn.Module.forward):
        raise NoFamilyError(f"no family is registered for {type(block).__name__}")
    with unset_fake_temporarily(), _generators_kept(_some_tensor(block)):
        try:
            scrambled = _scrambled(block)
        except Exception as error:
            raise UnprovedError(f"it cannot be copied to be tried out: {error}") from error
        with torch.autocast(_some_tensor(scrambled).device.type, enabled=False), _kernels(block):
            return _proved(scrambled)


def _some_tensor(block: nn.Module) -> Tensor:
    return next(block.parameters(), torch.empty(0))


@contextmanager
def _generators_kept(x: Tensor) -> Iterator[None]:
    """Leave PyTorch's generators as they are found."""
    if isinstance(x, FakeTensor):  # draws nothing
        yield
        return
    with GeneratorStates.now([x.device]).restored():
        yield


def _scrambled(block: nn.Module) -> nn.Module:
    """Copy a block without its hooks, with random weights and statistics in float32."""
    memo: dict[int, Any] = {}
    for tensor in (*block.parameters(), *block.buffers()):
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            real = torch.zeros(tensor.shape, dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(real) if isinstance(tensor, nn.Parameter) else real
    forward = vars(block).pop("forward", None)  # of a rewired block, which leads to its container
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


def _proved(block: nn.Module) -> _Plan:
    """Look for an input that a block takes and that shows what it is.

    Raises:
        NotReversibleError: with the reason that came closest.
    """
    reasons: list[tuple[int, NotReversibleError]] = []
    read = 0
    for count, (x, kwargs) in enumerate(_inputs(block)):
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
    if not reasons:
        raise UnprovedError("no shape of an input follows from its parts")
    closest = max(rank for rank, _ in reasons)
    raise next(error for rank, error in reasons if rank == closest)


def _not_run(error: Exception) -> str:
    first = [*str(error).strip().splitlines(), ""][0]
    return (
        "its forward did not run on any input that its parts suggest "
        f"({type(error).__name__}: {first})"
    )


def _output(result: Any) -> Any:
    leaves, _ = tree_flatten(result)
    return leaves[0] if leaves else None


def _changed(
    block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], message: str
) -> NotReversibleError:
    """Describe a block that changes the shape; one with a skip connection may be recomputed."""
    try:
        recording = record(block, x, (), kwargs, _inlined(block, 2))
    except Exception:
        return UnprovedError(message)
    results = [leaf for leaf in recording.output if isinstance(leaf, Value)]
    if len(results) == 1 and ends_in_sum(recording, block, results[0]):
        return ChangesShapeError(message)
    return UnprovedError(message)


def _inlined(block: nn.Module, level: int) -> frozenset[str]:
    """Name the modules that are looked into: those above a level that are no basic layers."""
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


def _plan_for(block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], level: int) -> _Plan:
    """Prove that a block is a chain of branches on inputs of one shape.

    Raises:
        NotResidualError: if its forward cannot be read as one.
        NotReversibleError: if that is not what it computes.
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
    return _Plan(inlined=inlined, proved=proved, cuts=cuts)


def _check(block: nn.Module, forms: Forms, x: Tensor, kwargs: Mapping[str, Any]) -> None:
    """Compare the branches' sum with the block itself, with the same random numbers.

    Raises:
        NotReversibleError: if they differ.
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
            f"{', '.join(_title(block, residual) for residual in found)}: on a random input in "
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
    """Add one branch to a stream, as the engine would with alpha = 1 and beta = 0."""
    result = residual.run(recording, block, tensors_of(x, (), kwargs))
    if residual.drop_path is not None:
        factor = block.get_submodule(residual.drop_path)(x.new_ones(x.shape[0], 1))
        result = result * factor.view(-1, *(1,) * (x.dim() - 1))
    y, activation = x + result, _activation(block, residual)
    return y if activation is None else activation(y)


def _way_to_cut(
    block: nn.Module,
    proved: Mapping[bool, Forms],
    place: int,
    x: Tensor,
    kwargs: Mapping[str, Any],
    inlined: frozenset[str],
) -> str | None:
    """Find out whether a branch treats all tokens alike, or all samples."""
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
    except Exception:
        return False
    return found.shape == wanted.shape and bool(
        (found - wanted).norm() <= _TOLERANCE * wanted.norm()
    )


# Inputs to try.

_GRIDS = ("thw", "feat_size", "hw_shape", "input_dimensions", "spatial_shape", "size")
_HEIGHTS, _WIDTHS = ("H", "Hp", "h", "height"), ("W", "Wp", "w", "width")
_PIXELS = ("resolution",)
_ROTARY = ("position_embeddings", "rotary_pos_emb", "rotary_embeddings")


def _inputs(block: nn.Module) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Make inputs of the shapes that the parts of a block suggest, with its other arguments."""
    like = _some_tensor(block)
    generator = torch.Generator(like.device).manual_seed(0)
    _, _, *others = inspect.signature(type(block).forward).parameters.values()
    needed = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = [p.name for p in others if p.name in (*_ROTARY, *_PIXELS) and p.name not in needed]
    seen = set[tuple[int, ...]]()
    for shape, grid in _shapes(block):
        if shape in seen or math.prod(shape[1:]) > 2**22:
            continue
        seen.add(shape)
        x = torch.randn(shape, generator=generator, device=like.device)
        given = {name: _argument(name, grid) for name in needed}
        yield x, given
        if wanted:  # its forward may need them, whatever its signature says
            yield x, given | {name: _optional(block, name, x, grid) for name in wanted}


def _optional(block: nn.Module, name: str, x: Tensor, grid: tuple[int, ...]) -> Any:
    if name in _PIXELS:
        patch = vars(block).get("patch_size", 1)
        return tuple(length * patch for length in grid)
    widths = (vars(module).get("head_dim") for module in block.modules())
    width: int = next((w for w in widths if isinstance(w, int)), x.shape[-1])
    angles = torch.linspace(0, 3, x.shape[1] * width, device=x.device).view(x.shape[1], width)
    return angles.cos(), angles.sin()


def _argument(name: str, grid: tuple[int, ...]) -> Any:
    if name in _GRIDS:
        return grid
    if name in _HEIGHTS or name in _WIDTHS:
        return grid[-2 if name in _HEIGHTS else -1]
    return None


def _shapes(block: nn.Module) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """List shapes to try, each with its grid of tokens, the likely ones first."""
    planes, volumes = _convolves(block, nn.Conv2d), _convolves(block, nn.Conv3d)
    widths = _widths(block)
    grids = _grids(block)
    lengths = _lengths(block)
    for c in widths:
        for t, (h, w) in product((2, 4) if volumes else (), grids[:3]):
            yield (_BATCH, c, t, h, w), (t, h, w)
            yield (_BATCH, t, h, w, c), (t, h, w)
    kinds = ["channels first", "tokens", "channels last"]
    norms = [m for m in block.modules() if isinstance(m, nn.LayerNorm)]
    if not planes or norms:
        kinds = ["tokens", "channels last", "channels first"]
    for c, kind, (h, w) in product(widths, kinds, grids):
        if kind == "tokens":
            yield (_BATCH, h * w, c), (h, w)
            yield (_BATCH, h * w + 1, c), (h, w)
        else:
            yield (_BATCH, *((c, h, w) if kind == "channels first" else (h, w, c))), (h, w)
    for c, n in product(widths, lengths):
        yield (_BATCH, n, c), (n, 1)
    for c in widths:
        yield (_BATCH, c), (1, 1)


def _convolves(block: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(m, kind) for m in block.modules())


def _widths(block: nn.Module) -> list[int]:
    """Numbers of channels that its first layers take."""
    found: list[int] = []
    for module in block.modules():
        for name in ("normalized_shape", "num_features", "num_channels", "in_channels"):
            value = getattr(module, name, None)
            if isinstance(value, tuple) and value:
                value = value[-1]
            if isinstance(value, int):
                found.append(value)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            found.append(module.in_features)
        found += [p.numel() for p in module._parameters.values() if p is not None and p.dim() == 1]
    return list(dict.fromkeys(found))[:4]


def _grids(block: nn.Module) -> list[tuple[int, int]]:
    """Grids of tokens, of its own settings first."""
    found: list[tuple[int, int]] = []
    for module in block.modules():
        for name, value in vars(module).items():
            if not any(word in name for word in ("resolution", "window", "size", "shape")):
                continue
            pair = (value, value) if type(value) is int else value
            if (
                isinstance(pair, tuple | list)
                and len(pair) == 2
                and all(type(v) is int for v in pair)
            ):
                found.append((pair[0], pair[1]))
    found = sorted({g for g in found if 4 <= math.prod(g) <= _MOST_TOKENS}, key=math.prod)
    return list(dict.fromkeys([*found[::-1][:3], (8, 6), (8, 8), (7, 7), *found, (14, 14)]))


def _lengths(block: nn.Module) -> list[int]:
    """Numbers of tokens, from shapes of weights: mixers, and tables of positions."""
    held = (*block.parameters(), *block.buffers())
    return sorted({n for t in held if t.dim() > 1 for n in t.shape if 1 < n <= _MOST_TOKENS})[:40]
