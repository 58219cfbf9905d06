"""Skip connections in a recorded forward: a block read as a chain ``x <- a(x + F(x))``.

The search goes back from the block's result. A sum ``x + y`` whose term ``y`` was computed from
``x`` alone is one residual branch, whatever the order of norms, attention, scales and stochastic
depth inside; the search goes on at ``x``. This covers pre-norm and post-norm transformers,
attention and MLP side by side, and convolutional blocks with or without an activation after the
addition.

A block that scales its skip connection, ``s(x) + F(x)``, is read as ``x + (F(x) + s(x) - x)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from re2tal.reversible.families.recording import (
    STREAM,
    Operator,
    Own,
    Program,
    Recording,
    Unknown,
    Value,
)

_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"}
_TRANSPOSES = {"transpose", "swapaxes", "permute"}
_PRODUCTS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}
_ACTIVATIONS = {"relu", "relu_", "relu6", "gelu", "silu", "hardswish", "leaky_relu", "tanh"}
_ACTIVATING = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Tanh)


class NotResidualError(ValueError):
    """A forward is not a chain of residual branches; the message says why."""


def drops_path(module: nn.Module) -> bool:
    """Tell by its name whether a module is stochastic depth: each library has its own class."""
    name = type(module).__name__
    return "DropPath" in name or "StochasticDepth" in name


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """One branch of a recorded forward, with the shape in which the block adds it.

    Attributes:
        program: program from the branch's input to the terms that are added. If the block scales
            its skip connection, the scaled one is the last result.
        scaled: whether the block scales its skip connection.
        before: operators that reshape a stream to the input of the program.
        moves: operators that reshape a stream to the shape of the sum.
        drop_path: name of the stochastic depth module at the branch's end, which the program skips.
        activation: operator after the addition.
    """

    program: Program
    scaled: bool
    before: tuple[Operator, ...]
    moves: tuple[Operator, ...]
    drop_path: str | None
    activation: Operator | None

    @property
    def modules(self) -> list[str]:
        """Names of the modules that the branch calls, in order."""
        return list(
            dict.fromkeys(o.function for o in self.program.called if isinstance(o.function, str))
        )

    @property
    def tensors(self) -> list[str]:
        """Names of the block's tensors that the branch uses without calling their module."""
        return list(
            dict.fromkeys(u.name for o in self.program.called for u in o.uses if isinstance(u, Own))
        )

    @property
    def keeps_tokens(self) -> bool:
        """Tell whether all tokens may be treated independently, to be tested with `on_tokens`."""
        alike = all(move.name in _RESHAPES for move in self.moves)
        return alike and self.before == self.moves and not self.scaled and not self.borrows

    @property
    def borrows(self) -> bool:
        """Tell whether the branch uses arguments of the block other than the stream."""
        return bool(self.program.leaves - {self.program.source})

    def run(self, recording: Recording, block: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """Compute the branch in the shape of the stream, which is the first of the inputs."""
        source = skipped = _formatted(inputs[0], inputs[0])
        for move in self.before:
            source = _moved(move, source)
        for move in self.moves if self.scaled else ():
            skipped = _moved(move, skipped)
        added = self.program.run(block, source, inputs)
        # With a scaled skip connection s(x), the last term, the branch is F(x) + s(x) - x.
        result = _sum([*added[:-1], added[-1] - skipped] if self.scaled else added)
        for move in reversed(self.moves):
            result = _moved_back(move, result, recording.shapes[move.values[0]])
        return _formatted(result, inputs[0])

    def on_tokens(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Compute the branch for some tokens, ``(n, C)``."""
        return _sum(self.program.run(block, tokens))


def _sum(terms: Sequence[Tensor]) -> Tensor:
    first, *others = terms
    for other in others:
        first = first + other
    return first


def _formatted(x: Tensor, stream: Tensor) -> Tensor:
    """Give a tensor, and its gradient, the memory format of a stream.

    PyTorch chooses kernels by it. A rebuilt stream has the format of its stage's input, whatever a
    block has transposed in between.
    """
    kind = torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(stream.dim())
    if last is not None and not stream.is_contiguous() and stream.is_contiguous(memory_format=last):
        kind = last
    result: Tensor = _Format.apply(x, kind)
    return result


class _Format(torch.autograd.Function):
    """Identity in another memory format, for the tensor and for its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kind: torch.memory_format) -> Tensor:
        return x.contiguous(memory_format=kind).view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        _, ctx.kind = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].contiguous(memory_format=ctx.kind), None


