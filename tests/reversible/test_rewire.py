"""Rewiring: which blocks become stages, what is left out and why, and unchanged names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import re2tal.reversible
from re2tal.reversible import (
    Coupling,
    ReversibleSequential,
    reversible_stages,
    rewire,
    set_coupling,
    set_reversible,
    unwire,
)
from tests.reversible.toy_blocks import (
    MlpBlock,
    PairBlock,
    assert_same_step,
    one_step,
    tiny_swin,
)
from tests.reversible.zoo import built


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("name", ["swin3d", "r3d", "slowfast", "videomae"])
def test_rewiring_keeps_all_names_and_unwiring_gives_the_original_back(name: str) -> None:
    model, inputs = built(name, bf16=False)
    other, _ = built(name, bf16=False)
    truth, structure = one_step(model, *inputs), repr(model)
    model.load_state_dict(other.state_dict())  # statistics of the original

    def everything() -> list[tuple[str, int]]:
        return [(n, id(x)) for n, x in (*model.named_parameters(), *model.named_modules())]

    before = everything()
    rewire(model, alpha=0.2)
    rewire(model, alpha=0.1)  # rewired again with other settings
    assert everything() == before
    assert list(model.state_dict()) == list(other.state_dict())
    other.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(other.state_dict(), strict=True)
    assert not torch.equal(one_step(model, *inputs).output, truth.output)
    model.load_state_dict(other.state_dict())
    set_reversible(model, False)
    unwire(model)
    assert repr(model) == structure
    assert everything() == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert not list(reversible_stages(model))
    assert_same_step(one_step(model, *inputs), truth)
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
    model = tiny_swin()
    assert "activations are stored" in str(rewire(model, alpha=1.0, beta=0.0))
    assert "stored" in repr(model.features[0])


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
            return self.norm(x + self.two(self.one(x)))

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
    assert "not a sum of its input and a branch, but ends in its module norm" in reasons["inner.1"]
    assert "hooks of its own" in reasons["inner.2"]
    assert "forward is not that of MlpBlock, but was set on this object" in reasons["inner.3"]
    assert "no branch names the modules that hold scale" in reasons["inner.4"]


def test_a_model_without_residual_blocks_is_refused() -> None:
    for model in (nn.Sequential(nn.Linear(2, 2)), MlpBlock()):
        with pytest.raises(ValueError, match=r"in this \w+ can be rewired: no child of an nn\.Seq"):
            rewire(model)
    for change in (rewire, unwire):
        with pytest.raises(TypeError, match=r"which tiny_swin is not\. Call it first: tiny_swin\("):
            change(tiny_swin)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"which an object of the class NoneType is not\.$"):
            change(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="call rewire first"):
        set_reversible(nn.Linear(2, 2), True)


def test_a_subclass_of_sequential_is_rewired_if_all_that_it_adds_is_its_children() -> None:
    class Acting(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input) * 2

    class Building(nn.Sequential):
        """An `nn.Sequential` that builds its own blocks, as in torchvision's RegNet."""

        def __init__(self, count: int) -> None:
            super().__init__(*(MlpBlock() for _ in range(count)))

    model = nn.ModuleList([Acting(MlpBlock()), Building(2)])
    report = rewire(model)
    assert [s.container for s in report.stages] == ["1"]
    ((name, reason),) = ((row.name, row.reason) for row in report.left_out)
    assert name == "0"
    assert "Acting is not rewired, because it is a subclass of nn.Sequential" in reason
    x = torch.randn(2, 6)
    y = model[1](x)
    rewired: Any = model[1]
    assert type(rewired[:1]) is nn.Sequential
    unwire(model)
    assert type(model[1]) is Building
    assert not torch.equal(model[1](x), y)


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


def test_the_made_up_family_of_the_readme() -> None:
    text = Path(re2tal.reversible.__file__).with_name("README.md").read_text()
    (code,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "register" in b)
    printed: list[object] = []
    names: dict[str, Any] = {"print": printed.append}
    exec(code, names)
    model = names["model"]
    assert "0…3     Mixer  reversible: 4 blocks, 8 branches" in str(printed[0])
    assert all(p.grad is not None for p in model.parameters())
    x = torch.randn(2, 8)
    rewire(model, alpha=1, beta=0)
    y = model(x)
    unwire(model)
    assert torch.equal(model(x), y)
