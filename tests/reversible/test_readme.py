"""The family that the README makes up works as it is printed."""

import re
from pathlib import Path
from typing import Any

import torch

import re2tal.reversible
from re2tal.reversible import rewire, unwire


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
