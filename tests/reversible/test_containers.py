"""Rewired containers: copies, slices, and blocks that the model's own forward calls one by one."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.video import swin3d_t

from re2tal.reversible import (
    Branch,
    BySample,
    ReversibleError,
    ReversibleModuleList,
    branches,
    reconstruction_errors,
    reversible_stages,
    rewire,
    set_coupling,
    set_reversible,
    stage_modes,
    unwire,
)
from re2tal.reversible.pieces import spans
from tests.reversible.toy_blocks import (
    MlpBlock,
    PairBlock,
    assert_reversible_is_stored,
    assert_same_step,
    every_copy,
    one_step,
    points,
    stems_and_stages,
    tiny_swin,
)

WIDTH = 6


class Scaled(nn.Module):
    """Block x + gain * tanh(linear(x) + shift), with gain and shift as arguments of the call."""

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
    """Model that loops over its blocks, and keeps the result of each."""

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


def test_the_equations_of_the_paper_with_the_arguments_of_the_call() -> None:
    model, x = rewired(exact=False).eval().double(), points().double()
    model.shift = model.shift.double()
    previous = current = model.stem(x)
    for layer in model.layers:
        assert isinstance(layer, Scaled)
        following = layer.branch(current, model.shift, 0.5) + previous
        previous, current = current, following
    torch.testing.assert_close(model(x), model.head((previous + current) / 2))


def test_hidden_states_are_those_of_the_end_of_the_stage() -> None:
    """A stage has two streams and no single state in between, so every block returns its result."""
    model = rewired()
    model(points(requires_grad=True))
    assert len(model.hidden) == 4
    assert all(torch.equal(h, model.hidden[-1]) for h in model.hidden)
    assert isinstance(model.layers, ReversibleModuleList)
    assert isinstance(model.layers[1:3], nn.ModuleList)


def test_a_block_without_a_family_ends_a_stage() -> None:
    class Plain(Scaled):
        def forward(self, x: Tensor, shift: Tensor, gain: float = 1.0) -> Tensor:
            return self.linear(x) + gain * shift

    model = Model()
    model.layers[2] = Plain()
    report = rewire(model)
    assert [stage.blocks for stage in report.stages] == [("0", "1"), ("3",)]
    assert_reversible_is_stored(model, points(requires_grad=True))
    first, second, third, last = model.hidden
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(third, last)


# Calls that a list cannot foresee


@pytest.mark.parametrize("edit", [lambda x: x * 2, lambda x: x.mul_(2)])
def test_something_in_between(edit: Callable[[Tensor], Tensor]) -> None:
    model = rewired()
    model.between = lambda index, x: edit(x) if index == 2 else x
    with pytest.raises(ReversibleError, match=r"Block layers\.2 is in the middle .* in between"):
        model(points())
    set_coupling(model, alpha=1, beta=0)
    model(points())
    unwire(model)
    model(points())


def test_something_before_the_first_block_is_no_concern() -> None:
    model = rewired()
    model.between = lambda index, x: x * 2 if index == 0 else x
    assert_reversible_is_stored(model, points(requires_grad=True))


@pytest.mark.parametrize(("before", "index"), [((), 1), ((0,), 2), ((0, 1), 2)])
def test_a_block_out_of_turn(before: tuple[int, ...], index: int) -> None:
    """Blocks called alone, after a block that was left out, and in another model."""
    model, x = rewired(), points(requires_grad=True)
    for earlier in before:
        x = model.layers[earlier](x, model.shift)
    other = rewired() if before == (0, 1) else model
    with pytest.raises(ReversibleError, match=rf"Block layers\.{index} is in the middle"):
        other.layers[index](x, model.shift)


@pytest.mark.parametrize("edit", ["gain", "tensor", "missing"])
def test_other_arguments(edit: str) -> None:
    model, x = rewired(), points(requires_grad=True)
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
    model, x = rewired(), points(requires_grad=True)
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
    """The block cannot know at which of its two places it is called."""
    model = rewired(2)
    model.layers.append(model.layers[0])
    rewire(model)
    model.gains = [0.5] * 3
    with pytest.raises(ReversibleError, match=r"Block layers\.2"):
        model(points(requires_grad=True))


# A rewired container as an ordinary module


def swin() -> nn.Module:
    torch.manual_seed(0)
    model = tiny_swin((2, 2), drop_path=0.3)
    rewire(model)
    return model


@every_copy
@pytest.mark.parametrize("build", [rewired, swin, stems_and_stages])
def test_a_copy_is_independent_and_computes_the_same(
    build: Callable[[], nn.Module], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model, x = build(), torch.randn(2, 3, 4, 32, 32) if build is swin else points()
    set_coupling(model, alpha=0.2, beta=1)
    truth = one_step(model, x)
    loss = model(x).sum()
    twin = copied(model)
    loss.backward()  # a graph that is still alive belongs to the original
    assert reconstruction_errors(model)
    assert not reconstruction_errors(twin)
    assert not any(stage.watch.modes for _, stage in reversible_stages(twin))
    set_reversible(model, False)
    set_coupling(model, alpha=0.9, beta=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_step(one_step(twin, x), truth)
    assert reconstruction_errors(twin)
    unwire(model)
    assert_same_step(one_step(twin, x), truth)
    assert set(stage_modes(twin).values()) == {"reversible"}
    set_reversible(twin, False)
    again = copied(twin)
    assert_same_step(one_step(again, x), truth)
    assert all(mode.startswith("stored") for mode in stage_modes(again).values())
    unwire(twin)
    assert not torch.equal(one_step(twin, x).output, truth.output)


def hooked(blocks: Any) -> None:
    blocks[1].register_forward_hook(lambda *_: None)


def replaced(blocks: Any, by: Callable[[], nn.Module], index: int = 1) -> None:
    blocks[index] = by()


@pytest.mark.parametrize(
    ("listed", "edit", "message"),
    [
        (True, hooked, "layers.1 was rewired, but .*hooks of its own"),
        (False, hooked, "blocks.1 was rewired, but .*hooks of its own"),
        (True, partial(replaced, by=nn.Identity), "layers.1 is not the one that was rewired"),
        (False, partial(replaced, by=nn.Identity), "blocks.1 was .*no family is registered for Id"),
        # A new block of the same class would run a second time, not pass the stage's result on.
        (True, partial(replaced, by=Scaled), "layers.1 is not the one that was rewired"),
        (True, partial(replaced, by=Scaled, index=3), "layers.3 is not the one that was rewired"),
        (True, partial(replaced, by=Scaled, index=0), "layers.1 is in the middle"),
    ],
)
def test_a_block_that_was_edited_after_rewiring(
    listed: bool, edit: Callable[[nn.Module], None], message: str
) -> None:
    model: nn.Module = rewired() if listed else Loop()
    rewire(model)
    edit(model.get_submodule("layers" if listed else "blocks"))
    with pytest.raises(ReversibleError, match=f"Block {message}"):
        model(points())


def test_blocks_that_were_appended_are_called_as_they_are() -> None:
    model = rewired(2)
    model.layers.append(Scaled())
    model.gains = [0.5] * 3
    assert_reversible_is_stored(model, points(requires_grad=True))
    rewire(model)
    assert stage_modes(model) == {}
    assert_reversible_is_stored(model, points(requires_grad=True))
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
    assert_reversible_is_stored(model, points(requires_grad=True))
    assert set(stage_modes(model)) == {"first.0…1", "second.0…1"}


def test_a_stage_that_is_left_early() -> None:
    """The next call finds it; by then the model has used the result of the whole stage."""
    model = rewired()
    x = torch.randn(2, WIDTH)
    for block in model.layers[:2]:
        x = block(x, model.shift)
    with pytest.raises(ReversibleError, match="left after its block 1"):
        model(torch.randn(2, WIDTH))
    model(torch.randn(2, WIDTH))  # raised only once


class Loop(nn.Module):
    """Model that iterates over an `nn.Sequential` to get every block's result."""

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
    loop = Loop()
    rewire(loop)
    for model, inner in ((rewired(), None), (loop, loop.blocks)):
        kept: list[Tensor] = []
        (inner or model).register_forward_hook(lambda _m, _i, y, kept=kept: kept.append(y))
        with torch.set_grad_enabled(grad):
            model(points())
        file = io.BytesIO()
        torch.save(kept[0], file)
        assert len(file.getvalue()) < 3000
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), kept[0])


