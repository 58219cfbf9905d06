"""Predictions of branches that run in pieces need not run all of the pieces."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from re2tal.reversible import call, reversible_stages


@contextmanager
def repeated_pieces_left_out(model: nn.Module) -> Iterator[None]:
    """Let the branches of a rewired model run only some of their pieces; for fake tensors only.

    A reversible stage frees a piece before the next, so the thousandth piece of one size peaks
    where the second did, and a stage of long videos has thousands. Results of left out pieces are
    missing, which tensors without values do not notice. Where a stage stores its activations every
    piece counts, and all are run.

    Args:
        model: about to run; not in several threads at a time.
    """
    stages = [stage for _, stage in reversible_stages(model)]
    if any(stage.settings.stored_because() is not None for stage in stages):
        yield
        return
    every = call.spans
    call.spans = lambda layout, budget: _few(every(layout, budget))
    try:
        yield
    finally:
        call.spans = every


def _few(cuts: list[call.Span]) -> list[call.Span]:
    """The last two pieces, with which the backward begins, and the largest of the others.

    From the third piece of a backward on, the sums of gradients, the last piece's gradients and the
    present one's live side by side.
    """
    largest = sorted(cuts[:-2], key=lambda span: span[0] - span[1])[:1]
    return largest + cuts[-2:]
