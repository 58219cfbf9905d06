"""Blocks of classes without a registered family: proofs and refusals."""

import copy
import random
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlockV2
from torchvision.ops import StochasticDepth

from re2tal.memory import measure_activations, predict_peak
from re2tal.reversible import ReversibleError, rewire, set_reversible, unwire
from re2tal.reversible.branches import NotReversibleError, returned, split
from re2tal.reversible.families.pattern import _OnTokens
from re2tal.reversible.layouts import Samples, Whole
from tests.reversible.toy_blocks import assert_same_step, one_step

WIDTH = 6


class Mixing(nn.Module):
    """Attention in its simplest form, for (B, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        result: Tensor = self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return result


class Parts(nn.Module):
    """Parts of a transformer block; subclasses below define forwards."""

    def __init__(self, drop: float = 0.3) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Mixing()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))
        self.gamma, self.scale = (nn.Parameter(torch.full((WIDTH,), 1e-5)) for _ in range(2))
        self.drop_path, self.drop = StochasticDepth(drop, "row"), nn.Dropout(drop)


class PreNorm(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale * self.attn(self.norm1(x)))
        return x + self.drop_path(self.drop(self.mlp(self.norm2(x))) * self.gamma)


class PostNorm(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale * self.norm1(self.attn(x)))
        x += self.gamma * self.norm2(self.mlp(x))
        return x


class Parallel(Parts):
    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        return x + self.scale * self.attn(normed) + self.gamma * self.mlp(self.norm2(normed))


class OnGrid(Parts):
    """Channels last; the MLP is added to flattened tokens, as in timm's Swin."""

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        assert h * w != 48 or h == 8, "a grid of its own"
        tokens = self.scale * self.attn(self.norm1(x).reshape(b, h * w, c)).view(b, h, w, c)
        x = x + self.drop_path(tokens)
        x = x.reshape(b, -1, c)
        x = x + self.gamma * self.drop_path(self.mlp(self.norm2(x)))
        return x.reshape(b, h, w, c)


class Turned(Parts):
    """Channels first; attention and MLP are added to tokens (B, N, C), as in DaViT."""

    def __init__(self) -> None:
        super().__init__()
        self.cpe = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x + self.cpe(x)
        y = x.flatten(2).transpose(1, 2)
        y = y + self.attn(self.norm1(y)) * self.gamma
        y = y + self.mlp(self.norm2(y)) * self.scale
        return y.transpose(1, 2).view(b, c, h, w)


class ScaledSkip(Parts):
    """The skip connection is scaled as well, as in MetaFormer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x + self.scale * self.mlp(self.norm2(self.attn(self.norm1(x))))


class Convolutions(nn.Module):
    def __init__(self, after: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(WIDTH, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.relu, self.after = nn.ReLU(inplace=True), after

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return y if self.after is None else self.after(y)


class NextLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH, 1, 1), 1e-6))
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.scale * y + self.shortcut(x)


class Keeping(Parts):
    """Keeps results for later calls in eval mode, as LeViT keeps its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.kept_too: Tensor | None = None

    def train(self, mode: bool = True) -> "Keeping":
        self.kept, self.kept_too = {}, None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            scale, gamma = self.scale * 2, self.gamma * 2
        else:
            scale = self.kept.setdefault("scale", self.scale * 2)
            self.kept_too = gamma = self.gamma * 2 if self.kept_too is None else self.kept_too
        x = x + scale * self.attn(self.norm1(x))
        return x + gamma * self.mlp(self.norm2(x))