class Sees(nn.Module):
    """Block that scales each channel of (B, C, T, H, W), and records the strides of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1, 1))
        self.strides: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.strides.append(x.stride())
        return x * self.scale


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("reversible", [True, False])
def test_branches_get_the_memory_format_that_they_had(
    batch: int, exact: bool, reversible: bool
) -> None:
    """Even the stride of a batch of one counts: convolutions choose their format by it."""
    seeing = [Sees() for _ in range(4)]
    model = nn.Sequential(PairBlock(*seeing[:2]), PairBlock(*seeing[2:]))
    rewire(model, exact=exact)
    set_reversible(model, reversible)
    x = torch.randn(batch, 4, 2, 3, 5).to(memory_format=torch.channels_last_3d)
    y = model(x)
    y.sum().backward()
    assert [s.strides for s in seeing] == [[x.stride()] * (1 + reversible)] * 4
    assert y.stride() == x.stride()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last_3d])
def test_samples_in_pieces_keep_their_memory_format(
    batch: int, format_: torch.memory_format
) -> None:
    x = torch.randn(batch, 4, 2, 3, 5).to(memory_format=format_)
    layout = BySample(1.0)(x)
    pieces = {span: layout.take(x, *span) for span in spans(layout, budget=1)}
    assert len(pieces) == batch
    joined = layout.new(pieces[0, 1], x.shape)
    for span, piece in pieces.items():
        assert piece.stride() == x.stride()
        layout.put(joined, *span, piece)
    assert torch.equal(joined, x)
    assert joined.stride() == x.stride()


# torch.fx, as torchvision's feature extraction traces models


def vit() -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3)
    return model


@pytest.mark.parametrize(
    ("build", "node", "reader", "shape"),
    [
        (swin3d_t, "features.1", "features.2", (1, 3, 2, 32, 32)),  # a stage is an nn.Sequential
        (vit, "blocks.2", "norm", (1, 3, 32, 32)),  # the model calls its blocks one by one
    ],
)
def test_feature_extraction_sees_a_stage_as_one_operation(
    build: Callable[[], nn.Module], node: str, reader: str, shape: tuple[int, ...]
) -> None:
    model = build()
    rewire(model)
    extractor = create_feature_extractor(model.eval(), [node])
    seen: list[Tensor] = []
    next_module = model.get_submodule(reader)
    hook = next_module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    frames = torch.randn(shape)
    model(frames)
    hook.remove()
    found = extractor(frames)[node]
    assert torch.equal(found, seen[0])
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.get_submodule(node).parameters())
