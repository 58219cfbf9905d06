"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) in the linear layers of a backbone's blocks.

A layer W x + b becomes W x + b + (s / r) B A x, with matrices A of r rows and B of r columns. B is
zero at the start, so the output of the backbone does not change at all. The layers are those of the
library peft, which is imported only when LoRA is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from re2tal.errors import UserError, check_within
from re2tal.reversible.branches import Branch, kept_beside, split
from re2tal.reversible.rewire import reversible_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Shape of LoRA's matrices.

    Attributes:
        rank: r, rows of A and columns of B.
        scale: s; the product of the matrices is multiplied by `scale / rank`.
        dropout: probability of dropout before A.
        layers: branches of a block whose linear layers get LoRA: "attention", "mlp" or "all".
    """

    rank: int = 8
    scale: float = 16.0
    dropout: float = 0.0
    layers: Literal["attention", "mlp", "all"] = "all"

    def __post_init__(self) -> None:
        check_within(self, rank=(1, 2**14), scale=(1e-6, 1e6), dropout=(0, 0.999))

    def add_to(self, backbone: nn.Module) -> list[nn.Module]:
        """Add the matrices to the linear layers of all residual blocks, in place.

        Returns:
            The layers with LoRA.

        Raises:
            UserError: peft is not installed, or there are no such layers.
        """
        names = [*self._names(backbone)]
        if not names:
            raise UserError(
                f"--model.tuning lora: the blocks of this {type(backbone).__name__} have no linear "
                f"layers of --model.lora.layers {self.layers}."
            )
        config = _peft().LoraConfig(
            r=self.rank, lora_alpha=self.scale, lora_dropout=self.dropout, target_modules=names
        )
        _peft().inject_adapter_in_model(config, backbone)
        del backbone.peft_config  # peft's configuration on the whole backbone, which is not used
        return [backbone.get_submodule(name) for name in names]

    def _names(self, backbone: nn.Module) -> Iterator[str]:
        """Yield the names of the chosen linear layers, each once."""
        chosen = {
            module
            for block in reversible_blocks(backbone).values()
            for branch in split(block)
            if self._takes(branch)
            for top in branch.modules
            for module in top.modules()
        }
        for name, module in backbone.named_modules():
            if type(module) is nn.Linear and module in chosen:
                yield name

    def _takes(self, branch: Branch) -> bool:
        return self.layers == "all" or ("attention" in branch.name) is (self.layers == "attention")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "--model.tuning lora needs the library peft, which cannot be imported "
            f"({error}): pip install 're2tal[backbones]'."
        ) from error
    kept_beside.register(peft.tuners.lora.LoraLayer, _kept)
    return peft


def _kept(layer: Any) -> int:
    """Count the elements kept per token: A x and its gradient; dropout's mask and result."""
    dropped = any(isinstance(part, nn.Dropout) for part in layer.lora_dropout.values())
    inside: int = sum(layer.r.values())
    return 2 * inside + 2 * dropped * int(layer.in_features)
