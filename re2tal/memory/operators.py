"""Number of operator calls, and bytes moved, per piece of a reversible step's branch.

With small pieces, a GPU waits for the host, which launches at least one kernel per operator. These
calls can be counted without a GPU: a CPU calls the same operators, except for fused ones.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from re2tal.memory.live import tensors_in
from re2tal.reversible.controls import set_slice_bytes
from re2tal.reversible.coupling import Budget
from re2tal.reversible.step import ReversibleStep, Step

_NO_WORK = (
    "detach",
    "alias",
    "_unsafe_view",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "empty_permuted",
)
"""Operators, besides views, that read and write no elements."""

_INTO_ROWS = {"index_put_": 1, "index_copy_": 1, "index_add_": 2, "scatter_add_": 2}
"""Operators that access only some rows of their first tensor -> accesses per value."""


@dataclass(kw_only=True, slots=True)
class Pieces:
    """Work of one branch in one phase.

    Attributes:
        pieces: number of pieces.
        calls: number of calls, by operator.
        bytes: bytes read and written by these calls.
    """

    pieces: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    @property
    def calls_a_piece(self) -> float:
        """Calls per piece."""
        return self.calls.total() / self.pieces

    @property
    def bytes_a_piece(self) -> float:
        """Bytes per piece."""
        return self.bytes / self.pieces


Work = dict[tuple[str, str], Pieces]
"""Work by the branch's name and the phase, "forward" or "backward"."""


class _Counted(TorchDispatchMode):
    """Counter of the operators that run inside a reversible step."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's has no types
        self.work: Work = {}
        self._now: Pieces | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count it if it works on tensors."""
        given = tensors_in((args, kwargs))
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        made = tensors_in(result)
        if result is None and name.startswith("_foreach"):
            made = given[: len(given) // 2]  # in place: the first half of the inputs is written
        if self._now is not None and made and not func.is_view and name not in _NO_WORK:
            self._now.calls[name] += 1
            if name in ("index_select", "index"):
                given = [*given[1:], *made]  # of the first tensor, only the returned rows are read
            elif name in _INTO_ROWS:
                given = given[1:]
                made = [given[-1]] * _INTO_ROWS[name]
            self._now.bytes += sum(t.numel() * t.element_size() for t in (*given, *made))
        return result

    @contextmanager
    def inside(self, branch: str, phase: str) -> Iterator[None]:
        """Count for a branch and a phase."""
        self._now = self.work.setdefault((branch, phase), Pieces())
        try:
            yield
        finally:
            self._now = None

    def piece(self) -> None:
        """Count a piece."""
        if self._now is not None:
            self._now.pieces += 1


def count_work(model: nn.Module, *inputs: Tensor) -> Work:
    """Count the work of a step's reversible branches, forward and backward.

    Args:
        model: rewired model, on a CPU.
        inputs: its inputs.
    """
    forward, replay, piece = ReversibleStep.forward, ReversibleStep.replay, Step.piece
    counted = _Counted()

    def in_forward(step: ReversibleStep, *args: Any, **kwargs: Any) -> Any:
        with counted.inside(step.name, "forward"):
            return forward(step, *args, **kwargs)

    def in_backward(step: ReversibleStep, *args: Any, **kwargs: Any) -> Any:
        with counted.inside(step.name, "backward"):
            return replay(step, *args, **kwargs)

    def one_piece(*args: Any) -> Any:
        counted.piece()
        return piece(*args)

    with (
        patch.object(ReversibleStep, "forward", in_forward),
        patch.object(ReversibleStep, "replay", in_backward),
        patch.object(Step, "piece", one_piece),
        torch.autograd.set_multithreading_enabled(False),
        counted,
    ):
        model(*inputs).sum().backward()
    return counted.work


def work_of_pieces(model: nn.Module, *inputs: Tensor, few: Budget, many: Budget) -> Work:
    """Compute the work per piece, as the difference of a step with many pieces and one with few.

    Args:
        model: rewired model, on a CPU; its budget per piece is `many` afterwards.
        inputs: its inputs.
        few: budget of large pieces.
        many: budget of small pieces, to which the bytes refer.

    Returns:
        The work of the additional pieces; for a branch that is not cut, the whole work.
    """
    runs = []
    for budget in (few, many):
        set_slice_bytes(model, budget)
        count_work(model, *inputs)  # a first step, which makes what later steps reuse
        runs.append(count_work(model, *inputs))
    found: Work = {}
    for key, large in runs[0].items():
        small = runs[1][key]
        more = small.pieces - large.pieces
        if more == 0:
            found[key] = small
            continue
        calls = Counter(small.calls)
        calls.subtract(large.calls)
        found[key] = Pieces(
            pieces=more,
            calls=Counter({name: n for name, n in calls.items() if n > 0}),
            bytes=small.bytes * more // small.pieces,
        )
    return found
