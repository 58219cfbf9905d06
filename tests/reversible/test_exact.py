"""Rebuilt streams and gradients equal those of stored activations, bit for bit."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.video.resnet import (
    BasicBlock,
    BasicStem,
    Conv2Plus1D,
    Conv3DNoTemporal,
    Conv3DSimple,
    R2Plus1dStem,
)

from re2tal.backbones.slowfast.blocks import Bottleneck
from re2tal.reversible import rewire, set_reversible
from re2tal.reversible.coupling import Bits, Budget
from re2tal.reversible.watch import Witness
from tests.reversible.toy_blocks import (
    MlpBlock,
    PairBlock,
    assert_reversible_is_stored,
    assert_same_step,
    one_step,
)
from tests.reversible.zoo import (
    ZOO,
    Built,
    Precision,
    both_precisions,
    built,
    every_model,
    scrambled,
)

UNUSED = ("mask_token", "position_embeddings")
"""Parameters that a model of transformers holds but does not use here."""


class Rebuilt:
    """Record of the stages that rebuilt their two input streams; every bit must be equal."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stages: list[str] = []
        remember, compare = Witness.__init__, Witness.compare
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def remembering(
            witness: Witness, watch: Any, current: Tensor, previous: Tensor, *rest: Any
        ) -> None:
            remember(witness, watch, current, previous, *rest)
            kept[id(witness)] = current.detach().clone(), previous.detach().clone()

        def comparing(witness: Witness, current: Tensor, previous: Tensor) -> None:
            before = kept.pop(id(witness))
            assert torch.equal(current, before[0])
            assert torch.equal(previous, before[1])
            self.stages.append(witness._where)
            compare(witness, current, previous)

        patch.setattr(Witness, "__init__", remembering)
        patch.setattr(Witness, "compare", comparing)


