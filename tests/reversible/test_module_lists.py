"""Blocks in an `nn.ModuleList`, which the model's own forward calls one by one."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import (
    Branch,
    ReversibleError,
    ReversibleModuleList,
    branches,
    rewire,
    set_coupling,
    set_reversible,
    stage_modes,
    unwire,
)
from tests.reversible.toy_blocks import (
    MlpBlock,
    assert_reversible_is_stored,
    assert_same_step,
    one_step,
)

WIDTH = 6


class Scaled(nn.Module):
    """x + gain * tanh(linear(x) + shift), with arguments of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def branch(self, x: Tensor, shift: Tensor, gain: float = 1.0) -> Tensor:
        return self.drop(gain * torch.tanh(self.linear(x) + shift))

    def forward(self, x: Tensor, shift: Tensor, gain: float = 1.0) -> Tensor:
        return x + self.branch(x, shift, gain)


@branches.register
def _scaled(block: Scaled) -> list[Branch]:
    return [Branch("scaled", (block.linear, block.drop), block.branch)]


class Model(nn.Module):
    """A loop over its blocks, which notes what it gets from each."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Scaled() for _ in range(depth))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.shift: Tensor = torch.linspace(-1, 1, WIDTH)
        self.between: Callable[[int, Tensor], Tensor] | None = None
        self.gains = [0.5] * depth
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.hidden = []
        for index, layer in enumerate(self.layers):
            if self.between is not None:
                x = self.between(index, x)
            x = layer(x, self.shift, gain=self.gains[index])
            self.hidden.append(x)
        result: Tensor = self.head(x)
        self.hidden = [h.detach() for h in self.hidden]
        return result


def rewired(depth: int = 4, **options: Any) -> Model:
    model = Model(depth)
    rewire(model, **options)
    return model


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, WIDTH, requires_grad=True)


def test_the_equations_of_the_paper_with_the_arguments_of_the_call() -> None:
    model, x = rewired(exact=False).eval().double(), points().double()
    model.shift = model.shift.double()
    previous = current = model.stem(x)
    for layer in model.layers:
        assert isinstance(layer, Scaled)
        following = layer.branch(current, model.shift, 0.5) + previous
        previous, current = current, following
    torch.testing.assert_close(model(x), model.head((previous + current) / 2))


def test_a_step_is_that_of_stored_activations() -> None:
    model = rewired()
    assert stage_modes(model) == {}
    assert_reversible_is_stored(model, points())
    assert stage_modes(model) == {"layers.0…3": "reversible"}


def test_one_and_zero_is_the_model_as_it_was() -> None:
    model, x = Model(), points()
    truth = one_step(model, x)
    rewire(model, alpha=1, beta=0)
    assert_same_step(one_step(model, x), truth)
    set_coupling(model, alpha=0, beta=1)
    assert not torch.equal(one_step(model, x).output, truth.output)


def test_hidden_states_are_those_of_the_end_of_the_stage() -> None:
    """Within a stage there are two streams and no single state: every block reports the result."""
    model = rewired()
    model(points())
    assert len(model.hidden) == 4
    assert all(torch.equal(h, model.hidden[-1]) for h in model.hidden)


def test_a_block_without_a_family_ends_a_stage() -> None:
    class Plain(Scaled):
        def forward(self, x: Tensor, shift: Tensor, gain: float = 1.0) -> Tensor:
            return self.linear(x) + gain * shift

    model = Model()
    model.layers[2] = Plain()
    report = rewire(model)
    assert [stage.blocks for stage in report.stages] == [("0", "1"), ("3",)]
    assert_reversible_is_stored(model, points())
    first, second, third, last = model.hidden
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(third, last)


def test_names_and_indexing_stay() -> None:
    model, original = rewired(), Model()
    assert isinstance(model.layers, ReversibleModuleList)
    assert isinstance(model.layers, nn.ModuleList)
    assert list(model.state_dict()) == list(original.state_dict())
    original.load_state_dict(model.state_dict())
    assert isinstance(model.layers[1:3], nn.ModuleList)
    assert len(model.layers) == 4


# What a list cannot know


def test_something_in_between() -> None:
    model = rewired()
    model.between = lambda index, x: x * 2 if index == 2 else x
    with pytest.raises(ReversibleError, match=r"Block layers\.2 is in the middle .* in between"):
        model(points())
    set_coupling(model, alpha=1, beta=0)
    model(points())
    unwire(model)
    model(points())


def test_something_in_between_in_place() -> None:
    model = rewired()
    model.between = lambda index, x: x.mul_(2) if index == 2 else x
    with pytest.raises(ReversibleError, match=r"Block layers\.2 is in the middle"):
        model(points())


def test_something_before_the_first_block_is_no_concern() -> None:
    model = rewired()
    model.between = lambda index, x: x * 2 if index == 0 else x
    assert_reversible_is_stored(model, points())


def test_a_block_that_is_called_alone() -> None:
    model = rewired()
    with pytest.raises(ReversibleError, match=r"Block layers\.1 is in the middle"):
        model.layers[1](points(), model.shift)


def test_a_block_that_is_left_out() -> None:
    """As by a model that skips some of its layers at random."""
    model, x = rewired(), points()
    y = model.layers[0](x, model.shift)
    with pytest.raises(ReversibleError, match=r"Block layers\.2"):
        model.layers[2](y, model.shift)


def test_a_stage_that_goes_on_in_another_model() -> None:
    model, x = rewired(), points()
    y = model.layers[0](x, model.shift)
    y = model.layers[1](y, model.shift)
    other = rewired()
    with pytest.raises(ReversibleError, match=r"Block layers\.2"):
        other.layers[2](y, model.shift)


@pytest.mark.parametrize("edit", ["gain", "tensor", "missing"])
def test_other_arguments(edit: str) -> None:
    model, x = rewired(), points()
    y = model.layers[0](x, model.shift, gain=0.5)
    others: dict[str, Callable[[], Tensor]] = {
        "gain": lambda: model.layers[1](y, model.shift, gain=0.6),
        "tensor": lambda: model.layers[1](y, model.shift + 0, gain=0.5),
        "missing": lambda: model.layers[1](y, model.shift),
    }
    with pytest.raises(ReversibleError, match=r"Block layers\.1 is called with other arguments"):
        others[edit]()


@pytest.mark.parametrize("shift", ["argument", "keyword"])
def test_an_argument_that_needs_a_gradient(shift: str) -> None:
    model, x = rewired(), points()
    bias = model.shift.clone().requires_grad_()

    def run() -> Tensor:
        y = x
        for layer in model.layers:
            y = layer(y, bias) if shift == "argument" else layer(y, shift=bias)
        return y

    with pytest.raises(ReversibleError, match=r"layers\.0 \(scaled\): .* second tensor that needs"):
        run()
    with torch.no_grad():
        run()
    set_reversible(model, False)
    run().sum().backward()
    assert bias.grad is not None
    assert bias.grad.abs().sum() > 0


def test_one_of_the_blocks_is_used_elsewhere_as_well() -> None:
    """It cannot know which of its two places it is called at."""
    model = rewired(2)
    model.layers.append(model.layers[0])
    rewire(model)
    model.gains = [0.5] * 3
    with pytest.raises(ReversibleError, match=r"Block layers\.2"):
        model(points())


# An ordinary module


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_is_independent_and_computes_the_same(way: str) -> None:
    model, x = rewired(alpha=0.2), points()
    truth = one_step(model, x)
    model.hidden = []
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    set_coupling(model, alpha=0.9, beta=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_step(one_step(twin, x), truth)
    unwire(model)
    assert_same_step(one_step(twin, x), truth)
    unwire(twin)
    assert not torch.equal(one_step(twin, x).output, truth.output)


def test_unwire_gives_the_original_back() -> None:
    model, x = Model(), points()
    truth, structure = one_step(model, x), repr(model)
    rewire(model)
    unwire(model)
    assert type(model.layers) is nn.ModuleList
    assert not any("forward" in vars(layer) for layer in model.layers)
    assert repr(model) == structure
    assert_same_step(one_step(model, x), truth)


def test_rewiring_again_finds_the_same_stages() -> None:
    model, x = rewired(), points()
    truth = one_step(model, x)
    report = rewire(model, slice_bytes=1)
    assert [stage.branches for stage in report.stages] == [4]
    assert_same_step(one_step(model, x), truth)


def test_a_block_with_hooks_of_its_own() -> None:
    model = rewired()
    model.layers[2].register_forward_hook(lambda *_: None)
    with pytest.raises(
        ReversibleError, match=r"Block layers\.2 was rewired, but .*hooks of its own"
    ):
        model(points())


def test_a_block_that_was_replaced_by_another_layer() -> None:
    model = rewired()
    model.layers[2] = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ReversibleError, match=r"Block layers\.2 is not the one that was rewired"):
        model(points())


@pytest.mark.parametrize("index", [1, 3])
def test_a_block_that_was_replaced_by_one_of_its_kind(index: int) -> None:
    """It is not one that passes the stage's result on: it would be run twice."""
    model = rewired()
    model.layers[index] = Scaled()
    with pytest.raises(ReversibleError, match=rf"Block layers\.{index} is not the one that was"):
        model(points())
    rewire(model)
    assert_reversible_is_stored(model, points())


