"""Kinds of backbones: the rows of the table, for the smallest backbone of each library."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import re2tal.reversible
from pipelines.experiments import kinds
from pipelines.experiments.__main__ import RESULTS
from pipelines.experiments.harness import markdown, table
from pipelines.experiments.kinds import EQUAL, KINDS, Kinds, rewired_row


@pytest.mark.parametrize(
    ("library", "kind", "blocks", "branches"),
    [
        ("timm", "eva02", "3 EvaBlock", 6),  # called with rotary angles
        ("timm", "convnextv2", "12 ConvNeXtBlock", 12),
        ("transformers", "DINOv3", "3 DINOv3ViTLayer", 6),  # does not run without its angles
        ("transformers", "BEiT", "3 BeitLayer", 6),  # nor this without the image's size
    ],
)
def test_a_kind_is_rewired_with_the_gradients_of_stored_activations(
    library: str, kind: str, blocks: str, branches: int
) -> None:
    row = rewired_row(library, kind)
    assert (row["reversible"], row["branches"]) == (blocks, branches)
    assert row["strict loading"] == "yes"
    assert row["fp32"] == row["bf16"] == EQUAL


def test_kinds_that_are_not_rewired_are_listed_with_their_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sum(map(len, KINDS.values())) == 49

    class Plain(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input).tanh()

    small = {"own": {"plain": lambda: (nn.ModuleList([Plain(4, 4)]), (torch.randn(2, 4),))}}
    monkeypatch.setattr(kinds, "KINDS", small)
    row = rewired_row("own", "plain")
    assert row["reversible"].startswith(f"{kinds.REFUSED}: 0 (Plain): its forward is not a sum")
    section = Kinds(libraries=("own",)).section({"own: plain": row})
    assert section.findings[0].holds is None
    assert section.findings[0].evidence == "0 of 1 are rewired, 0 are equal"


def test_the_engines_readme_has_the_table_that_the_command_prints() -> None:
    readme = Path(re2tal.reversible.__file__ or "").with_name("README.md").read_text("utf-8")
    record = json.loads((RESULTS / "kinds.json").read_text("utf-8"))
    (rows,) = record["tables"].values()
    assert [(row["library"], row["model"]) for row in rows] == [
        (library, kind) for library, found in KINDS.items() for kind in found
    ]
    printed = table(rows)
    assert printed in markdown(record)
    assert readme.count("| library | model |") == readme.count(printed) == 1
