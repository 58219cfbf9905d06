"""Dr2Net's way from the pretrained network to a reversible one."""

import logging

import pytest
import torch
from torch import nn

from re2tal.reversible import (
    Coupling,
    CouplingSchedule,
    reversible_stages,
    rewire,
    set_reversible,
    stage_modes,
)
from tests.reversible.toy_blocks import MlpBlock, assert_same_step, one_step, tiny_swin


def test_a_straight_line_from_the_pretrained_network_to_re2tal() -> None:
    schedule = CouplingSchedule(steps=4)
    couplings = [schedule.at(step) for step in range(7)]
    assert [c.alpha for c in couplings] == [1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert [c.beta for c in couplings] == [0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_ends_of_ones_own() -> None:
    schedule = CouplingSchedule(
        steps=10, start=Coupling(alpha=1.0, beta=0.1), end=Coupling(alpha=0.3, beta=0.7)
    )
    assert schedule.at(0) == schedule.start
    assert schedule.at(99) == schedule.end
    assert schedule.at(5).alpha == pytest.approx(0.65)
    assert schedule.at(5).beta == pytest.approx(0.4)
    with pytest.raises(ValueError, match="at least 1 step"):
        CouplingSchedule(steps=0)


def test_a_model_under_the_schedule(caplog: pytest.LogCaptureFixture) -> None:
    """Starts as the network that it was, ends reversible, and trains rightly all along."""
    torch.manual_seed(0)
    model, x = tiny_swin((3, 2), drop_path=0.2), torch.randn(2, 3, 4, 32, 32)
    truth = one_step(model, x)
    rewire(model, exact=False)
    schedule = CouplingSchedule(steps=5)
    modes = []
    with caplog.at_level(logging.INFO, logger="re2tal"):
        for step in range(7):
            assert schedule.apply(model, step) == schedule.at(step)
            assert {s.settings.coupling for _, s in reversible_stages(model)} == {schedule.at(step)}
            found = one_step(model, x)
            modes.append(stage_modes(model)["features.0.0…2"])
            set_reversible(model, False)
            stored = one_step(model, x)
            set_reversible(model, True)
            assert_same_step(found, stored, tolerance=1e-2)
            if step == 0:
                assert torch.equal(found.output, truth.output)
    assert modes[0].startswith("stored")
    assert modes[-1] == "reversible"
    assert any("features.0.0…2: reversible" in message for message in caplog.messages)


def test_exact_streams_store_until_beta_is_one() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(MlpBlock() for _ in range(3))), torch.randn(4, 6)
    rewire(model)
    schedule = CouplingSchedule(steps=3)
    modes = []
    for step in range(4):
        schedule.apply(model, step)
        model(x)
        modes.append(stage_modes(model)["0…2"])
    assert all("stored" in mode for mode in modes[:3])
    assert "beta = 1" in modes[2]
    assert modes[3] == "reversible"
