"""Fixtures of all tests, one thread, and the order in which processes run them."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Where there are more threads than free cores, PyTorch's wait for one another by spinning: beside
# two busy processes a training on toy data took 109 s of CPU time in the place of 5. Read when
# PyTorch is loaded, here and in all scripts and Ray processes that tests start.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.ranks import Ranks

ROOT = Path(__file__).parents[1]

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


SHARED = ("ray_instance", "ranks: Ranks")
"""Fixtures that take seconds to start, as test files name them: one xdist worker has each."""


@cache
def _group(file: str) -> str:
    """The group of a test file: the users of a shared fixture, or the file itself."""
    text = (ROOT / file).read_text()
    return next((name for name in SHARED if name in text), file)


class _Groups(LoadScopeScheduling):
    """Groups of files stay together; the marker `xdist_group` would group single tests."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """Scheduler of `--dist loadscope`, whose scopes are the groups."""
    return _Groups(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups with slow tests first: the last to end should not be the one that takes longest."""
    group = {item: _group(item.path.relative_to(ROOT).as_posix()) for item in items}
    slow = {group[item] for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (group[item] not in SHARED, group[item] not in slow))
