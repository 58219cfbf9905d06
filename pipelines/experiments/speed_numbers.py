"""What came out of the experiment `speed`, as tables, findings and metrics."""

from collections.abc import Mapping, Sequence

from pipelines.experiments.experiment import Finding, Result
from pipelines.experiments.benchmarking import Row
from pipelines.experiments.timing import Times, compared

TITLES = {
    "plain": "plain",
    "checkpoint": "per-block checkpointing",
    "naive": "naive reversible",
    "ours": "ours",
    "ours, float": "ours, float",
}
"""Of the ways to train in `pipelines.experiments.variants`."""

_ONE_MORE_FORWARD = 4 / 3  # of plain, if a backward takes twice as long as a forward
_LITTLE = 0.05  # of what plain training needs more

PEAK = "peak, MB"
_WEIGHTS = "parameters and gradients, MB"


def of_models(times: Mapping[str, Times]) -> dict[str, list[Row]]:
    """A table for each step.

    Args:
        times: seconds of every round, by step and way.
    """
    return {step: _titled(compared(of_ways, "plain")) for step, of_ways in times.items()}


def of_stacks(depths: Sequence[int], stacks: Result) -> list[Row]:
    """A row for each depth and way.

    Args:
        depths: numbers of branches.
        stacks: a result of `against_depth`.
    """
    return [
        {
            "branches": depth,
            **row,
            PEAK: peaks[way] / 1e6,
            _WEIGHTS: 2 * weights / 1e6,
        }
        for depth, times, peaks, weights in zip(
            depths, stacks["times"], stacks["peaks"], stacks["parameters"], strict=True
        )
        for way, row in zip(times, _titled(compared(times, "plain")), strict=True)
    ]


def _titled(rows: Sequence[Row]) -> list[Row]:
    return [row | {"training": TITLES[row["training"]]} for row in rows]


def metrics(rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """Times relative to plain training, by names that MLflow takes.

    Args:
        rows: tables of `of_models`.
    """
    return {
        f"speed/{step.partition(',')[0]}/{row['training'].replace(',', '')}": row["of plain"]
        for step, table in rows.items()
        for row in table
    }


def findings(times: Mapping[str, Times], deeper: Sequence[Row]) -> list[Finding]:
    """On time.

    Args:
        times: as of `of_models`.
        deeper: the table of `of_stacks`.
    """
    found = []
    for step, of_ways in times.items():
        model = step.partition(",")[0]
        found += [
            _at_most(f"{model}: ours takes no longer than checkpoints", of_ways, "checkpoint", 1),
            _at_most(
                f"{model}: ours costs at most one more forward, a third of plain training",
                of_ways,
                "plain",
                _ONE_MORE_FORWARD,
            ),
        ]
    return [*found, _growth(deeper)]


def _at_most(claim: str, times: Times, reference: str, limit: float) -> Finding:
    """Whether ours takes so many times as long as a reference; the quartiles tell."""
    (row,) = [row for row in compared(times, reference) if row["training"] == "ours"]
    low, high = row["lower quartile"], row["upper quartile"]
    return Finding(
        claim=claim,
        holds=True if high <= limit else False if low > limit else None,
        evidence=(
            f"{row[f'of {reference}']:.2f} times {TITLES[reference]} (quartiles {low:.2f} to "
            f"{high:.2f}, {row['rounds']} rounds)"
        ),
    )


def _growth(deeper: Sequence[Row]) -> Finding:
    """From the shallowest stack to the deepest."""

    def ends(title: str, column: str) -> tuple[float, float]:
        values = [row[column] for row in deeper if row["training"] == title]
        return values[0], values[-1]

    def grown(title: str, column: str) -> float:
        first, last = ends(title, column)
        return last - first

    def longer(title: str) -> str:
        first, last = ends(title, "seconds")
        return f"{last / first:.1f} times as long"

    ours, plain = TITLES["ours"], TITLES["plain"]
    weights = grown(plain, _WEIGHTS)
    first, last = ends(ours, "branches")
    return Finding(
        claim="In a deep stack memory grows by little more than parameters and their gradients",
        holds=grown(ours, PEAK) - weights < _LITTLE * (grown(plain, PEAK) - weights),
        evidence=(
            f"from {first} to {last} branches these grow by {weights:.1f} MB, ours by "
            f"{grown(ours, PEAK):.1f} and plain by {grown(plain, PEAK):.1f}; a step of ours takes "
            f"{longer(ours)}, of plain {longer(plain)}"
        ),
    )
