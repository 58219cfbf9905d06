"""What all tests share."""

import importlib.metadata
import os
import platform
from pathlib import Path

# Where there are more threads than free cores, PyTorch's wait for one another by spinning: beside
# two busy processes a training on toy data took 109 s of CPU time in the place of 5. Read when
# PyTorch is loaded, here and in all scripts and Ray processes that tests start.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import pytest
import torch

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the last to end should not be the one that takes longest."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
