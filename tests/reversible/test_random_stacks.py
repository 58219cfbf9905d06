"""Properties of the engine over random stacks of random branches."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from re2tal.reversible import rewire
from tests.reversible.toy_blocks import MlpBlock, PairBlock, assert_reversible_is_stored

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
    # An output layer that needs a gradient: with everything frozen there would be no backward.
    outer = nn.Sequential(model, nn.Linear(WIDTH, 2)).double().train(training)
    alpha, beta, exact = coupling
    rewire(outer, alpha=alpha, beta=beta, exact=exact, slice_bytes=budget)
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=needs_input)
    assert_reversible_is_stored(outer, x, seed=seed, tolerance=0.0 if exact else 1e-8)