def _moved(move: Operator, x: Tensor) -> Tensor:
    result: Tensor = move.call(nn.Module(), lambda _: x)
    return result


def _moved_back(move: Operator, x: Tensor, shape: torch.Size) -> Tensor:
    if move.name in _RESHAPES:
        return x.reshape(shape)
    if move.name == "permute":
        order = [a % x.dim() for a in move.arguments if isinstance(a, int)]
        return x.permute(sorted(range(x.dim()), key=order.__getitem__))
    return _moved(move, x)  # two axes are swapped


def residuals(recording: Recording, block: nn.Module) -> list[Residual]:
    """List the residual branches of a forward, in the order in which the block applies them.

    Raises:
        NotResidualError: if the forward is not a chain of them.
    """
    outputs = [leaf for leaf in recording.output if isinstance(leaf, Value)]
    if not outputs:
        raise NotResidualError("its forward returns nothing that it has computed")
    result, *others = outputs
    if any(recording.original(other).number >= recording.inputs for other in others):
        raise NotResidualError("its forward returns more than one tensor that it has computed")
    if recording.shapes[result] != recording.shapes[STREAM]:
        raise NotResidualError("its forward changes the shape")
    found = _Chain(recording, block).back_from(result)
    if not found:
        raise NotResidualError("its forward returns its input")
    for residual in found:
        for operator in residual.program.operators:
            _refuse_unknown(operator)
    return found


def _refuse_unknown(operator: Operator) -> None:
    for used in operator.uses:
        if isinstance(used, Unknown):
            raise NotResidualError(
                f"its forward uses a tensor of shape {used.shape} that is no argument, parameter "
                "or buffer, and that no operator seen has made"
            )


def ends_in_sum(recording: Recording, block: nn.Module, value: Value) -> bool:
    """Tell whether a value is a sum of two others of its shape, or an activation of such a sum."""
    return _Chain(recording, block).ends_in_sum(value)


