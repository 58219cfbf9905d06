"""Copies, files and repeated steps: a rewired model is an ordinary module."""

import copy
import gc
import io
import pickle
import weakref

import torch
from torch import Tensor, nn

from re2tal.reversible import reversible_stages, rewire, set_coupling, set_reversible
from tests.reversible.toy_blocks import MlpBlock, assert_same_step, one_step, tiny_swin


def rewired_swin() -> nn.Module:
    torch.manual_seed(0)
    model = tiny_swin((2, 2), drop_path=0.3)
    rewire(model, alpha=0.1, beta=1.0)
    return model


def live_tensors() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_a_copy_is_independent_and_computes_the_same() -> None:
    model, x = rewired_swin(), torch.randn(2, 3, 4, 32, 32)
    clone = copy.deepcopy(model)
    assert_same_step(one_step(clone, x), one_step(model, x))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    set_coupling(model, alpha=0, beta=1)
    assert one_step(clone, x).output.abs().sum() > 0
    assert {s.settings.coupling.alpha for _, s in reversible_stages(clone)} == {0.1}


def test_pickle_and_torch_save_keep_the_rewiring() -> None:
    model, x = rewired_swin(), torch.randn(2, 3, 4, 32, 32)
    set_reversible(model, False)
    truth = one_step(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [s.settings.coupling for _, s in reversible_stages(loaded)] == [
            s.settings.coupling for _, s in reversible_stages(model)
        ]
        assert not any(s.settings.reversible for _, s in reversible_stages(loaded))
        assert_same_step(one_step(loaded, x), truth)


def test_repeated_steps_leave_nothing_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(*(MlpBlock() for _ in range(3))))
    rewire(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(4, 6)

    def step(index: int) -> None:
        loss = model(x).sum()
        if index % 3:  # every third output stays unused
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    step(1)
    gc.collect()
    gc.disable()  # what only the cycle collector would find is a leak here
    try:
        counts = []
        for index in range(60):
            step(index)
            if index % 15 == 14:
                counts.append(live_tensors())
    finally:
        gc.enable()
    assert len(set(counts)) == 1


def test_the_streams_are_freed_by_the_backward_itself() -> None:
    """Also where frozen blocks below mean that the tape is never rewound to its start."""
    torch.manual_seed(0)
    model = nn.Sequential(*(MlpBlock() for _ in range(4)))
    rewire(model)
    model[0].requires_grad_(False)
    kept: list[weakref.ref[object]] = []
    model[3].get_submodule("two").register_forward_hook(
        lambda _m, _i, out: kept.append(weakref.ref(out.untyped_storage()))
    )
    loss = model(torch.randn(4, 6)).sum()
    before = live_tensors()
    loss.backward()
    gradients = sum(p.grad is not None for p in model.parameters())
    # Gone: the two streams. Still there, with the graph: nothing but the new gradients.
    assert live_tensors() == before + gradients - 2
    assert all(reference() is None for reference in kept)
