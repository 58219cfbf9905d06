"""What all tests share."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

# Where there are more threads than free cores, PyTorch's wait for one another by spinning: beside
# two busy processes a training on toy data took 109 s of CPU time in the place of 5. Read when
# PyTorch is loaded, here and in all scripts and Ray processes that tests start.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import pytest
import torch

from tests.ranks import Ranks

# tests run beside one another and beside Ray's workers; small tensors gain nothing from threads
torch.set_num_threads(1)

LIBRARIES = (
    "torch",
    "torchvision",
    "numpy",
    "av",
    "ray",
    "mlflow",
    "optuna",
    "transformers",
    "timm",
)


def pytest_report_header() -> list[str]:
    """The processor and the libraries, on which numbers may depend."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    processor = facts.get("model name", platform.processor() or platform.machine())
    flags = set(facts.get("flags", "").split())
    kinds = sorted(flag for flag in flags if flag.startswith(("avx", "amx")))
    found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    capability = torch.backends.cpu.get_cpu_capability()
    installed = (name for name in LIBRARIES if _version(name))
    return [
        f"processor: {processor}, {os.cpu_count()} threads; {' '.join(kinds) or 'no AVX'}",
        f"instructions: PyTorch computes with {capability}, NumPy with {' '.join(found) or 'SSE'}",
        "libraries: " + ", ".join(f"{name} {_version(name)}" for name in installed),
    ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes of one gloo group."""
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()


SHARED = ("ray_instance", "ranks")
"""Fixtures of a test run that take seconds to start: all their tests go to one xdist worker."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests into groups that stay together, and the groups that take longest first.

    A group is a file or the users of a shared fixture. xdist hands them out one after the other, so
    short ones at the end keep all its workers busy.
    """
    group = {item: _group(item) for item in items}
    slow = {group[item] for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (group[item] not in SHARED, group[item] not in slow))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group[item]))


def _group(item: pytest.Item) -> str:
    fixtures = getattr(item, "fixturenames", ())
    return next((name for name in SHARED if name in fixtures), item.path.stem)