class OneBranch(Parts):
    """The second sum uses the block's input, so the whole block is one branch."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.scale * self.attn(self.norm1(x))
        return x + self.gamma * self.mlp(self.norm2(y))


TOKENS, GRID, PLANES = (2, 5, WIDTH), (2, 4, 3, WIDTH), (3, WIDTH, 4, 4)

RESIDUAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, type]]] = {
    "pre-norm": (PreNorm, TOKENS, {"attn": Samples, "mlp": _OnTokens}),
    "post-norm": (PostNorm, TOKENS, {"attn": Samples, "mlp": _OnTokens}),
    "parallel": (Parallel, TOKENS, {"attn, mlp": Samples}),
    "channels last": (OnGrid, GRID, {"attn": Samples, "mlp": _OnTokens}),
    "turned": (Turned, PLANES, {"cpe": Samples, "attn": Samples, "mlp": Samples}),
    "scaled skip": (ScaledSkip, TOKENS, {"attn, mlp": Samples}),
    "keeping": (Keeping, TOKENS, {"attn": Samples, "mlp": _OnTokens}),
    "one branch": (OneBranch, TOKENS, {"attn, mlp": Samples}),
    "ReLU after": (lambda: Convolutions(nn.ReLU(inplace=True)), PLANES, {"conv2": Samples}),
    "linear after": (Convolutions, PLANES, {"conv2": Samples}),
    "ConvNeXt": (NextLike, PLANES, {"conv, mlp": Samples}),
}
every_pattern = pytest.mark.parametrize("name", RESIDUAL)


def stage(name: str, depth: int = 2) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    build, shape, _ = RESIDUAL[name]
    model = nn.Sequential(*(build() for _ in range(depth)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.2, 0.4)
    return model, torch.randn(shape, requires_grad=True)


@every_pattern
def test_a_block_is_the_sum_of_its_branches_and_they_are_cut(name: str) -> None:
    model, x = stage(name, 1)
    block, wanted = model[0], RESIDUAL[name][2]
    for training in (False, True):
        found = split(block.train(training))
        layouts = [b.cut(x) if b.cut is not None else Whole((), {}) for b in found]
        assert {b.name: type(at) for b, at in zip(found, layouts, strict=True)} == wanted
        torch.manual_seed(1)
        y = x.detach()
        for branch in found:
            added = branch(y)
            if branch.drop_path is not None:
                added = added * branch.drop_path(y.new_ones(len(y), 1)).view(
                    -1, *(1,) * (y.dim() - 1)
                )
            y = y + added if branch.activation is None else branch.activation(y + added)
        torch.manual_seed(1)
        torch.testing.assert_close(y, block(x.detach().clone()), rtol=1e-5, atol=1e-5)


@every_pattern
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_stored_activations(name: str, training: bool) -> None:
    model, x = stage(name)
    model.train(training)
    whole = copy.deepcopy(model)
    rewire(whole, slice_bytes=None)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rewire(model, slice_bytes=1)  # pieces of one token or sample
    model.load_state_dict(state, strict=True)
    found = []
    for reversible in (True, False):
        model.load_state_dict(state)
        set_reversible(model, reversible)
        found.append(one_step(model, x))
    assert_same_step(*found)
    assert all(gradient is not None for gradient in found[0].gradients.values())
    if not training:  # pieces would draw other masks
        torch.testing.assert_close(found[0].output, one_step(whole, x).output, rtol=1e-4, atol=1e-3)


@every_pattern
def test_a_piece_is_counted_with_all_that_is_kept_of_it(name: str) -> None:
    model, x = stage(name, 1)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for branch in split(model[0].eval()):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            branch(x)
        assert branch.cut is not None
        layout = branch.cut(x)
        assert 0.2 < sum(kept.values()) / (layout.units * layout.elements * 4) <= 1


class NormLast(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(x + self.attn(self.norm1(x)))


class Gated(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.attn(self.norm1(x)).sigmoid()


class Drawing(Parts):
    """Uses random numbers that cannot be drawn again."""

    def forward(self, x: Tensor) -> Tensor:
        return x + random.random() * self.mlp(self.norm1(x))


class Hidden(Parts):
    """Uses a tensor that no recorded operator made."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(self.mlp(x).detach().numpy())


