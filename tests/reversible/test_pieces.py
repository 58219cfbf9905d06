"""Operators that a piece calls, and the Triton kernel that replaces some of them on a GPU."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.experiments.models import stack
from re2tal.memory import work_of_pieces
from re2tal.reversible import rewire
from re2tal.reversible.coupling import Grid, accumulate
from re2tal.reversible.layouts import Places
from re2tal.reversible.pieces import Totals
from tests.reversible.toy_blocks import assert_same_step, one_step
from tests.reversible.zoo import ZOO

# Operators of one piece in forward and backward. The numbers may only become smaller: a GPU waits
# for each operator. Those of the branch itself are in brackets.
MOST = {
    ("Video Swin", "attention"): (12, 26.8),  # (7, 19)
    ("Video Swin", "mlp"): (7, 17),  # (4, 12)
    ("padded Swin", "attention"): (15, 32.8),  # (8, 21)
    ("padded Swin", "mlp"): (7, 17),
    ("ViT", "attention"): (7.5, 18),  # (4, 13)
    ("ViT", "mlp"): (7, 17),  # (4, 12)
    ("SlowFast", "residual"): (15.7, 27),  # (9, 18), and 3 counters of batches each
    ("SlowFast, eval", "residual"): (12, 23),  # (9, 18)
}


def stage(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "padded Swin":
        return stack("Video Swin", 4)[0], torch.randn(1, 3, 7, 6, 32)
    if name.startswith("SlowFast"):
        model, (x,) = ZOO["slowfast"]()
        return model.train(name == "SlowFast"), x
    return stack(name, 4)


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in MOST))
def test_a_piece_calls_few_operators(name: str) -> None:
    model, x = stage(name)
    rewire(model)
    work = work_of_pieces(model, x.requires_grad_(), few=2**30, many=2**14)
    bounds = {branch: most for (of, branch), most in MOST.items() if of == name}
    assert {branch for branch, _ in work} == set(bounds)
    for (branch, phase), pieces in work.items():
        most = bounds[branch][phase == "backward"]
        assert pieces.pieces >= 3
        # With few pieces the first ones weigh more: gradients are summed from the second on.
        assert 0.8 * most < pieces.calls_a_piece <= most, (branch, phase, pieces.calls)


def test_sums_of_gradients_leave_the_first_ones_as_they_were() -> None:
    """Autograd may give the same tensor to two parameters."""
    shared, lone = torch.ones(2), torch.full((3,), 2.0)
    totals = Totals(4)
    totals.add([shared, shared, lone, None])
    for _ in range(2):
        totals.add([torch.ones(2), None, None, torch.ones(1)])
    found = [None if t is None else t.tolist() for t in totals.values]
    assert found == [[3, 3], [1, 1], [2, 2, 2], [2]]
    assert shared.tolist() == [1, 1]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton kernels, interpreted on the CPU."""
    if find_spec("triton") is None:
        pytest.skip("Triton cannot be imported here")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = find_spec("re2tal.reversible.kernels")
    assert found is not None
    assert found.origin is not None
    # A second module, beside the one that this process may have compiled.
    spec = spec_from_file_location("interpreted_kernels", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(shape: tuple[int, ...]) -> Tensor:
    """Values around ties, of all magnitudes, and the limits of float32."""
    x = torch.randn(shape) * 10 ** (8 * torch.rand(shape) - 6)
    halves = torch.arange(-30, 30) / 2.0**15
    edges = [0.0, -0.0, 1e-40, -1e-40, 2.0**7 + 2.0**-15, torch.inf, -torch.inf, torch.nan]
    ends = torch.cat([halves, torch.tensor(edges)])
    x.view(-1)[: len(ends)] = ends
    return x


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


@pytest.mark.parametrize("bits", ["auto", 14, None])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("padded", [None, False, True])
def test_the_kernel_adds_as_the_plain_path_does(
    bits: Any, sign: int, padded: bool | None, kernels: Any
) -> None:
    """Bit for bit; `padded` is None for values without an index."""
    torch.manual_seed(0)
    x = values((11, 13, 3))
    grid = None if bits is None else Grid.of(bits, torch.randn(5))
    out = torch.randn(x.shape) if grid is None else Grid.of(bits, x[3:]).round(torch.randn(x.shape))
    plain, fused = out.clone(), out.clone()
    if padded is None:
        accumulate(plain, x, grid, sign)
        kernels.add(fused, x, grid, sign)
    else:
        index = torch.randperm(11 * 13).view(11, 13)
        padding = (torch.rand(11, 13, 1) < 0.3) if padded else None
        Places(index, padding).add(plain, x, grid, sign)
        flat = None if padding is None else padding.reshape(-1)
        kernels.add(fused.view(-1, 3), x.view(-1, 3), grid, sign, index.reshape(-1), flat)
    assert same(plain, fused)
    assert fused._version > 0


def test_the_kernel_is_tried_before_it_is_used(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    coupling = import_module("re2tal.reversible.coupling")
    device, kernels_on = torch.device("cpu"), coupling.kernels_on.__wrapped__
    monkeypatch.setattr(coupling, "import_module", lambda _: kernels)
    assert kernels_on(device) is kernels
    assert not caplog.text
    add = kernels.add
    monkeypatch.setattr(kernels, "add", lambda out, x, *rest: add(out, x * (1 + 2.0**-20), *rest))
    assert kernels_on(device) is None
    assert "does not compute what PyTorch does" in caplog.text

    def no_compiler(*_: Any) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(kernels, "add", no_compiler)
    assert kernels_on(device) is None
    assert "RuntimeError: no C compiler" in caplog.text


@pytest.mark.parametrize("name", ["Video Swin", "padded Swin", "ViT"])
def test_a_step_with_the_kernel_is_the_same(
    name: str, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = stage(name)
    rewire(model, slice_bytes=2**17)
    plain = one_step(model, x.requires_grad_())
    added: list[Any] = []
    add: Callable[..., None] = kernels.add

    def watched(*given: Any) -> None:
        added.append(given)
        add(*given)

    monkeypatch.setattr(kernels, "add", watched)
    for module in ("coupling", "layouts"):
        monkeypatch.setattr(
            import_module(f"re2tal.reversible.{module}"), "fused", lambda *_: kernels
        )
    fused = one_step(model, x)
    assert_same_step(fused, plain)
    assert len(added) >= 8  # four branches, forward and backward
