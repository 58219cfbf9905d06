"""Gradients of reversible networks against those of stored activations.

A reversible network rebuilds its activations. In floating point they come back a little different,
the more so the deeper it is and the lower the precision, and with them the gradients: also those of
the public libraries. On this project's grid they come back as they were.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.config.recipe import Precision
from pipelines.experiments.exactness_figure import picture
from pipelines.experiments.experiment import Finding, Job, Result, Section
from pipelines.experiments.gradients import ERROR, FLOAT, OURS, errors_of, our_errors
from pipelines.experiments.peers import PEERS
from pipelines.experiments.benchmarking import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Exactness:
    """Errors of gradients, of this project and of others.

    Attributes:
        depths: numbers of residual branches, each even.
        precisions: what the branches compute in.
        libraries: what is compared with; what is not installed is left out, and listed.
    """

    depths: tuple[int, ...] = (12, 24, 96)
    precisions: tuple[Precision, ...] = ("float32", "float16", "bfloat16")
    libraries: tuple[str, ...] = tuple(PEERS)

    def __post_init__(self) -> None:
        odd = [depth for depth in self.depths if depth % 2]
        if odd:
            raise ValueError(f"Branches come in pairs, but a depth is {odd[0]}: give even ones.")
        unknown = set(self.libraries) - PEERS.keys()
        if unknown:
            raise ValueError(
                f"There is no library {', '.join(sorted(unknown))}: choose of {', '.join(PEERS)}."
            )

    @property
    def name(self) -> str:
        """On the command line and in files."""
        return "exactness"

    def jobs(self) -> Sequence[Job]:
        """This project, and each library."""
        cases = {"depths": sorted(self.depths), "precisions": list(self.precisions)}
        return [Job(name=OURS, work=our_errors, arguments=cases)] + [
            Job(name=library, work=errors_of, arguments={"library": library, **cases})
            for library in self.libraries
        ]

    def section(self, results: Mapping[str, Result]) -> Section:
        """What the report says."""
        rows = [row for name in (OURS, *self.libraries) for row in results[name]["rows"]]
        return Section(
            title="Gradients are those of stored activations",
            text=(
                "A stack of residual branches LayerNorm-Linear-GELU-Linear of width 64 on a batch "
                "of 64, random weights, seed 0; streams in float32, branches under autocast. The "
                "error is the norm of the difference over the norm, of the gradients of all "
                "parameters, against the same equations in the same precision with stored "
                "activations. All libraries run the same branches from the same input, on "
                f"{results[OURS]['device']}; autocast is entered inside the branches, because not "
                "every library enters it again in its backward. Where branches round their input "
                "to 16 bits, they round the errors of shallow stacks away, mostly. minREV's form "
                "is what minREV does, written anew: it cannot be installed."
            ),
            findings=[_exact(rows), _drifting(rows)],
            tables={"Errors of gradients": rows},
            figures={"exactness": picture(measured(rows))},
            metrics={
                f"exactness/{_plain(library)}": error for library, error in _largest(rows).items()
            },
        )


def quick() -> Exactness:
    """Shallow stacks: it shows that everything runs, and no more."""
    return Exactness(depths=(4, 12))


def measured(rows: Sequence[Row]) -> list[Row]:
    """Rows with a number in them.

    Args:
        rows: of `our_errors` and `errors_of`.
    """
    return [row for row in rows if not isinstance(row[ERROR], str)]


def _largest(rows: Sequence[Row]) -> dict[str, float]:
    """The largest error of each library that ran."""
    found: dict[str, float] = {}
    for row in measured(rows):
        found[row["library"]] = max(row[ERROR], found.get(row["library"], 0.0))
    return found


def _plain(name: str) -> str:
    """A name as MLflow takes it."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _exact(rows: Sequence[Row]) -> Finding:
    errors = [row[ERROR] for row in rows if row["library"] == OURS]
    exact = sum(error == 0 for error in errors)
    return Finding(
        claim="On the grid gradients equal those of stored activations bit for bit",
        holds=exact == len(errors),
        evidence=f"{exact} of {len(errors)} cases of depth and precision have an error of 0",
    )


def _drifting(rows: Sequence[Row]) -> Finding:
    largest = _largest(rows)
    others = {library: error for library, error in largest.items() if library != OURS}
    versions = {row["library"]: row["version"] for row in rows}
    silent = {row["library"] for row in rows} - largest.keys()
    listed = [
        f"{library}{'' if library == FLOAT else f' ({versions[library]})'} {error:.1e}"
        for library, error in others.items()
    ]
    listed += [f"{library}: {versions[library]}" for library in sorted(silent)]
    return Finding(
        claim="In floating point they drift, in the public libraries as well",
        holds=all(error > 0 for error in others.values()),
        evidence=f"largest errors: {', '.join(listed)}",
    )
