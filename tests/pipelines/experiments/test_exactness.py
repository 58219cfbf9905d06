"""Experiment `exactness`: exact results, drift, and libraries that are not installed."""

import copy
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pipelines.experiments.exactness import (
    ERROR,
    PEERS,
    Exactness,
    Peer,
    Recomputing,
    errors_of,
    quick,
    stored,
)
from re2tal.errors import UserError

ROOT = Path(__file__).parents[3]

BLOCKED = ("av", "mlflow", "optuna", "ray", "rich", "tyro")


@pytest.fixture(scope="module")
def results(results_of: Callable[[Exactness], dict[str, Any]]) -> dict[str, Any]:
    return results_of(quick())


def test_ours_is_exact_and_floating_point_is_not(results: dict[str, Any]) -> None:
    asked = quick()
    rows = results["ours"]["rows"]
    cases = {(row["library"], row["branches"], row["precision"]): row for row in rows}
    assert len(cases) == 2 * len(asked.depths) * len(asked.precisions)
    for (library, _, _), row in cases.items():
        exact = library == "ours"
        assert (row[ERROR] == 0) == exact
        assert row["bit for bit"] == ("yes" if exact else "no")


def test_the_form_of_minrev_drifts_as_ours_without_the_grid(results: dict[str, Any]) -> None:
    ours = [row[ERROR] for row in results["ours"]["rows"] if row["library"] == "ours, float"]
    theirs = [row[ERROR] for row in results["minREV's form"]["rows"]]
    assert theirs == pytest.approx(ours, rel=0.5)


def test_what_the_report_says(results: dict[str, Any]) -> None:
    section = quick().section(results)
    exact, drifting = section.findings
    assert exact.holds
    assert exact.evidence.startswith("6 of 6 cases")
    assert drifting.holds
    (rows,) = section.tables.values()
    assert {row["library"] for row in rows} == {"ours", "ours, float", *PEERS}
    assert isinstance(section.figures["exactness"], Figure)
    assert section.metrics["exactness/ours"] == 0 < section.metrics["exactness/minREV_s_form"]


def test_an_error_of_ours_would_be_told(results: dict[str, Any]) -> None:
    off = copy.deepcopy(results)
    off["ours"]["rows"][0][ERROR] = 1e-9
    exact, _ = quick().section(off).findings
    assert exact.holds is False
    assert exact.evidence.startswith("5 of 6 cases")


@pytest.mark.parametrize("library", [name for name, peer in PEERS.items() if peer.package])
def test_public_libraries_compute_the_same_but_for_rounding(library: str) -> None:
    try:
        metadata.version(PEERS[library].package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    (row,) = errors_of(library=library, depths=[12], precisions=["float32"])["rows"]
    assert 0 < row[ERROR] < 1e-6


class Storing(nn.Module):
    """Ordinary autograd, which is the reference itself."""

    def __init__(self, branches: Any) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, streams: Tensor) -> Tensor:
        return stored(streams, list(self.branches))


class Halving(Storing):
    """Peer that computes another function."""

    def forward(self, streams: Tensor) -> Tensor:
        return super().forward(streams / 2)


def fails(branches: Any) -> nn.Module:
    raise RuntimeError("no such operator\nin this version")


@pytest.mark.parametrize(
    ("peer", "error", "equal"),
    [
        (Peer("no-such-package-anywhere", fails), "not installed", ""),
        (Peer("", fails), "RuntimeError: no such operator", ""),
        (Peer("", lambda branches: Storing(branches[:-2])), "RuntimeError: 12 parameters", ""),
        (Peer("", Storing), 0, "yes"),
    ],
    ids=["absent", "failing", "forgetful", "the reference"],
)
def test_what_is_told_of_a_library(
    peer: Peer,
    error: Any,
    equal: str,
    monkeypatch: pytest.MonkeyPatch,
    results_of: Callable[[Exactness], dict[str, Any]],
) -> None:
    monkeypatch.setitem(PEERS, "memcnn", peer)
    asked = Exactness(depths=(4,), precisions=("bfloat16",), libraries=("memcnn",))
    found = results_of(asked)
    (row,) = found["memcnn"]["rows"]
    assert row["bit for bit"] == equal
    assert row[ERROR] == 0 if error == 0 else row[ERROR].startswith(error)
    (rows,) = asked.section(found).tables.values()
    assert row in rows


def test_another_function_has_other_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "memcnn", Peer("", Halving))
    (row,) = errors_of(library="memcnn", depths=[4], precisions=["float32"])["rows"]
    assert row[ERROR] > 0.1


def test_the_reference_is_in_the_same_precision() -> None:
    """The reference computes in bfloat16 too; else the error would be that of bfloat16, 4e-3."""
    rows = errors_of(library="minREV's form", depths=[12], precisions=["bfloat16"])["rows"]
    # floating-point streams drift by 4.5e-4 on processors without AVX2, by less than 1e-4 on others
    assert rows[0][ERROR] < 1e-3


def test_recomputing_has_the_gradients_of_autograd() -> None:
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(6)]
    network = Recomputing(branches)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *network.parameters()]
    wanted, found = stored(x, branches), network(x)
    assert torch.equal(wanted, found)
    for a, b in zip(
        torch.autograd.grad(wanted.square().sum(), inputs),
        torch.autograd.grad(found.square().sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_recomputing_stores_its_output_alone() -> None:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    network = Recomputing([nn.Linear(8, 8) for _ in range(10)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(4, 16, requires_grad=True))
    assert sizes == [4 * 16]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="in pairs, but a depth is 3"):
        Exactness(depths=(2, 3))
    with pytest.raises(UserError, match=r"no library revnet\. Choose from: memcnn"):
        Exactness(libraries=("revnet",))


@pytest.mark.slow
def test_experiments_on_memory_and_speed_need_neither_ray_nor_mlflow_nor_pyav() -> None:
    program = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED}))
from pipelines.experiments import devices, exactness, memory, speed
asked = exactness.Exactness(depths=(2,), precisions=("float32",))
results = {{job.name: job.work(**job.arguments) for job in asked.jobs()}}
assert memory.quick().jobs() and speed.quick().jobs()
print(asked.section(results).findings[0].holds)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr
