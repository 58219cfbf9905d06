import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from re2tal.reversible import (
    Coupling,
    ReversibleSequential,
    reversible_stages,
    rewire,
    set_coupling,
    set_reversible,
    unwire,
)
from tests.reversible.toy_blocks import MlpBlock, PairBlock, tiny_swin

VIDEO = (2, 3, 8, 32, 32)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_swin_keeps_its_names_and_loads_strictly_both_ways() -> None:
    torch.manual_seed(0)
    plain, rewired = tiny_swin(), tiny_swin()
    names = [(name, id(p)) for name, p in rewired.named_parameters()]
    modules = [(name, id(m)) for name, m in rewired.named_modules()]
    rewire(rewired)
    assert list(plain.state_dict()) == list(rewired.state_dict())
    assert names == [(name, id(p)) for name, p in rewired.named_parameters()]
    assert modules == [(name, id(m)) for name, m in rewired.named_modules()]
    rewired.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(rewired.state_dict(), strict=True)


def test_swin_computes_the_equation_of_the_paper() -> None:
    torch.manual_seed(0)
    model = tiny_swin((3,)).double().eval()
    x = torch.randn(2, 4, 8, 8, 8, dtype=torch.float64)
    previous, current = x, x
    for block in model.features[0]:
        following = previous + block.attn(block.norm1(current))
        previous, current = current, following
        following = previous + block.mlp(block.norm2(current))
        previous, current = current, following
    rewire(model, exact=False)
    torch.testing.assert_close(model.features[0](x), (previous + current) / 2)


@pytest.mark.parametrize("reversible", [True, False])
def test_alpha_one_beta_zero_is_the_original_network_and_says_that_it_stores(
    reversible: bool,
) -> None:
    torch.manual_seed(0)
    model = tiny_swin(drop_path=0.4).train()
    x = torch.randn(VIDEO)

    def run() -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(1)
        y = model(x)
        return y, list(torch.autograd.grad(y.square().sum(), list(model.parameters())))

    truth, gradients = run()
    report = rewire(model, alpha=1.0, beta=0.0)
    set_reversible(model, reversible)
    y, found = run()
    assert torch.equal(y, truth)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    assert "activations are stored" in str(report)
    assert "stored" in repr(model.features[0])


def test_unwire_gives_the_original_back() -> None:
    torch.manual_seed(0)
    model, x = tiny_swin().eval(), torch.randn(VIDEO)
    before, structure = model(x), repr(model)
    rewire(model, alpha=0.2, beta=0.9)
    assert not torch.equal(model(x), before)
    set_reversible(model, False)
    unwire(model)
    assert torch.equal(model(x), before)
    assert repr(model) == structure
    assert type(model.features[0]) is nn.Sequential
    assert not list(reversible_stages(model))
    rewire(model)
    assert all(stage.settings.reversible for _, stage in reversible_stages(model))


def test_the_report_names_every_stage_and_everything_left_out() -> None:
    report = rewire(Wrapped(tiny_swin((2, 3))))
    assert [(s.container, s.blocks, s.branches) for s in report.stages] == [
        ("inner.features.0", ("0", "1"), 4),
        ("inner.features.2", ("0", "1", "2"), 6),
    ]
    left = {row.name: row.reason for row in report.left_out}
    assert list(left) == ["inner.patch_embed", "inner.features.1", "inner.norm", "inner.head"]
    assert "no family is registered for PatchMerging" in left["inner.features.1"]
    table = str(report).splitlines()
    assert any("inner.features.2.0…2" in line and "3 blocks, 6 branches" in line for line in table)
    assert "rebuilt" in table[-1]


def test_a_container_may_hold_several_runs_and_other_modules() -> None:
    torch.manual_seed(0)
    blocks = [MlpBlock(), MlpBlock(), nn.Linear(6, 6), MlpBlock(), nn.Sequential(nn.Tanh())]
    model = nn.Sequential(*blocks).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    first = blocks[0].branch(x) + x  # type: ignore[operator]
    second = blocks[1].branch(first) + x  # type: ignore[operator]
    middle = blocks[2]((first + second) / 2)
    last = blocks[3].branch(middle) + middle  # type: ignore[operator]
    truth = torch.tanh((middle + last) / 2)
    report = rewire(model, exact=False)
    assert [s.blocks for s in report.stages] == [("0", "1"), ("3",)]
    assert isinstance(model, ReversibleSequential)
    torch.testing.assert_close(model(x), truth)


def test_blocks_are_left_out_for_reasons_of_their_own() -> None:
    class Reordered(MlpBlock):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.two(self.one(x)))

    class Forgetful(PairBlock):
        def __init__(self) -> None:
            super().__init__(nn.Linear(6, 6), nn.Linear(6, 6))
            self.scale = nn.Parameter(torch.ones(()))

    hooked = MlpBlock()
    hooked.register_forward_hook(lambda *_: None)
    patched = MlpBlock()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    container = nn.Sequential(MlpBlock(), Reordered(), hooked, patched, Forgetful(), MlpBlock())
    report = rewire(Wrapped(container))
    reasons = {row.name: row.reason for row in report.left_out}
    assert [s.blocks for s in report.stages] == [("0",), ("5",)]
    assert "forward is not that of MlpBlock" in reasons["inner.1"]
    assert "hooks of its own" in reasons["inner.2"]
    assert "forward is not that of MlpBlock" in reasons["inner.3"]
    assert "no branch names the modules that hold scale" in reasons["inner.4"]


def test_swin_v2_is_not_mistaken_for_v1() -> None:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=[4, 4],
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )
    with pytest.raises(
        ValueError, match=r"features\.1\.0 .*forward is not that of SwinTransformerBlock"
    ):
        rewire(model)


def test_a_model_without_residual_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Nothing in this Sequential can be rewired"):
        rewire(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="call rewire first"):
        set_reversible(nn.Linear(2, 2), True)


def test_a_subclass_of_sequential_is_left_out_with_its_reason() -> None:
    class Own(nn.Sequential):
        """A container that may do anything in its forward."""

    model = nn.ModuleList([Own(MlpBlock()), nn.Sequential(MlpBlock())])
    report = rewire(model)
    assert [s.container for s in report.stages] == ["1"]
    assert [(row.name, row.reason) for row in report.left_out] == [
        ("0", "only nn.Sequential itself is rewired, not its subclass Own")
    ]


def couplings(model: nn.Module) -> set[Coupling]:
    return {stage.settings.coupling for _, stage in reversible_stages(model)}


def test_the_coupling_can_be_changed_and_a_second_rewire_sets_it_too() -> None:
    model = tiny_swin()
    rewire(model)
    set_coupling(model, alpha=0.5, beta=0.5)
    assert couplings(model) == {Coupling(alpha=0.5, beta=0.5)}
    report = rewire(model, alpha=0.1, beta=0.9)
    assert len(report.stages) == 2
    assert couplings(model) == {Coupling(alpha=0.1, beta=0.9)}
