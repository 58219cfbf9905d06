import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.reversible.coupling import Coupling, stream_dtype

values = st.floats(-4, 4, width=32)


@settings(deadline=None, max_examples=50)
@given(alpha=st.floats(-1, 1), beta=st.floats(0.2, 2), f=values, current=values, previous=values)
def test_rewind_undoes_advance(
    alpha: float, beta: float, f: float, current: float, previous: float
) -> None:
    coupling = Coupling(alpha=alpha, beta=beta)
    a, b, c = (torch.tensor([v], dtype=torch.float64) for v in (f, current, previous))
    increment = coupling.increment(a, b)
    following = coupling.advance(increment, c)
    assert following.item() == pytest.approx(f + alpha * current + beta * previous, abs=1e-12)
    assert coupling.rewind(increment, following).item() == pytest.approx(previous, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(alpha=st.floats(-1, 1), beta=st.floats(0, 2))
def test_the_skip_gradient_is_that_of_autograd(alpha: float, beta: float) -> None:
    coupling = Coupling(alpha=alpha, beta=beta)
    f, current, previous = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    following = coupling.advance(coupling.increment(f, current), previous)
    gradient = torch.randn_like(following)
    (truth,) = torch.autograd.grad(following, previous, gradient, allow_unused=True)
    found = coupling.skip_gradient(gradient)
    assert (found is None) == (truth is None)
    if found is not None:
        torch.testing.assert_close(found, truth)


def test_re2tal_merges_to_the_mean_and_the_plain_network_to_its_last_stream() -> None:
    last, before = torch.randn(2, 5)
    mean = Coupling(alpha=0, beta=1).merge(last, before)
    torch.testing.assert_close(mean, (last + before) / 2)
    assert torch.equal(Coupling(alpha=1, beta=0).merge(last, before), last)
    weighted = Coupling(alpha=0.5, beta=0.25).merge(last, before)
    torch.testing.assert_close(weighted, (last + 0.25 * before) / 1.25)


def test_only_a_coupling_with_beta_is_invertible() -> None:
    assert Coupling(alpha=0.3, beta=0.7).invertible
    assert not Coupling(alpha=1, beta=0).invertible


@pytest.mark.parametrize(
    ("alpha", "beta"), [(math.nan, 1), (0, math.inf), (0, -0.5), (math.inf, 1)]
)
def test_impossible_coefficients_are_refused(alpha: float, beta: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Coupling(alpha=alpha, beta=beta)


def test_streams_are_at_least_float32() -> None:
    assert stream_dtype(torch.bfloat16) == stream_dtype(torch.float16) == torch.float32
    assert stream_dtype(torch.float32) == torch.float32
    assert stream_dtype(torch.float64) == torch.float64
