"""The branches of every family, compared with the libraries' own blocks."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.video.mvit import MSBlockConfig, MultiscaleBlock
from torchvision.models.video.resnet import (
    BasicBlock,
    BasicStem,
    Bottleneck,
    Conv3DSimple,
    R2Plus1dStem,
    VideoResNet,
)
from torchvision.models.vision_transformer import EncoderBlock

from re2tal.reversible.branches import (
    Branch,
    ChangesShapeError,
    branches,
    check_complete,
    load_families,
    recomputed,
    returned,
)
from re2tal.reversible.layouts import Layout, Whole
from re2tal.reversible.pieces import spans
from tests.reversible.zoo import ZOO, Built, scrambled


class Call(NamedTuple):
    """Recorded call of one block within its model."""

    block: nn.Module
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, function: Callable[..., Any]) -> Any:
        torch.manual_seed(1)
        return function(self.x, *self.args, **self.kwargs)


def block_calls(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[Call]:
    """Calls of the model's blocks for which a family is registered."""
    calls: list[Call] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, *others = args
        calls.append(Call(block, x, tuple(others), kwargs))

    handles = []
    for module in model.modules():
        load_families(type(module))
        if branches.dispatch(type(module)) is not branches.dispatch(object):
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    assert calls
    return iter(calls)


def timm_variant(**kwargs: Any) -> Built:
    from timm.models.vision_transformer import Block

    drop = kwargs.pop("drop")
    block = Block(16, 2, proj_drop=drop, attn_drop=drop, drop_path=drop, init_values=0.5, **kwargs)
    return nn.Sequential(block), (torch.randn(3, 5, 16),)


def timm_swiglu(drop: float = 0.0) -> Built:
    from timm.layers import SwiGLU

    return timm_variant(drop=drop, mlp_layer=SwiGLU, qk_norm=True, scale_mlp_norm=True)


def timm_packed(drop: float = 0.0) -> Built:
    from timm.layers import SwiGLUPacked

    return timm_variant(drop=drop, mlp_layer=SwiGLUPacked, attn_layer="diff")


def timm_unfused(drop: float = 0.0) -> Built:
    model, inputs = timm_variant(drop=drop)
    model.get_submodule("0.attn").fused_attn = False  # type: ignore[assignment]
    return model, inputs


def mvit_batchnorm(drop: float = 0.0) -> Built:
    block = MultiscaleBlock(
        [2, 3, 4],
        MSBlockConfig(2, 8, 8, [], [], [], []),
        residual_pool=True,
        residual_with_cls_embed=True,
        rel_pos_embed=True,
        proj_after_attn=True,
        dropout=drop,
        stochastic_depth_prob=drop,
        norm_layer=nn.BatchNorm1d,
    )

    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Any:
            return self.block(x, (2, 3, 4))

    return Grid(), (torch.randn(3, 25, 8),)


def bottlenecks(drop: float = 0.0) -> Built:
    model = VideoResNet(Bottleneck, [Conv3DSimple] * 4, [2, 1, 1, 1], BasicStem, num_classes=3)
    return model.layer1, (torch.randn(2, 64, 2, 6, 6),)


def eager(name: str, drop: float = 0.0) -> Built:
    model, inputs = ZOO[name](drop=drop)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    return model, inputs


MODELS: dict[str, Callable[..., Built]] = {
    **{name: build for name, build in ZOO.items() if not name.startswith("swin")},
    "timm_swiglu": timm_swiglu,
    "timm_packed": timm_packed,
    "timm_unfused": timm_unfused,
    "mvit_batchnorm": mvit_batchnorm,
    "bottlenecks": bottlenecks,
    "videomae_eager": partial(eager, "videomae"),
    "vivit_eager": partial(eager, "vivit"),
    "vjepa2_eager": partial(eager, "vjepa2"),
}
every_block = pytest.mark.parametrize("name", MODELS)
both_modes = pytest.mark.parametrize("training", [True, False])


def calls_of(name: str, *, drop: float = 0.0, training: bool = False) -> list[Call]:
    """Calls of blocks that keep the shape of their input."""
    torch.manual_seed(0)
    model, inputs = MODELS[name](drop=drop)
    found = block_calls(scrambled(model).train(training), inputs)
    kept = [call for call in found if not changes_shape(call)]
    assert kept
    return kept


def output_of(call: Call) -> Any:
    with torch.no_grad():
        return call.run(call.block)


