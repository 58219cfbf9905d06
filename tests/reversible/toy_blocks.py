"""Small residual blocks with registered families, and what the tests compare."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from re2tal.reversible import Branch, branches, set_reversible


class MlpBlock(nn.Module):
    """x + drop(two(gelu(one(norm(x))))) for x (B, C)."""

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
    """Two branches of any modules, one after another."""

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
    """relu(x + linear(x)) for x (B, C)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.linear(x))


@branches.register
def _rectified(block: RectifiedBlock) -> list[Branch]:
    return [Branch("linear", (block.linear,), activation=torch.relu)]


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


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Of one forward and backward."""

    output: Tensor
    gradients: dict[str, Tensor | None]
    generator: Tensor


def one_step(
    model: nn.Module,
    *inputs: Tensor,
    seed: int = 0,
    loss: Callable[[Tensor], Tensor] = lambda y: y.float().pow(2).sum(),
) -> StepResult:
    """Forward and backward from a seed; the gradients include those of the inputs."""
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


def assert_same_step(a: StepResult, b: StepResult, *, tolerance: float = 0.0) -> None:
    """Outputs bit-equal; gradients present in both or in neither, and equal within a share."""
    assert torch.equal(a.output, b.output)
    assert torch.equal(a.generator, b.generator)
    assert a.gradients.keys() == b.gradients.keys()
    for name, gradient in a.gradients.items():
        other = b.gradients[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None and tolerance == 0:
            assert torch.equal(gradient, other), name
        elif gradient is not None and other is not None:
            # The floor is for gradients that are zero in truth, as of a bias before a batch norm.
            error = (gradient - other).norm() / other.norm().clamp(min=1e-5)
            assert error <= tolerance, (name, error)


def assert_reversible_is_stored(
    model: nn.Module, *inputs: Tensor, tolerance: float = 0.0, seed: int = 0
) -> StepResult:
    """A step with rebuilt activations against one with stored ones: bit-equal, or close."""
    set_reversible(model, False)
    stored = one_step(model, *inputs, seed=seed)
    set_reversible(model, True)
    rebuilt = one_step(model, *inputs, seed=seed)
    assert_same_step(rebuilt, stored, tolerance=tolerance)
    return rebuilt
