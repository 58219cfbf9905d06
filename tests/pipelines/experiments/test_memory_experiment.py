"""Experiments `memory` and `finetuning`: predictions, what fits, and their reports."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from pipelines.experiments.finetuning import Finetuning, needs, subject_of
from pipelines.experiments.memory import NO_GPU, OUT_OF_MEMORY, Memory, peaks, quick, resident
from pipelines.experiments.pictures import apart
from pipelines.experiments.planner import Planner, backbone_alone
from pipelines.training.workload import Workload
from re2tal.backbones.adapters import AdapterConfig
from re2tal.errors import UserError
from re2tal.memory.fit import GIBIBYTE
from re2tal.memory.ways import KEEPING, WAYS

TITLES = {way: WAYS[way].title for way in KEEPING}


CARD = quick().cards[0]
UNIT = 16  # frames that the toy backbone takes without padding


@pytest.fixture(scope="module")
def results(results_of: Callable[[Memory], dict[str, Any]]) -> dict[str, Any]:
    return results_of(quick())


def close(results: dict[str, Any]) -> dict[str, Any]:
    return {way: results[f"swin_toy, 64 px, {title}"] for way, title in TITLES.items()}


def test_ours_needs_less_than_checkpoints_and_they_less_than_plain(results: dict[str, Any]) -> None:
    found = close(results)
    for column in ("frames", "depths"):
        sizes = [found[way][column] for way in ("ours", "checkpointed", "naive", "plain")]
        for less, more in pairwise(sizes):
            assert all(a < b for a, b in zip(less, more, strict=True))


def test_more_frames_of_more_pixels_need_more(results: dict[str, Any]) -> None:
    for way, result in close(results).items():
        few, many = result["frames"]
        (smaller,) = results[f"swin_toy, 32 px, {TITLES[way]}"]["frames"]
        assert few < many
        assert smaller < many


@pytest.mark.parametrize("way", ["plain", "ours"])
def test_one_more_unit_does_not_fit(way: str, results: dict[str, Any]) -> None:
    (fits,) = close(results)[way]["fits"]
    assert fits % UNIT == 0
    asked = next(job for job in quick().jobs() if job.name == f"swin_toy, 64 px, {TITLES[way]}")
    arguments = {**asked.arguments, "frames": [fits, fits + UNIT], "depths": [], "cards": []}
    inside, outside = peaks(**arguments)["frames"]
    assert inside <= CARD * GIBIBYTE < outside


def test_what_the_report_says(results: dict[str, Any]) -> None:
    section = quick().section(results)
    assert [finding.holds for finding in section.findings] == [True] * 4
    for title, rows in section.tables.items():
        assert [row["training"] for row in rows] == list(TITLES.values()), title
    by_backbone, by_frames, by_size, by_depth, by_kind, fits = section.tables.values()
    ours, plain = close(results)["ours"], close(results)["plain"]
    assert by_backbone[-1] == {
        "backbone": "swin_toy",
        "training": "ours",
        "predicted, GiB": ours["frames"][1] / GIBIBYTE,
        "of plain": ours["frames"][1] / plain["frames"][1],
    }
    assert by_frames[0]["32 frames, GiB"] == plain["frames"][0] / GIBIBYTE
    assert list(by_size[0]) == ["training", "32 px, GiB", "64 px, GiB"]
    assert by_depth[-1]["4 blocks, GiB"] == ours["depths"][1] / GIBIBYTE
    assert by_kind[-1]["peak, GiB"] == by_frames[-1]["64 frames, GiB"]
    assert by_kind[-1]["activations, GiB"] == ours["parts"]["activations"] / GIBIBYTE
    assert fits[-1]["0.0115 GiB"] == ours["fits"][0]
    assert section.figures.keys() == {"memory", "memory_depth"}
    assert all(isinstance(figure, Figure) for figure in section.figures.values())
    assert section.metrics["memory/swin_toy/ours_gib"] == ours["frames"][1] / GIBIBYTE
    assert section.metrics["memory/swin_toy/ours_frames_in_0.0115_gib"] == ours["fits"][0]


def test_claims_that_do_not_hold_are_told(results: dict[str, Any]) -> None:
    turned = copy.deepcopy(results)
    ours, plain = "swin_toy, 64 px, ours", "swin_toy, 64 px, plain"
    turned[ours], turned[plain] = turned[plain], turned[ours]
    section = quick().section(turned)
    assert [finding.holds for finding in section.findings] == [False] * 4


def test_what_a_gpu_measured_stands_beside_the_predictions(results: dict[str, Any]) -> None:
    measured = copy.deepcopy(results)
    assert all(result["measured"] == NO_GPU for result in measured.values())
    measured["swin_toy, 64 px, plain"]["measured"] = OUT_OF_MEMORY
    measured["swin_toy, 64 px, ours"]["measured"] = 3 * GIBIBYTE
    section = quick().section(measured)
    assert "measured: 3 GiB instead of out of memory" in section.findings[0].evidence
    rows = next(iter(section.tables.values()))
    column = {row["training"]: row["measured, GiB"] for row in rows}
    assert column["plain"] == OUT_OF_MEMORY
    assert column["ours"] == 3.0


def test_every_backbone_is_looked_at_in_every_way() -> None:
    asked = Memory()
    jobs = asked.jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    for backbone in (asked.backbone, *asked.others):
        at_full_size = [
            job.arguments["way"]
            for job in jobs
            if job.arguments.get("backbone") == backbone and job.arguments["size"] == asked.size
        ]
        assert at_full_size == list(KEEPING)
    assert not any(job.alone or job.spreads for job in jobs)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match=r"no backbone .?resnet"):
        Memory(others=("swin_s", "resnet"))
    with pytest.raises(UserError, match="at least two depths"):
        Memory(depths=(6, 6))


@pytest.mark.slow
def test_fresh_processes_are_measured(results: dict[str, Any]) -> None:
    found = resident(model="toy_swin", step={"frames": 16, "size": 64}, way="checkpointed")
    assert 0 < found["predicted"] < found["measured"] < found["predicted"] + 30e6
    assert found["allocator's default"] > 0
    asked = replace(quick(), resident="toy_swin")
    sizes = {"plain": 40, "checkpointed": 30, "naive": 35, "ours": 20}
    processes = {
        f"a fresh process, {TITLES[way]}": dict.fromkeys(
            ("predicted", "measured", "allocator's default"), size * 10**6
        )
        for way, size in sizes.items()
    }
    section = asked.section(results | processes)
    assert section.findings[-1].holds
    assert list(section.tables.values())[-1][-1]["measured, MB"] == 20


@given(st.lists(st.floats(0, 1), max_size=8).map(sorted))
def test_labels_are_moved_apart_and_no_further_than_needed(heights: list[float]) -> None:
    moved = apart(heights, 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(moved))
    assert sum(moved) == pytest.approx(sum(heights))
    if all(b - a >= 0.1 for a, b in pairwise(heights)):
        assert moved == pytest.approx(heights)


# Full finetuning against adapters.

SMALL = Finetuning(
    backbones=("videomae_toy",),
    sizes=(64,),
    frames=(32, 64),
    short=(16,),
    cards=(0.02,),
    precision="float32",
)


def test_what_finetuning_needs_counts_the_optimizer_and_the_average() -> None:
    (job,) = (j for j in SMALL.jobs() if j.name == "videomae_toy, 64 px, adapters, ours")
    found = needs(**job.arguments)
    subject = subject_of("videomae_toy", "adapters", Workload(frames=32, size=64))
    plain = backbone_alone("videomae_toy", subject.work, AdapterConfig())
    detector = plain.build(4)  # with weights
    trained = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    weights = sum(t.nbytes for t in (*detector.parameters(), *detector.buffers()))
    assert found["trained"] == trained > 0
    assert found["state"] == 2 * weights + 3 * 4 * trained
    peaks_of = [Planner(plain).predict("ours", frames=n) for n in SMALL.frames]
    assert found["peaks"] == [p.peak + weights + 2 * 4 * trained for p in peaks_of]
    (longest,) = found["fits"]
    planner = Planner(replace(plain, optimizer=True))
    budget = 0.02 * GIBIBYTE
    assert planner.peak("ours", frames=longest) <= budget
    assert planner.peak("ours", frames=longest + UNIT) > budget
    assert dict(found["predicted"]).items() >= dict(planner.predicted("ours")).items()
    assert [dict(found["predicted"])[n] for n in SMALL.frames] == found["peaks"]
    assert found["predicted"][0][0] == 16


def test_a_report_says_from_which_window_on_full_finetuning_takes_less() -> None:
    lines = {
        ("full", "plain"): (50, 900),
        ("full", "checkpointed"): (9, 900),
        ("full", "ours"): (4, 1000),
        ("adapters", "plain"): (40, 100),
        ("adapters", "checkpointed"): (8, 101),
        ("adapters", "ours"): (3, 100),  # of short windows: see below
    }
    bent = {16: 3 * 16 + 100, 32: 3 * 32 + 100, 64: 3 * 64 + 100, 1024: 3 * 1024 + 4000}
    adapters = "videomae_toy, 64 px, adapters, ours"
    results = {
        f"videomae_toy, 64 px, {tuning}, {WAYS[way].title}": {
            "peaks": [slope * n + start for n in SMALL.frames],
            "state": start,
            "trained": 1,
            "fits": [4096],
            "predicted": [(n, slope * n + start) for n in (16, 32, 64, 1024)],
        }
        for (tuning, way), (slope, start) in lines.items()
    }
    assert [job.name for job in SMALL.jobs() if job.name.endswith("adapters, ours")] == [adapters]
    results[adapters]["predicted"] = sorted(bent.items())
    assert results.keys() == {job.name for job in SMALL.jobs()}
    section = SMALL.section(results)
    (row,) = section.tables["Windows from which full reversible finetuning takes less than"]
    for (tuning, way), (slope, start) in lines.items():
        cell = row.get(f"{tuning}, {WAYS[way].title}")
        if cell is not None and way != "ours":
            first = next(n for n in range(16, 9999, 16) if slope * n + start > 4 * n + 1000)
            assert cell == f"{first:,} frames"
    # 292 at 64 frames and 7072 at 1024: 292 + 7.0625 (n - 64) against 4 n + 1000
    first = next(n for n in range(16, 9999, 16) if 292 + 7.0625 * (n - 64) > 4 * n + 1000)
    assert row["adapters, ours"] == f"{first:,} frames"
    assert row["least"] == f"adapters ours from 16 frames; full ours from {first:,} frames"
    claims = {finding.claim: finding.holds for finding in section.findings}
    (smaller,) = (holds for claim, holds in claims.items() if "than adapters with check" in claim)
    assert smaller == (4 * 64 + 1000 < 8 * 64 + 101)
    told = {finding.claim: finding.evidence for finding in section.findings}
    always = "Reversible adapters take less than everything else"
    assert not claims[always]
    assert told[always] == f"videomae_toy, 64 px: {row['least']}"
    results[adapters]["predicted"] = [(n, 3 * n + 100) for n in (16, 32, 64, 1024)]
    section = SMALL.section(results)
    (row,) = section.tables["Windows from which full reversible finetuning takes less than"]
    assert row["adapters, ours"] == "none up to 4,096"
    assert row["least"] == "adapters ours from 16 frames"
    assert next(finding.holds for finding in section.findings if finding.claim == always)