def test_the_first_block_replaced_by_one_of_its_kind() -> None:
    model = rewired()
    model.layers[0] = Scaled()
    with pytest.raises(ReversibleError, match=r"Block layers\.1 is in the middle"):
        model(points())


def test_blocks_that_were_appended_are_called_as_they_are() -> None:
    model = rewired(2)
    model.layers.append(Scaled())
    model.gains = [0.5] * 3
    assert_reversible_is_stored(model, points())
    rewire(model)
    assert stage_modes(model) == {}
    assert_reversible_is_stored(model, points())
    assert stage_modes(model) == {"layers.0…2": "reversible"}


def test_two_lists_in_a_row() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList(MlpBlock(WIDTH) for _ in range(2))
            self.second = nn.ModuleList(MlpBlock(WIDTH) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in [*self.first, *self.second]:
                x = block(x)
            return x

    torch.manual_seed(0)
    model = Two()
    rewire(model)
    assert_reversible_is_stored(model, points())
    assert set(stage_modes(model)) == {"first.0…1", "second.0…1"}


def test_a_stage_that_is_left_early() -> None:
    """Found at the next call: by then the model has used the result of the whole stage."""
    model = rewired()
    x = torch.randn(2, WIDTH)
    for block in model.layers[:2]:
        x = block(x, model.shift)
    with pytest.raises(ReversibleError, match="left after its block 1"):
        model(torch.randn(2, WIDTH))
    model(torch.randn(2, WIDTH))  # said once


class Loop(nn.Module):
    """Iterates over an `nn.Sequential` where it wants something of every block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(MlpBlock(WIDTH) for _ in range(3)))
        self.one_by_one = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.one_by_one:
            y: Tensor = self.blocks(x)
            return y
        for block in self.blocks:
            x = block(x)
        return x


def test_a_sequential_that_is_iterated_computes_the_same() -> None:
    model, x = Loop(), torch.randn(4, WIDTH, requires_grad=True)
    plain = one_step(model, x)
    rewire(model)
    whole = one_step(model, x)
    model.one_by_one = True
    assert_same_step(one_step(model, x), whole)
    assert not torch.equal(whole.output, plain.output)
    unwire(model)
    assert_same_step(one_step(model, x), plain)


def test_slices_of_a_rewired_sequential() -> None:
    model = Loop()
    rewire(model)
    x = torch.randn(4, WIDTH)
    assert torch.equal(model.blocks[:](x), model(x))
    assert type(model.blocks[1:]) is nn.Sequential
    with pytest.raises(ReversibleError, match="in the middle of a reversible stage"):
        model.blocks[1:](x)


@pytest.mark.parametrize("grad", [True, False])
def test_a_result_that_is_saved_takes_nothing_along(grad: bool) -> None:
    for model in (rewired(), Loop()):
        if isinstance(model, Loop):
            rewire(model)
            inner: nn.Module = model.blocks
        else:
            inner = model
        kept: list[Tensor] = []
        inner.register_forward_hook(lambda _m, _i, y, kept=kept: kept.append(y))
        with torch.set_grad_enabled(grad):
            model(torch.randn(2, WIDTH))
        file = io.BytesIO()
        torch.save(kept[0], file)
        assert len(file.getvalue()) < 3000
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), kept[0])
