"""Open every video of a collection; write duration, frame rate, size and errors to a Parquet file.

  python pipelines/probe.py --videos FOLDER --output videos.parquet
  python pipelines/probe.py --videos FOLDER --annotations A --output videos.parquet

With annotations, the table also shows files that are longer or shorter than annotated, and
annotated videos without a file. All paths may be URIs (s3://, gs://, ...).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from pipelines.config.annotations import AnnotationConfig
from pipelines.config.command_line import told_shortly
from pipelines.core.cluster import start_ray
from pipelines.core.progress import doing
from pipelines.core.storage import list_files, replacing
from pipelines.data.inputs import resolved
from pipelines.data.plan import read_annotations
from pipelines.data.videos import (
    SCHEMA,
    passed_over,
    probe_files,
    summary,
    with_disagreements,
)
from re2tal.datasets import check_durations
from re2tal.errors import UserError
from re2tal.videos.files import list_videos, match_videos


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig(AnnotationConfig):
    """Videos to open: all videos of a folder or, with annotations, the annotated ones.

    Attributes:
        videos: folder of the video files; a path or a URI.
        output: Parquet file for the table; a path or a URI.
    """

    videos: str | None = None
    output: str = "runs/videos.parquet"


def probe_collection(config: ProbeConfig) -> pa.Table:
    """Open the videos; write and return the table that `pipelines.data.videos` describes.

    Raises:
        UserError: if an input is missing, or the folder holds no video.
        AnnotationError: with every problem in the annotations.
    """
    config = resolved(config, needed=("videos",), optional=("annotations",), written=("output",))
    folder = str(config.videos)
    files = list_files(folder)
    annotations = None
    if config.annotations is not None:
        annotations = read_annotations(config)
    if annotations is None:
        found, passed = list_videos(files)
        missing: Mapping[str, str] = {}
        print(*passed_over(passed), sep="\n", end="\n" * bool(passed), flush=True)
    else:
        found, missing = match_videos((v.video_id for v in annotations.videos), files)
    if not found:
        raise UserError(f"The videos: {folder} holds none of them. Correct --videos.")
    with doing("opening the videos") as count:
        table = probe_files(found, progress=count)
    table = pa.concat_tables([table, _missing(missing)]).sort_by("video_id")
    if annotations is not None:
        table = with_disagreements(table, check_durations(annotations, _measured(table)))
    with replacing(config.output) as stream:
        pq.write_table(table, stream)
    return table


def _missing(reasons: Mapping[str, str]) -> pa.Table:
    rows = [{"video_id": video_id, "error": reason} for video_id, reason in reasons.items()]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _measured(table: pa.Table) -> dict[str, float]:
    rows = table.select(["video_id", "duration"]).to_pylist()
    return {row["video_id"]: row["duration"] for row in rows if row["duration"] is not None}


def parse(arguments: Sequence[str]) -> ProbeConfig:
    """Read the command line, without the program's name."""
    return tyro.cli(ProbeConfig, args=arguments, prog="probe.py", description=__doc__)


def main(arguments: Sequence[str]) -> None:
    """Probe the videos, and print a summary."""
    config = parse(arguments)
    start_ray()
    for line in summary(probe_collection(config)):
        print(line)
    print(f"The table is in {config.output}.")


if __name__ == "__main__":
    with told_shortly():
        main(sys.argv[1:])