class Deciding(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x + (self.mlp(x) if x.sum() > 0 else self.attn(x))


class Sharing(Parts):
    """Keeps a result where the recorder does not look."""

    kept: ClassVar[dict[str, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale * 2
        if self.training:
            scale = self.kept.setdefault("scale", scale)
        return x + scale * self.mlp(self.norm1(x))


class InPlace(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) + self.mlp(x)


class Modal(Parts):
    """Computes another function in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm1(x))
        return x + self.attn(self.norm2(x)) if self.training else x


class Narrowing(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.mlp(x))[..., :3]


class Strided(nn.Module):
    """Has a convolution on the skip connection, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.skip = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(4, 8, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + self.skip(x))


class TwoResults(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.attn(x)
        return x + y, y


IMPOSTORS: dict[type[nn.Module], str] = {
    NormLast: "its forward is not a sum of its input and a branch, but ends in its module norm2",
    Gated: "but ends in __mul__|but ends in mul",
    Drawing: "its forward is not the sum of its branches mlp: on a random input in eval mode",
    Hidden: "uses a tensor of shape .* that no operator seen has made",
    Deciding: "its forward decides by values of tensors",
    Sharing: r"its forward did not run in parts \(\w+: ",
    InPlace: "modifies its input in place|not a chain|not a sum",
    Modal: "other branches in training mode than in eval mode",
    Narrowing: r"it turns \(3, .*6\) into \(3, .*3\)",
    Strided: r"it turns \(3, 4, .*\) into \(3, 8, ",
    TwoResults: "returns more than one tensor that it has computed",
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_the_same_parts_with_another_forward_are_refused(kind: type[nn.Module]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, WIDTH)
            self.blocks = nn.ModuleList(kind() for _ in range(3))

    with pytest.raises(NotReversibleError, match=IMPOSTORS[kind]):
        split(kind())
    # The refusal names all of the blocks, not only the model.
    with pytest.raises(
        ValueError, match=rf"blocks\.0…2 \({kind.__name__}\): .*({IMPOSTORS[kind]})"
    ):
        rewire(Model())


def test_a_block_that_changes_the_shape_beside_its_skip_connection_is_recomputed() -> None:
    model = nn.Sequential(nn.Sequential(Strided()), nn.Sequential(Convolutions()))
    model[1] = nn.Sequential(nn.Conv2d(8, WIDTH, 1), Convolutions(nn.ReLU()))
    (strided,) = (row for row in rewire(model).left_out if row.kind == "Strided")
    assert strided.recomputed


def test_the_proof_leaves_no_trace() -> None:
    torch.manual_seed(0)
    called: list[str] = []
    first, second = Convolutions(), PreNorm()
    model = nn.Sequential(first, second)
    first.conv1.register_forward_hook(lambda *_: called.append("hook"))
    first.bn1.eval()
    second.norm1.requires_grad_(False)
    first.conv2.weight.grad = torch.ones_like(first.conv2.weight)

    def everything() -> list[Any]:
        tensors = (*model.named_parameters(), *model.named_buffers())
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            [m.training for m in model.modules()],
            [(n, id(t), t._version, t.tolist(), t.requires_grad, t.device) for n, t in tensors],
            [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            [list(vars(m)) for m in model.modules()],
            torch.backends.mha.get_fastpath_enabled(),
        ]

    before = everything()
    assert [len(split(block)) for block in model] == [1, 2]
    assert everything() == before
    assert not called


class Calling(nn.Module):
    """Blocks of transformers, with further arguments and more than one result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Mixing()

    def forward(
        self, x: Tensor, grid: tuple[int, int] | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        y = self.attn(self.norm(x))
        x = x + (y if bias is None else y + bias)
        if grid == (1, 1):
            x = x + self.attn(self.norm(x))
        return x, grid


def test_arguments_and_results_of_a_call_are_those_of_the_block() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Calling() for _ in range(2))
    x, bias = torch.randn(TOKENS, requires_grad=True), torch.randn(5, WIDTH)
    wanted = blocks[0](x, (5, 1), bias=bias)
    (branch,) = split(blocks[0])
    torch.testing.assert_close(x + branch(x, (5, 1), bias=bias), wanted[0])
    assert returned(blocks[0], x, (5, 1), bias=bias) == (x, (5, 1))
    rewire(blocks)

    def run(grid: tuple[int, int]) -> Any:
        first = blocks[0](x, grid, bias=bias)
        return blocks[1](first[0], grid, bias=bias)

    y, grid = run((5, 1))
    assert grid == (5, 1)
    y.sum().backward()
    assert x.grad is not None
    with pytest.raises(ReversibleError, match="has 2 branches, and had 1 with random inputs"):
        run((1, 1))


def test_inner_blocks_come_first_and_a_lonely_one_belongs_to_its_block() -> None:
    class Stage(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Convolutions() for _ in range(count)))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.blocks(x)
            return x + y

    assert [s.container for s in rewire(nn.Sequential(Stage(2))).stages] == ["0.blocks"]
    model = nn.Sequential(Stage(1))
    assert [s.container for s in rewire(model).stages] == [""]
    unwire(model)


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_base() -> None:
    block = SwinTransformerBlockV2(8, 2, [4, 4], [0, 0]).eval()
    x = torch.randn(2, 8, 8, 8)
    y = x
    for branch in split(block):
        y = y + branch(y)
    torch.testing.assert_close(y, block(x))


@pytest.mark.parametrize("count", [predict_peak, measure_activations])
def test_trying_out_a_blocks_forward_takes_no_memory(count: Any) -> None:
    model, x = stage(next(iter(RESIDUAL)))
    rewire(model)
    found = [count(model, x.detach()) for _ in range(2)]  # the first meets a new shape
    assert found[0] == found[1]
