"""All checks but that of versions, in their order."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pipelines.core.storage import absolute
from pipelines.diagnostics.all_reduce import CHECK as ALL_REDUCE
from pipelines.diagnostics.all_reduce import check_all_reduce
from pipelines.diagnostics.cluster import check_ray, end_ray
from pipelines.diagnostics.deadline import within
from pipelines.diagnostics.finding import Finding, fail, note
from pipelines.diagnostics.gpus import CHECK as GPU
from pipelines.diagnostics.gpus import check_gpus, find_gpus
from pipelines.diagnostics.machine import CHECK as MACHINE
from pipelines.diagnostics.machine import check_machine, examine
from pipelines.diagnostics.nodes import Node, ask
from pipelines.diagnostics.output import CHECK as STORAGE
from pipelines.diagnostics.output import check_output
from pipelines.diagnostics.software import CHECK as SOFTWARE
from pipelines.diagnostics.software import check_software, software
from pipelines.diagnostics.tracking import CHECK as MLFLOW
from pipelines.diagnostics.tracking import check_tracking
from pipelines.diagnostics.videos import CHECK as VIDEO
from pipelines.diagnostics.videos import CHECK_OWN, check_own, check_video, make_video

Check = Callable[[], Sequence[Finding]]
_GRACE = 10.0  # seconds, so that a check can still tell what it waited for


def examine_all(output: str, videos: Sequence[str], *, seconds: float) -> Iterator[Finding]:
    """Starts or joins Ray, runs the checks, and ends Ray.

    Args:
        output: where runs go; a path or URI.
        videos: places of videos of the user's.
        seconds: to wait for a node, a store or a server.

    Yields:
        What they find.
    """
    findings, nodes = check_ray(seconds=seconds)
    yield from findings
    try:
        for name, check in _checks(absolute(output), videos, nodes, seconds):
            # some wait for two things, one after the other
            yield from within(2 * seconds + _GRACE, name, check)
    finally:
        end_ray(nodes)


def _checks(
    output: str, videos: Sequence[str], nodes: Sequence[Node], seconds: float
) -> Iterator[tuple[str, Check]]:
    on_nodes: dict[str, Check] = {
        SOFTWARE: lambda: check_software(software(), ask(nodes, software, seconds=seconds)),
        MACHINE: lambda: _machines(nodes, seconds),
        GPU: lambda: check_gpus(ask(nodes, find_gpus, seconds=seconds)),
        ALL_REDUCE: partial(check_all_reduce, nodes, seconds=seconds),
    }
    anywhere: dict[str, Check] = {
        STORAGE: partial(check_output, output, nodes, seconds=seconds),
        MLFLOW: partial(check_tracking, output, nodes, seconds=seconds),
        VIDEO: lambda: check_video(make_video(), nodes, seconds=seconds),
    }
    if videos:
        anywhere[CHECK_OWN] = partial(check_own, videos, nodes, seconds=seconds)
    for name, check in on_nodes.items():
        yield name, check if nodes else partial(_not_tried, name)
    yield from anywhere.items()


def _not_tried(name: str) -> list[Finding]:
    return [note(name, "Not tried, because there is no Ray.")]


def _machines(nodes: Sequence[Node], seconds: float) -> list[Finding]:
    findings: list[Finding] = []
    for answer in ask(nodes, examine, {node.id: node.folder for node in nodes}, seconds=seconds):
        if answer.value is None:
            findings.append(fail(MACHINE, f"{answer.node.name} was not seen: {answer.error}."))
        else:
            findings += check_machine(answer.node, answer.value)
    return findings
