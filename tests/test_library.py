"""The library as its users meet it: `import re2tal`, its names, its version, its wheel."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import re2tal

ROOT = Path(__file__).parents[1]
STATED: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

ALONE = """
import sys, re2tal
names, version = dir(re2tal), re2tal.__version__
assert {"detect", "rewire", "unwire", "backbones", "videos"} <= set(names), names
assert not [name for name in names if name.startswith("_") and not name.startswith("__")], names
heavy = {"torch", "numpy", "av"} & set(sys.modules)
assert not heavy, heavy
print(version)
"""


def test_names_and_version_cost_no_import_of_pytorch() -> None:
    # -S: without the environment's packages, as in a checkout that was never installed
    command = [sys.executable, "-S", "-c", ALONE]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == STATED["version"]


def test_the_version_of_an_installed_package_is_its_metadata(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"re2tal": "9.8.7"}.__getitem__)
    assert re2tal.__version__ == "9.8.7"


def test_each_listed_name_is_there() -> None:
    for name in dir(re2tal):
        assert getattr(re2tal, name) is not None, name
    with pytest.raises(AttributeError, match="'re2tal' has no attribute 'retal'"):
        _ = re2tal.retal


def test_extras_of_the_wheel_install_what_its_code_imports(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        stated = message_from_bytes(archive.read(metadata))
        code = "\n".join(archive.read(name).decode() for name in names if name.endswith(".py"))
    assert stated["Version"] == STATED["version"]
    assert not [name for name in names if not name.startswith(("re2tal/", "re2tal-"))]
    assert "re2tal/py.typed" in names
    needed = [Requirement(one) for one in stated.get_all("Requires-Dist", [])]
    used = r"(import |from |library\(\"){}\b"  # `library`: imports what a backbone is built of
    unused = [one.name for one in needed if not re.search(used.format(one.name), code)]
    assert not unused
