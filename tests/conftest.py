"""What all tests share."""

import os

# Where there are more threads than free cores, PyTorch's wait for one another by spinning: beside
# two busy processes a training on toy data took 109 s of CPU time in the place of 5. Read when
# PyTorch is loaded, here and in all scripts and Ray processes that tests start.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch

# tests run beside one another and beside Ray's workers; small tensors gain nothing from threads
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the last to end should not be the one that takes longest."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
