"""Small residual blocks with registered families, and comparisons of steps."""

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from re2tal.reversible import Branch, branches, recomputed, rewire, set_reversible


class MlpBlock(nn.Module):
    """Block x + drop(two(gelu(one(norm(x))))) for x (B, C)."""

    def __init__(self, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.one = nn.Linear(width, 2 * width)
        self.two = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def branch(self, x: Tensor) -> Tensor:
        return self.drop(self.two(nn.functional.gelu(self.one(self.norm(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@branches.register
def _mlp(block: MlpBlock) -> list[Branch]:
    return [Branch("mlp", (block.norm, block.one, block.two, block.drop), block.branch)]


class PairBlock(nn.Module):
    """Block of two branches of any modules, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


@branches.register
def _pair(block: PairBlock) -> list[Branch]:
    return [Branch("first", (block.first,)), Branch("second", (block.second,))]


class RectifiedBlock(nn.Module):
    """Block relu(x + linear(x)) for x (B, C)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.linear(x))


@branches.register
def _rectified(block: RectifiedBlock) -> list[Branch]:
    return [Branch("linear", (block.linear,), activation=torch.relu)]


class Stem(nn.Module):
    """Recomputed layer with statistics and dropout, which counts how often it runs."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.4)
        self.ran = 0

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Any:
        self.ran += 1
        return self.drop(torch.tanh(self.norm(self.linear(x)))) * scale


@recomputed.register
def _stem(module: Stem) -> bool:
    return True


def stems_and_stages(stem: nn.Module | None = None, **options: Any) -> nn.Sequential:
    """A rewired model for x (B, 6): stem, stage, a layer like the stem, stage."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for between in (Stem(), stem or Stem()):
        parts += [between, nn.Sequential(*(MlpBlock(dropout=0.2) for _ in range(3)))]
    model = nn.Sequential(*parts)
    rewire(model, **options)
    return model


def tiny_swin(
    depths: Iterable[int] = (2, 3), *, drop_path: float = 0.0, dropout: float = 0.0, width: int = 8
) -> SwinTransformer3d:
    return SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=width,
        depths=list(depths),
        num_heads=[2] * len(list(depths)),
        window_size=[2, 4, 4],
        stochastic_depth_prob=drop_path,
        dropout=dropout,
        num_classes=3,
    )


def stack(depth: int = 4, *, width: int = 6, dropout: float = 0.0, **options: Any) -> nn.Sequential:
    """A rewired stage of blocks for x (B, width)."""
    torch.manual_seed(0)
    model = nn.Sequential(*(MlpBlock(width, dropout) for _ in range(depth)))
    rewire(model, **options)
    return model


def points(rows: int = 5, width: int = 6, *, requires_grad: bool = False) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, width, requires_grad=requires_grad)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of one forward and backward, and the generator's state after them."""

    output: Tensor
    gradients: dict[str, Tensor | None]
    generator: Tensor


def squares(y: Tensor) -> Tensor:
    return y.float().pow(2).sum()


def one_step(
    model: nn.Module, *inputs: Tensor, seed: int = 0, loss: Callable[[Tensor], Tensor] = squares
) -> StepResult:
    """Run forward and backward from a seed; the gradients include those of the inputs."""
    tensors = {f"input {i}": x for i, x in enumerate(inputs)} | dict(model.named_parameters())
    for tensor in tensors.values():
        tensor.grad = None
    torch.manual_seed(seed)
    output = model(*inputs)
    loss(output).backward()
    found = {name: None if t.grad is None else t.grad.clone() for name, t in tensors.items()}
    return StepResult(
        output=output.detach(), gradients=found, generator=torch.get_rng_state().clone()
    )


def assert_equal_gradients(a: StepResult, b: StepResult, *, tolerance: float = 0.0) -> None:
    """Check that the same gradients exist, equal to the bit or within a tolerance."""
    assert a.gradients.keys() == b.gradients.keys()
    for name, gradient in a.gradients.items():
        other = b.gradients[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None and tolerance == 0:
            assert torch.equal(gradient, other), name
        elif gradient is not None and other is not None:
            # The floor is for gradients whose true value is zero, as of a bias before a BatchNorm.
            error = (gradient.to(other.dtype) - other).norm() / other.norm().clamp(min=1e-5)
            assert error <= tolerance, (name, error)


def assert_same_step(a: StepResult, b: StepResult, *, tolerance: float = 0.0) -> None:
    """Check that outputs and generators are equal to the bit, and gradients within a tolerance."""
    assert torch.equal(a.output, b.output)
    assert torch.equal(a.generator, b.generator)
    assert_equal_gradients(a, b, tolerance=tolerance)


def assert_reversible_is_stored(
    model: nn.Module, *inputs: Tensor, tolerance: float = 0.0, seed: int = 0
) -> StepResult:
    """Compare a step with rebuilt and one with stored activations; return the former."""
    set_reversible(model, False)
    stored = one_step(model, *inputs, seed=seed)
    set_reversible(model, True)
    rebuilt = one_step(model, *inputs, seed=seed)
    assert_same_step(rebuilt, stored, tolerance=tolerance)
    return rebuilt


def _saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": _saved_and_loaded,
}
every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