def tensor_of(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def skips(call: Call) -> bool:
    return getattr(call.block, "downsample", None) is not None


def changes_shape(call: Call) -> bool:
    return tensor_of(output_of(call)).shape != call.x.shape or skips(call)


def chained(call: Call) -> Any:
    """The block computed from its branches, with the library's own skip connections."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for branch in branches(call.block):
            result = branch(x, *args, **kwargs)
            if branch.drop_path is not None:
                result = result * branch.drop_path(x.new_ones(len(x), 1)).view(
                    -1, *(1,) * (x.dim() - 1)
                )
            x = x + result
            x = x if branch.activation is None else branch.activation(x)
        return x

    with torch.no_grad():
        y = call.run(run)
    return returned(call.block, y, *call.args, **call.kwargs)


@every_block
@both_modes
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_a_chain_of_its_branches_is_the_block(name: str, training: bool, drop: float) -> None:
    for call in calls_of(name, drop=drop, training=training):
        check_complete(call.block, branches(call.block))
        before = call.x.clone()
        truth, found = output_of(call), chained(call)
        assert torch.equal(call.x, before)
        assert not torch.allclose(tensor_of(truth), call.x, atol=0.1)
        torch.testing.assert_close(tensor_of(found), tensor_of(truth), rtol=1e-4, atol=1e-5)
        assert type(found) is type(truth)
        if isinstance(truth, tuple):  # further tensors are attention weights, which are left out
            assert found[1:] == tuple(None if isinstance(t, Tensor) else t for t in truth[1:])


@every_block
@both_modes
def test_the_bits_do_not_depend_on_whether_gradients_are_asked_for(
    name: str, training: bool
) -> None:
    for call in calls_of(name, drop=0.4, training=training):
        for branch in branches(call.block):
            with_gradient = call._replace(x=call.x.clone().requires_grad_()).run(branch)
            with torch.no_grad():
                assert torch.equal(call.run(branch), with_gradient)


def pieces(call: Call, branch: Branch, units: int) -> tuple[Tensor, Layout]:
    """The branch's result, joined from pieces of some units, and the layout."""
    assert branch.cut is not None
    layout: Layout = branch.cut(call.x, *call.args, **call.kwargs)
    shared, out = layout.share(), layout.new(call.x, call.x.shape).fill_(torch.nan)
    for start, stop in spans(layout, budget=units * layout.elements * 4):
        piece = layout.take(call.x, start, stop)
        layout.put(out, start, stop, layout.run(branch, piece, start, stop, shared))
    return out, layout


@every_block
@pytest.mark.parametrize("units", [1, 2, 1000])
def test_the_pieces_are_the_whole(name: str, units: int) -> None:
    cut_in = []
    for call in calls_of(name):
        for branch in branches(call.block):
            with torch.no_grad():
                found, layout = pieces(call, branch, units)
                torch.testing.assert_close(found, call.run(branch), rtol=1e-4, atol=1e-5)
            cut_in.append(len(spans(layout, budget=units * layout.elements * 4)))
    assert units > 1 or max(cut_in) >= 2


def saved_bytes(call: Call, branch: Branch) -> int:
    """Bytes that autograd saves for the backward of a branch, without its parameters."""
    known = {p.untyped_storage().data_ptr() for p in call.block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call._replace(x=call.x.clone().requires_grad_()).run(branch)
    assert result.requires_grad
    return sum(kept.values())


@every_block
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_a_piece_is_counted_with_all_that_is_kept_of_it(name: str, drop: float) -> None:
    for call in calls_of(name, drop=drop, training=True):
        for branch in branches(call.block):
            assert branch.cut is not None
            layout = branch.cut(call.x, *call.args, **call.kwargs)
            if not isinstance(layout, Whole):
                counted = layout.units * layout.elements * 4
                assert 0.25 < saved_bytes(call, branch) / counted <= 1, branch.name


@pytest.mark.parametrize(
    "name", ["mvit_v1", "mvit_v2", "r3d", "mc3", "r2plus1d", "bottlenecks", "slowfast"]
)
def test_a_block_that_changes_the_shape_says_so(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    changing = [call for call in block_calls(model, inputs) if changes_shape(call)]
    assert changing
    for call in changing:
        with pytest.raises(
            ChangesShapeError, match=r"pools|projects|convolution on its skip|turns"
        ):
            branches(call.block)


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        (
            "mvit_v2",
            "blocks.1",
            "it pools its tokens with stride 1 x 2 x 2 and projects 16 channels to 32",
        ),
        ("r3d", "layer2.0", "stride 2 and a convolution on its skip"),
        ("slowfast", "slow_path.layer2.0", "turns 48 channels into 64, with stride 2"),
        ("slowfast", "fast_path.layer1.0", "turns 2 channels into 8, with stride 1"),
    ],
)
def test_the_change_of_shape_is_described(name: str, block: str, message: str) -> None:
    model, _ = ZOO[name](depth=1)
    with pytest.raises(ChangesShapeError, match=message):
        branches(model.get_submodule(block))


@pytest.mark.parametrize("name", ["r3d", "r2plus1d", "bottlenecks"])
def test_layers_between_the_stages_of_a_resnet_are_recomputed(name: str) -> None:
    model, inputs = MODELS[name]()
    list(block_calls(model, inputs))  # loads the families
    for module in model.modules():
        between = isinstance(module, BasicStem | R2Plus1dStem)
        if isinstance(module, BasicBlock | Bottleneck):
            between = module.downsample is not None
        assert recomputed(module) == between


def masked_calls() -> Iterator[tuple[Call, bool]]:
    """Attention masks, and whether they have a row for each sample."""
    block = timm_variant(drop=0.0)[0][0]  # type: ignore[index]
    x = torch.randn(3, 5, 16)
    causal = torch.ones(5, 5).tril().bool()
    alike, apart = causal, torch.stack([causal, causal.T, causal | causal.T])[:, None]
    yield Call(block, x, (alike,), {}), False
    yield Call(block, x, (), {"attn_mask": apart}), True
    yield Call(block, x, (), {"is_causal": True}), False
    model, _ = ZOO["vivit"]()
    layer = model.get_submodule("layers.0")
    yield Call(layer, x, (apart,), {}), True
    yield Call(layer, x, (causal[None, None],), {}), False


def test_masks() -> None:
    for call, by_sample in masked_calls():
        call = call._replace(block=scrambled(call.block).eval())
        load_families(type(call.block))
        torch.testing.assert_close(chained(call), output_of(call))
        unmasked = call._replace(args=(), kwargs={})
        assert not torch.allclose(output_of(unmasked), output_of(call))
        attention = branches(call.block)[0]
        with torch.no_grad():
            found, layout = pieces(call, attention, 1)
            torch.testing.assert_close(found, call.run(attention))
        assert layout.units == (1 if by_sample else 3)


def test_modules_of_unknown_make_run_whole() -> None:
    from timm.layers import Attention, Mlp

    class Mixing(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean(1, keepdim=True)

    class Strange(Attention):
        pass

    block = timm_variant(drop=0.0, mlp_layer=Mixing, attn_layer=Strange)[0][0]  # type: ignore[index]
    load_families(type(block))
    assert [branch.cut for branch in branches(block)] == [None, None]


def test_a_subclass_belongs_to_the_family_of_its_base() -> None:
    from transformers.models.timesformer.modeling_timesformer import TimesformerLayer

    class Mine(TimesformerLayer):
        pass

    load_families(Mine)
    assert branches.dispatch(Mine) is branches.dispatch(TimesformerLayer)
    assert branches.dispatch(Mine) is not branches.dispatch(object)
    assert returned.dispatch(Mine) is not returned.dispatch(object)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("samples", [1, 3])
def test_attention_has_the_bits_of_multihead_attention(
    samples: int, dropout: float, dtype: torch.dtype
) -> None:
    """Results, gradients and random numbers; with a hook, the module itself is called."""
    torch.manual_seed(0)
    block = EncoderBlock(2, 16, 32, dropout, dropout, nn.LayerNorm)
    module = block.self_attention
    for bias in (module.in_proj_bias, module.out_proj.bias):
        nn.init.normal_(bias)
    load_families(EncoderBlock)
    branch, _ = branches(block)
    called: list[Any] = []

    def step(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(samples, 9, 16, requires_grad=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = function(x)
        y.float().pow(2).sum().backward()
        of_parameters = [p.grad for m in branch.modules for p in m.parameters()]
        found = [y, torch.rand(3), x.grad, *of_parameters]
        block.zero_grad()
        return [tensor_of(tensor) for tensor in found]

    ours = step(branch)
    module.register_forward_hook(lambda *given: called.append(given))
    theirs = step(branch)
    assert called
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_path_of_multihead_attention_is_given_back(enabled: bool) -> None:
    call = calls_of("vit")[0]
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with torch.no_grad():
            call.run(branches(call.block)[0])
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.slow
def test_no_library_is_imported_before_one_of_its_blocks_is_met() -> None:
    """For a layer of one model, the library's other models are not imported either."""
    code = """
import sys, torch
from re2tal.reversible.branches import branches, load_families
load_families(torch.nn.Linear)
assert not {"timm", "transformers"} & set(sys.modules)
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Layer as Layer
before = set(sys.modules)
load_families(Layer)
assert Layer in branches.registry
new = set(sys.modules) - before
assert not [m for m in new if m.startswith(("transformers", "timm"))], new
assert "transformers.models.vivit.modeling_vivit" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
