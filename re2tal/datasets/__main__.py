"""Describe annotations, or list all of their faults.

    python -m re2tal.datasets FILE [--dataset thumos-14] [--exclude missing_files.txt]

FILE is a JSON file, or the folder of a data set that consists of several files. The summary shows
videos and hours by subset, instances, the largest and smallest classes, the lengths of instances,
the share of time in which an action happens, and all exclusions and repairs. Without --dataset
nothing is repaired and every fault is an error. The exit code is 1 if there are errors.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from re2tal.annotations import AnnotationError
from re2tal.datasets.checking import check_durations
from re2tal.datasets.loading import load_annotations, read_durations, read_ids
from re2tal.datasets.published import ANY_OTHER, DATASETS, FORMS
from re2tal.datasets.summary import summarize


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        durations = read_durations(options.durations) if options.durations else {}
        dataset = DATASETS.get(options.dataset, ANY_OTHER)
        annotations = load_annotations(
            options.file,
            form=options.form,
            dataset=dataset.trimming() if options.trim_labels else dataset,
            exclude=read_ids(options.exclude) if options.exclude else (),
            keep=options.keep,
            durations=durations,
        )
    except AnnotationError as error:
        sys.stderr.write(f"{error.listed}\n")
        return 1
    sys.stdout.write(f"{options.file}\n\n{summarize(annotations)}\n")
    sys.stdout.write(f"\nfingerprint {annotations.fingerprint}\n")
    if problems := list(check_durations(annotations, durations).values()):
        sys.stderr.write(f"{AnnotationError(str(options.durations), problems).listed}\n")
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m re2tal.datasets",
        description=description,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument(
        "--form", choices=("auto", *FORMS), default="auto", help="layout of the files"
    )
    parser.add_argument("--dataset", choices=sorted(DATASETS), help="repair its known faults")
    parser.add_argument(
        "--exclude", type=Path, help="ids of videos to leave out: one per line, or JSON"
    )
    parser.add_argument(
        "--keep",
        metavar="ID",
        nargs="+",
        default=(),
        help="videos to use although the data set's record leaves them out",
    )
    parser.add_argument(
        "--durations",
        type=Path,
        help="JSON object, id -> seconds of the file: used if FILE has none, else compared with it",
    )
    parser.add_argument(
        "--trim-labels", action="store_true", help="remove the spaces around labels"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
