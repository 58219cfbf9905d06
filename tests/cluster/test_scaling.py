"""The tables of SCALING.md are those that are computed, and what they are computed by."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.scaling import MACHINE, WORKLOAD, exchange, markdown, million, rows

TEXT = (Path(__file__).parents[2] / "cluster" / "SCALING.md").read_text()


def test_the_text_has_the_tables() -> None:
    assert markdown(rows()) in TEXT
    assert markdown(million()) in TEXT


def test_an_exchange_is_a_ring_within_nodes_and_one_between_them() -> None:
    bytes_sent = WORKLOAD.parameters * 4 * 2
    assert exchange(8) == pytest.approx(bytes_sent * 7 / 8 / MACHINE.inside)
    within, between = exchange(8), bytes_sent * 7 / 8 / MACHINE.network
    assert exchange(64) == pytest.approx(within + between)
    assert exchange(1) == 0
    faster = replace(MACHINE, network=MACHINE.network * 4)
    assert exchange(512, node=faster) < exchange(512)