class _Chain:
    """Search of the chain, from the result back to the input, with its partial results."""

    def __init__(self, recording: Recording, block: nn.Module) -> None:
        self._recording = recording
        self._block = block
        self._found: dict[Value, list[Residual] | NotResidualError] = {}

    def back_from(self, value: Value) -> list[Residual]:
        """Find the branches between the input and a value.

        Raises:
            NotResidualError: if the value is not the end of a chain.
        """
        if value not in self._found:
            try:
                self._found[value] = self._search(value)
            except NotResidualError as error:
                self._found[value] = error
        found = self._found[value]
        if isinstance(found, NotResidualError):
            raise found
        return found

    def ends_in_sum(self, value: Value) -> bool:
        """Tell whether a value is a sum of two others, or an activation of such a sum."""
        value, _ = self._before_moves(value)
        made = self._recording.made_by.get(value)
        if made is not None and self._activates(made):
            value = self._recording.original(made.values[0])
        return self._terms(value) is not None

    def _search(self, value: Value) -> list[Residual]:
        value, _ = self._before_moves(value)
        if value == STREAM:
            return []
        made = self._recording.made_by.get(value)
        if made is None:
            raise NotResidualError("its result is one of its other arguments")
        activation = None
        if self._activates(made):
            activation, before = made, self._recording.original(made.values[0])
            if before in self._recording.made_by:
                made, value = self._recording.made_by[before], before
        if made.name not in _SUMS or self._terms(value) is None:
            _refuse_unknown(made)
            raise NotResidualError(
                f"its forward is not a sum of its input and a branch, but ends in {_title(made)}"
            )
        reason = None
        for skipped, scale, terms in self._readings(value):
            try:
                return self._with(skipped, scale, terms, activation)
            except NotResidualError as error:
                reason = reason or error
        raise reason or NotResidualError("its forward has no skip connection")

    def _with(
        self, skipped: Value, scale: Value | None, terms: list[Value], activation: Operator | None
    ) -> list[Residual]:
        """Read a sum as a skip connection, scaled or not, and the terms of one branch.

        Raises:
            NotResidualError: if the terms depend on more than the skipped value.
        """
        base, moves = self._before_moves(skipped)
        earlier = self.back_from(base)
        done = earlier[-1].moves if earlier else ()
        whole = (*done, *moves)
        drop_path = self._drop_path(terms[0]) if len(terms) == 1 else None
        # The branch starts from the skipped value, or from what that was reshaped from.
        for source, before in ((self._recording.original(skipped), whole), (base, done)):
            skip = [] if drop_path is None else [drop_path]
            results = terms if scale is None else [*terms, scale]
            program = Program(self._recording, results, source, skip)
            if source == STREAM or STREAM not in program.leaves:
                branch = Residual(
                    program=program,
                    scaled=scale is not None,
                    before=before,
                    moves=whole,
                    drop_path=None if drop_path is None else str(drop_path.function),
                    activation=activation,
                )
                return [*earlier, branch]
        raise NotResidualError(
            "its forward is not a chain of skip connections: one part of a sum uses what came "
            "before the other"
        )

    def _readings(self, value: Value) -> list[tuple[Value, Value | None, list[Value]]]:
        """List the ways to read a sum: skipped value, its scaled form if any, and other terms."""
        pair = self._terms(value)
        assert pair is not None
        a, b = pair
        readings: list[tuple[Value, Value | None, list[Value]]] = [(a, None, [b]), (b, None, [a])]
        every = self._all_terms(value)
        for place, term in enumerate(every):
            others = every[:place] + every[place + 1 :]
            if len(every) > 2:
                readings.append((term, None, others))
            unscaled = self._unscaled(term)
            if unscaled is not None:
                readings.append((unscaled, term, others))
        return readings

    def _terms(self, value: Value) -> tuple[Value, Value] | None:
        """Return both terms if a value is a sum of two values of its own shape."""
        made = self._recording.made_by.get(self._recording.original(value))
        if made is None or made.name not in _SUMS or len(made.values) != 2:
            return None
        a, b = made.values
        shapes = self._recording.shapes
        # A third argument is a factor, add(a, b, alpha=2); other shapes are broadcast.
        if len(made.arguments) != 2 or not shapes[a] == shapes[b] == shapes[value]:
            return None
        return a, b

    def _all_terms(self, value: Value) -> list[Value]:
        pair = self._terms(value)
        return [value] if pair is None else [t for part in pair for t in self._all_terms(part)]

    def _before_moves(self, value: Value) -> tuple[Value, tuple[Operator, ...]]:
        """Follow a value back over reshaping and transposing; return its origin and these moves."""
        moves: list[Operator] = []
        value = self._recording.original(value)
        while (made := self._recording.made_by.get(value)) is not None:
            if made.name not in _RESHAPES | _TRANSPOSES or len(made.uses) != 1 or not made.values:
                break
            moves.insert(0, made)
            value = self._recording.original(made.values[0])
        return value, tuple(moves)

    def _activates(self, made: Operator) -> bool:
        if len(made.values) != 1 or len(made.uses) != 1:
            return False
        if isinstance(made.function, str):
            return isinstance(self._block.get_submodule(made.function), _ACTIVATING)
        return made.name in _ACTIVATIONS

    def _unscaled(self, term: Value) -> Value | None:
        """Return the value that a term multiplies by parameters or a number; None if it is none."""
        made = self._recording.made_by.get(self._recording.original(term))
        if made is None or not self._scales(made):
            return None
        return self._recording.original(made.values[0])

    def _scales(self, made: Operator) -> bool:
        if len(made.values) != 1:
            return False
        if isinstance(made.function, str):
            return "Scale" in type(self._block.get_submodule(made.function)).__name__
        return made.name in _PRODUCTS

    def _drop_path(self, value: Value) -> Operator | None:
        """Find stochastic depth at the end of a branch, before scaling and reshaping at most."""
        while (made := self._recording.made_by.get(value)) is not None and len(made.values) == 1:
            named = made.function if isinstance(made.function, str) else None
            if named is not None and drops_path(self._block.get_submodule(named)):
                return made
            # Only operators that commute with a factor per sample: the engine applies it last.
            if not (made.name in _RESHAPES or self._scales(made) or value in made.same):
                break
            value = made.values[0]
        return None


def _title(made: Operator) -> str:
    return f"its module {made.function}" if isinstance(made.function, str) else made.name
