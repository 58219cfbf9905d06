"""Run of `detect.py`: detection in the remaining videos, files for all videos, and MLflow."""

import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.core.clock import duration
from pipelines.core.cluster import start_ray
from pipelines.core.metric_log import log_metrics
from pipelines.core.models import fingerprint, local_detector
from pipelines.core.storage import Stamp, stamps_of
from pipelines.core.tracking import Run, finishing, start_run, tracking_uri
from pipelines.data.videos import find_sources
from pipelines.inference.detecting import VideoResult, detect_videos
from pipelines.inference.options import DetectConfig
from pipelines.inference.output import (
    Record,
    counted,
    read_records,
    strongest,
    write_files,
    write_record,
)
from re2tal.errors import shortened
from re2tal.trained import read_spec

_LOGGED_PICTURES = 4  # in MLflow; the output folder has all pictures


_SHOW_SECONDS = 2.0  # between lines of progress


def run(config: DetectConfig) -> Run:
    """Detect actions in the remaining videos, write files for all videos, and return the run.

    Raises:
        UserError: a model or video does not exist, the output folder holds detections of another
            model, or the cluster is too small.
    """
    output, runs = Path(config.output).absolute(), Path(config.runs).absolute()
    videos = find_sources(config.videos, option="--videos")
    with tempfile.TemporaryDirectory() as scratch:
        folder = local_detector(
            config.model, Path(scratch), tracking=tracking_uri(runs), option="--model"
        )
        model = fingerprint(folder)
        classes = read_spec(folder).classes
        records = read_records(output, videos, model=model)
        output.mkdir(parents=True, exist_ok=True)
        tracked = start_run(config, output=runs, once=True)
        with finishing(tracked):
            left = {video_id: uri for video_id, uri in videos.items() if video_id not in records}
            print(f"{len(records)} of {len(videos)} videos are done; {len(left)} to do")
            found, failures, speed = _detect(left, folder, model, config)
            records |= found
            written = write_files(output, records, failures, classes, config.files)
            _log(tracked, config, records, failures, written, speed)
    print(_summary(config, records, failures, tracked))
    return tracked


def _detect(
    videos: Mapping[str, str], folder: Path, model: str, config: DetectConfig
) -> tuple[dict[str, Record], dict[str, str], dict[str, float]]:
    """Detect actions; return records (each written at once), failures, and metrics of the speed."""
    records: dict[str, Record] = {}
    failures: dict[str, str] = {}
    if not videos:
        return records, failures, {}
    stamps = stamps_of(videos)  # before decoding: a file replaced meanwhile is noticed next time
    start_ray()
    progress = _Progress(len(videos))
    windows = 0
    for result in detect_videos(videos, folder, config.resources, progress=progress.window):
        windows += result.windows
        if result.found is None:
            failures[result.video_id] = "; ".join(result.problems)
        else:
            video_id = result.video_id
            record = _record(result, videos[video_id], model=model, stamp=stamps.get(video_id))
            write_record(Path(config.output).absolute(), record)
            records[result.video_id] = record
        progress.video(result)
    seconds = time.perf_counter() - progress.began
    frames = windows * read_spec(folder).window.frames
    return records, failures, {
        "windows": windows,
        "seconds": seconds,
        "frames_per_second": frames / seconds,
        "video_seconds_per_second": sum(r.duration for r in records.values()) / seconds,
    }  # fmt: skip


def _record(result: VideoResult, uri: str, *, model: str, stamp: Stamp | None) -> Record:
    assert result.found is not None
    return Record(
        video_id=result.video_id,
        uri=uri,
        model=model,
        duration=result.found.duration,
        problems=result.problems,
        detections=result.found.to_list(),
        stamp=stamp,
    )


class _Progress:
    """Printer of progress and of failed videos."""

    def __init__(self, videos: int) -> None:
        self.began = time.perf_counter()
        self._videos, self._through = videos, 0
        self._first: float | None = None  # time of the first window, after Ray's slow start
        self._shown = self.began

    def window(self, done: int, total: int) -> None:
        """Take the numbers of finished and of all windows, and print a line now and then."""
        now = time.perf_counter()
        self._first = self._first or now
        if now - self._shown > _SHOW_SECONDS and done < total:
            self._shown = now
            left = (now - self._first) / max(1, done - 1) * (total - done)
            print(
                f"  video {self._through}/{self._videos}  window {done}/{total}  "
                f"{duration(left)} left",
                flush=True,
            )

    def video(self, result: VideoResult) -> None:
        """Count a finished video, and print its first problem if it has one."""
        self._through += 1
        if result.problems:
            what = "failed" if result.found is None else "damaged in part"
            print(f"  {what}: {result.video_id}: {result.problems[0]}", flush=True)


def _log(
    tracked: Run,
    config: DetectConfig,
    records: Mapping[str, Record],
    failures: Mapping[str, str],
    written: Sequence[Path],
    speed: Mapping[str, float],
) -> None:
    """Log counts, speed and files to MLflow."""
    shown = [strongest(record, config.files) for record in records.values()]
    counts = {
        "videos/detected": len(records),
        "videos/failed": len(failures),
        "videos/damaged": sum(bool(record.problems) for record in shown),
        "detections": sum(len(record.detections) for record in shown),
    }
    log_metrics(tracked, {**counts, **speed}, step=0)
    output = Path(config.output).absolute()
    tables = [path for path in written if path.parent == output]
    for path in tables:
        tracked.client.log_artifact(tracked.run_id, str(path))
    pictures = [path for path in written if path.suffix == ".png"]
    for path in pictures[:_LOGGED_PICTURES]:
        tracked.client.log_artifact(tracked.run_id, str(path), "timelines")


def _summary(
    config: DetectConfig, records: Mapping[str, Record], failures: Mapping[str, str], tracked: Run
) -> str:
    lines = counted(list(records.values()), config.files)
    failed = [f"failed: {video_id}: {reason}" for video_id, reason in sorted(failures.items())]
    lines += shortened(failed, rest=", in failures.json")
    if "html" in config.files.formats:
        lines.append(f"open {shlex.quote(str(Path(config.output).absolute() / 'index.html'))}")
    return "\n".join([*lines, f"MLflow run {tracked.run_id} in {tracked.uri}"])