def assert_repeats(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """If plain steps differed, different bits would say nothing about the reversible engine."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    found = []
    for _ in range(2):
        found.append(one_step(model, *inputs))
        model.load_state_dict(buffers, strict=False)
    first, second = (step.gradients for step in found)
    differ = [
        name
        for name, gradient in first.items()
        if gradient is not None and not torch.equal(gradient, torch.as_tensor(second[name]))
    ]
    assert not differ, (
        "The plain network, which nobody rewired, has other gradients in a second step like the "
        f"first: the kernels of this machine do not repeat themselves. Of {differ}"
    )


def assert_bit_equal(
    model: nn.Module, inputs: tuple[Tensor, ...], stages: int, patch: pytest.MonkeyPatch
) -> None:
    """Outputs, gradients of all parameters and inputs, and inputs of all stages are equal."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    set_reversible(model, False)
    stored = one_step(model, *inputs)
    after = {name: b.clone() for name, b in model.named_buffers()}
    model.load_state_dict(buffers, strict=False)
    set_reversible(model, True)
    with patch.context() as context:
        rebuilt = Rebuilt(context)
        found = one_step(model, *inputs)
    assert_same_step(found, stored)
    assert len(set(rebuilt.stages)) == len(rebuilt.stages) == stages
    assert all(torch.equal(b, after[name]) for name, b in model.named_buffers())
    assert found.output.isfinite().all()
    missing = [n for n, g in found.gradients.items() if g is None or not g.isfinite().all()]
    assert missing == [name for name in missing if name.endswith(UNUSED)]


@every_model
@both_precisions
@pytest.mark.parametrize(("budget", "alpha"), [("auto", 0.0), (1, 0.0), ("auto", 0.4)])
def test_a_step_of_a_rewired_model(
    name: str, bf16: bool, budget: Budget, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With alpha = 0.4: the pretrained skip connection is used as well."""
    model, inputs = built(name, bf16=bf16)
    assert_repeats(model, inputs)
    report = rewire(model, slice_bytes=budget, alpha=alpha)
    assert_bit_equal(model, inputs, len(report.stages), monkeypatch)


def residual_network(kind: str) -> Built:
    """96 narrow blocks of one branch each; the libraries' blocks are too wide for so many."""
    builder = {"r3d": Conv3DSimple, "mc3": Conv3DNoTemporal, "r2plus1d": Conv2Plus1D}.get(kind)
    blocks: list[nn.Module] = []
    for _ in range(96):
        if builder is None:
            blocks.append(Bottleneck(8, 2, frames=3))
        else:
            blocks.append(BasicBlock(8, 8, builder))
    stem = R2Plus1dStem() if kind == "r2plus1d" else BasicStem()
    return nn.Sequential(stem, nn.Conv3d(64, 8, 1), nn.Sequential(*blocks)), (
        torch.randn(2, 3, 2, 12, 12),
    )


RESNETS = ("r3d", "mc3", "r2plus1d", "slowfast")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*(name for name in ZOO if not name.startswith(RESNETS)), *RESNETS]
)
@both_precisions
def test_a_stage_of_96_branches(name: str, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if name in RESNETS:
        model, inputs = residual_network(name)
    else:
        model, inputs = ZOO[name](depth=32 if name == "timesformer_divided" else 48, drop=0.2)
    inputs = tuple(x[:1] if name not in RESNETS else x for x in inputs)  # a BatchNorm needs two
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    deep = Precision(model.train(), bf16=bf16)
    assert_repeats(deep, inputs)
    report = rewire(deep)
    assert max(stage.branches for stage in report.stages) >= 96
    assert_bit_equal(deep, inputs, len(report.stages), monkeypatch)


@pytest.mark.parametrize("name", ["swin3d", "vit", "mvit_v2", "r3d"])
def test_a_backward_under_autocast_as_well(name: str) -> None:
    """Inside autocast, rebuilt and stored runs cast gradients alike; outside, neither does."""
    model, inputs = built(name, bf16=True)
    rewire(model)
    steps = []
    for reversible in (True, False):
        set_reversible(model, reversible)
        with torch.autocast("cpu", torch.bfloat16):
            steps.append(one_step(model, *inputs))
    assert_same_step(*steps)


@pytest.mark.parametrize("budget", [1, 3000, 20_000, "auto", None])
@both_precisions
def test_any_budget_gives_the_gradients_of_that_budget(
    budget: Budget, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = built("swin3d_padded", bf16=bf16)
    rewire(model, slice_bytes=budget)
    assert_bit_equal(model, inputs, 2, monkeypatch)


def test_a_budget_that_is_changed_between_a_forward_and_its_backward() -> None:
    model, inputs = built("swin3d", bf16=False)

    def recut(y: Tensor) -> Tensor:
        rewire(model, slice_bytes=None)
        return y.pow(2).sum()

    rewire(model, slice_bytes=3000)
    found = one_step(model, *inputs, loss=recut)
    rewire(model, slice_bytes=3000)
    set_reversible(model, False)
    assert_same_step(found, one_step(model, *inputs))


def grid_difference(model: nn.Module, inputs: tuple[Tensor, ...], bits: Bits) -> float:
    """Relative difference of the output on a grid from that in plain floating point."""
    outputs = []
    for exact in (True, False):
        rewire(model, exact=exact, grid=bits)
        with torch.no_grad():
            outputs.append(model(*inputs).double())
    return float((outputs[0] - outputs[1]).norm() / outputs[1].norm())


@every_model
@pytest.mark.parametrize("trained", [True, False])
def test_the_grid_changes_the_function_by_little(name: str, trained: bool) -> None:
    """Streams have the size of trained or of fresh networks; bfloat16 alone makes 2e-3 to 1e-2."""
    model, inputs = built(name, bf16=False, drop=0.0)
    if trained:
        scrambled(model)
    # Measured: 4e-7 (mc3) to 7e-5 (timesformer) with streams of trained size. Fresh weights make
    # some tokens much smaller than the largest: 8e-6 (r3d) to 1.4e-3 (timm_vit), and 2.7e-2 for
    # vjepa2, whose predictor starts from the tiniest (bfloat16: 2.5e-2).
    bound = 2e-4 if trained else 3e-3 if name != "vjepa2" else 6e-2
    assert 0 < grid_difference(model, inputs, "auto") < bound


def test_a_finer_grid_changes_it_by_less() -> None:
    model, inputs = built("swin3d", bf16=False, drop=0.0)
    coarse, fine = (grid_difference(model, inputs, bits) for bits in (10, 15))
    assert 0 < fine < coarse / 8  # every further bit halves it


# Random stacks of random branches

WIDTH = 4
EXACT = [(0.0, 1.0, True), (0.4, 1.0, True)]


def layer(kind: str) -> nn.Module:
    return {
        "linear": lambda: nn.Linear(WIDTH, WIDTH),
        "tanh": lambda: nn.Tanh(),
        "relu": lambda: nn.ReLU(inplace=False),
        "dropout": lambda: nn.Dropout(0.4),
        "norm": lambda: nn.LayerNorm(WIDTH),
        "batch": lambda: nn.BatchNorm1d(WIDTH),
        "identity": lambda: nn.Identity(),
    }[kind]()


kinds = st.sampled_from(["linear", "tanh", "relu", "dropout", "norm", "batch", "identity"])
branch = st.lists(kinds, min_size=1, max_size=3)
block = st.one_of(st.none(), st.tuples(branch, branch), st.just("plain"))


@settings(deadline=None, max_examples=40)
@given(
    blocks=st.lists(block, min_size=1, max_size=6).filter(lambda bs: any(b != "plain" for b in bs)),
    coupling=st.sampled_from([*EXACT, (0.0, 1.0, False), (0.4, 0.8, False)]),
    budget=st.sampled_from([1, 200, None]),
    frozen=st.sets(st.integers(0, 5)),
    needs_input=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rebuilt_equals_stored(
    blocks: list[str | tuple[list[str], list[str]] | None],
    coupling: tuple[float, float, bool],
    budget: int | None,
    frozen: set[int],
    needs_input: bool,
    training: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential()
    for index, drawn in enumerate(blocks):
        if drawn is None:
            child: nn.Module = MlpBlock(WIDTH, dropout=0.3)
        elif isinstance(drawn, str):
            child = nn.Linear(WIDTH, WIDTH)
        else:
            child = PairBlock(*(nn.Sequential(*map(layer, part)) for part in drawn))
        model.append(child.requires_grad_(index not in frozen))
    # The output layer needs a gradient: with everything frozen there would be no backward.
    outer = nn.Sequential(model, nn.Linear(WIDTH, 2)).double().train(training)
    alpha, beta, exact = coupling
    rewire(outer, alpha=alpha, beta=beta, exact=exact, slice_bytes=budget)
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=needs_input)
    assert_reversible_is_stored(outer, x, seed=seed, tolerance=0.0 if exact else 1e-8)
