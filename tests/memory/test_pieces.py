"""A prediction runs a few pieces of a branch, and finds what all of them would."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from re2tal.memory import measure_activations, predict_peak
from re2tal.reversible import rewire, set_reversible, step
from tests.reversible.toy_blocks import tiny_swin

CLIP = (2, 3, 8, 64, 64)


# With 2**20, branches are of one to three pieces: there a wrong choice of pieces peaks lower.
@pytest.mark.parametrize("slice_bytes", [200_000, 2**20, None])
@pytest.mark.parametrize("reversible", [True, False])
def test_few_pieces_peak_like_all(
    slice_bytes: int | None, reversible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = tiny_swin((2, 2), drop_path=0.2), torch.randn(CLIP)
    rewire(model, slice_bytes=slice_bytes)
    set_reversible(model, reversible)
    few = predict_peak(model, x)
    monkeypatch.setattr(step, "_decisive", lambda cuts: cuts)
    every = predict_peak(model, x)
    assert few.activations > 3 * few.parameters
    assert few == every


def test_a_longer_video_takes_no_more_operators() -> None:
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    model = tiny_swin((2,))
    rewire(model, slice_bytes=20_000)
    counts = []
    for frames in (16, 64):
        with Counter() as counter:
            predict_peak(model, torch.empty(1, 3, frames, 32, 32))
        counts.append(counter.count)
    assert counts[1] <= 1.05 * counts[0]


def test_real_steps_run_all_their_pieces_after_a_prediction() -> None:
    model, x = tiny_swin((2,)), torch.randn(CLIP)
    rewire(model, slice_bytes=20_000)
    expected = model(x)
    predict_peak(model, x)
    assert torch.equal(model(x), expected)
    assert measure_activations(model, x).peak == pytest.approx(predict_peak(model, x).peak, rel=0.1)
