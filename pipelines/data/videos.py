"""Videos of a folder, as files or in shards: finding them, and opening each file once.

Only `find_videos` distinguishes folders of files from folders of shards.
"""

import glob
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.core.storage import (
    Stamp,
    is_folder,
    join,
    list_files,
    replaced_files,
    require,
    stamps_of,
)
from pipelines.data.decoding import probe_sample
from pipelines.data.shards import (
    SHARDS,
    Manifest,
    read_manifest,
    remarks_on,
    require_whole,
    video_uri,
)
from re2tal.annotations import as_named, normal_form
from re2tal.errors import UserError, shortened
from re2tal.videos.files import EXTENSIONS, is_video, list_videos, match_videos

_CPUS = 0.5  # logical CPUs of a task that opens a video; it often waits for storage

SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("uri", pa.string()),
        ("bytes", pa.int64()),
        ("duration", pa.float64()),
        ("fps", pa.float64()),
        ("frames", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("codec", pa.string()),
        ("rotation", pa.int32()),
        ("problems", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)
"""Columns of a table of videos: id, URI, bytes, the fields of `re2tal.videos.probing.VideoInfo`,
and `error`. A usable video has an empty `error`; otherwise all but id and URI are null."""


Probe = Callable[[Mapping[str, str]], pa.Table]
"""Function that opens videos: `probe_files` or `probe_files_here`."""


def probe_files(
    files: Mapping[str, str], *, progress: Callable[[int, int], None] | None = None
) -> pa.Table:
    """Open videos, and read the facts in their files.

    Args:
        files: video id to path or URI.
        progress: function called after each video with the numbers of finished and of all videos.

    Returns:
        A row of `SCHEMA` for each video, in the order of the ids.
    """
    import ray.data  # here: plans are also made where Ray is not installed

    rows = _rows(files)
    if not rows:
        return SCHEMA.empty_table()
    found = []
    dataset = ray.data.from_items(rows).map(probe_sample, num_cpus=_CPUS)
    dataset.set_name("opening videos")
    for row in dataset.iter_rows():
        found.append(row)
        if progress is not None:
            progress(len(found), len(rows))
    return _table(found)


def probe_files_here(files: Mapping[str, str]) -> pa.Table:
    """Open videos as `probe_files` does, in this process and without Ray."""
    return _table(map(probe_sample, _rows(files)))


def _rows(files: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"video_id": video_id, "uri": uri} for video_id, uri in sorted(files.items())]


def _table(found: Iterable[dict[str, Any]]) -> pa.Table:
    # a list of sentences travels as one text: Ray cannot infer the type of an empty list
    rows = [
        row | {"problems": row["problems"].splitlines() if row["problems"] is not None else None}
        for row in found
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA).sort_by("video_id")


def with_disagreements(table: pa.Table, sentences: Mapping[str, str]) -> pa.Table:
    """Add a column `disagrees`: a sentence on the difference between a file and its annotation."""
    column = pa.array([sentences.get(name, "") for name in table["video_id"].to_pylist()])
    return table.append_column("disagrees", column)


def summary(table: pa.Table) -> Sequence[str]:
    """Describe a table from `probe_files`, with or without disagreements, in a few lines."""
    rows = table.to_pylist()
    usable = [row for row in rows if not row["error"]]
    hours = sum(row["duration"] for row in usable) / 3600
    megabytes = sum(row["bytes"] for row in usable) / 1e6
    size = f"{megabytes:.3g} MB" if megabytes < 1000 else f"{megabytes / 1000:,.2f} GB"
    lines = [f"{len(usable)} of {len(rows)} videos can be used: {hours:.2f} hours, {size}"]
    if usable:
        lines += [
            "  codecs: " + _counts([row["codec"] for row in usable]),
            "  sizes: " + _counts([f"{row['width']}x{row['height']}" for row in usable]),
            "  frames/s: " + _counts([f"{row['fps']:.4g}" for row in usable]),
        ]
    lines += _listed(
        "videos cannot be used", {r["video_id"]: r["error"] for r in rows if r["error"]}
    )
    odd = {row["video_id"]: " ".join(row["problems"]) for row in usable if row["problems"]}
    lines += _listed("videos can be used, but are odd", odd)
    if "disagrees" in table.column_names:
        other = {row["video_id"]: row["disagrees"] for row in rows if row["disagrees"]}
        lines += _listed("videos disagree with their annotations", other)
    return lines


def passed_over(reasons: Mapping[str, str]) -> list[str]:
    """List the skipped files of a folder: those that are no videos, and those with a taken name."""
    return _listed("files are passed over", reasons)


def _counts(values: Sequence[str]) -> str:
    """List the five commonest values with their counts."""
    ordered = Counter(sorted(values)).most_common()
    return ", ".join(shortened([f"{value} ({number})" for value, number in ordered], 5))


def _listed(what: str, sentences: Mapping[str, str]) -> list[str]:
    if not sentences:
        return []
    lines = shortened([f"{name}: {text}" for name, text in sentences.items()], 10)
    return [f"{len(sentences)} {what}:", *(f"  {line}" for line in lines)]


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundVideos:
    """Result of a search for videos in a folder.

    Attributes:
        uris: video id to path or URI of its file, or of the video in its shard.
        failures: video id to the reason why the video was not found.
        durations: video id to seconds of picture, as far as they are known.
        rates: video id to mean frames per second, as far as they are known.
        remarks: sentences about unexpected facts.
        stamps: video id to the stamp of the source file, for videos in shards.
    """

    uris: dict[str, str]
    failures: dict[str, str]
    durations: dict[str, float]
    rates: dict[str, float]
    remarks: tuple[str, ...] = ()
    stamps: dict[str, Stamp] = field(default_factory=dict)

    def stamped(self, video_ids: Iterable[str]) -> dict[str, Stamp]:
        """Return the stamps of the files of some videos, by video id."""
        wanted = [v for v in video_ids if v in self.uris]
        files = {v: self.uris[v] for v in wanted if v not in self.stamps}
        return stamps_of(files) | {v: self.stamps[v] for v in wanted if v in self.stamps}

    def replaced(self, stamps: Mapping[str, Stamp]) -> list[str]:
        """Find the videos whose files no longer match their earlier stamps."""
        files = {v: uri for v, uri in self.uris.items() if v not in self.stamps}
        known = stamps.keys() & self.stamps.keys()
        # a shard's stamp has no time
        others = {v for v in known if stamps[v].undated != self.stamps[v]}
        return sorted(others.union(replaced_files(files, stamps)))


def find_videos(
    folder: str,
    video_ids: Collection[str] | None,
    *,
    fingerprint: str | None = None,
    size: int = 0,
    fps: float | None = None,
) -> FoundVideos:
    """Find videos in a folder of files or of shards, without opening any of them.

    Args:
        folder: path or URI of the folder.
        video_ids: ids of the videos; None for all videos in the folder.
        fingerprint: hash of the annotations that belong to the videos, if there are any.
        size: pixels of the short side that the run needs.
        fps: frames per second that the run samples; None if that depends on the video.

    Raises:
        UserError: if there are no videos at all; if shards are missing or incomplete.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        require_whole(folder, manifest)
        remarks = remarks_on(manifest, fingerprint=fingerprint, size=size, fps=fps)
        found = replace(_in_shards(folder, manifest, video_ids), remarks=remarks)
    else:
        files = list_files(folder)
        if video_ids is None:
            named, passed = list_videos(files)
            found = replace(_unopened(named, {}), remarks=tuple(passed_over(passed)))
        else:
            found = _unopened(*match_videos(video_ids, files))
    if video_ids is None and not found.uris:
        raise UserError(f"The videos: {folder} holds none of them. Correct --videos.")
    return found


def _unopened(uris: dict[str, str], missing: dict[str, str]) -> FoundVideos:
    return FoundVideos(uris=uris, failures=missing, durations={}, rates={})


def _in_shards(folder: str, manifest: Manifest, video_ids: Collection[str] | None) -> FoundVideos:
    held = {
        video_id: (video_uri(join(SHARDS.place(folder), file.name), video_id), entry)
        for file in manifest.shards
        for video_id, entry in file.videos.items()
    }
    failures = manifest.failures
    if video_ids is not None:
        held, failures = as_named(held, video_ids), as_named(failures, video_ids)
    wanted = sorted(held) if video_ids is None else video_ids
    found = {video_id: held[video_id] for video_id in wanted if video_id in held}
    nowhere = f"no shard in {folder} holds it"
    return FoundVideos(
        uris={video_id: uri for video_id, (uri, _) in found.items()},
        failures={v: failures.get(v, nowhere) for v in wanted if v not in held},
        durations={video_id: entry.duration for video_id, (_, entry) in found.items()},
        rates={video_id: entry.frames / entry.duration for video_id, (_, entry) in found.items()},
        stamps={v: entry.stamp for v, (_, entry) in found.items() if entry.source_head},
    )


def opened(found: FoundVideos, probe: Probe = probe_files) -> FoundVideos:
    """Open the videos whose duration is not known yet; unreadable videos become failures."""
    unknown = {v: uri for v, uri in found.uris.items() if v not in found.durations}
    if not unknown:
        return found
    rows = probe(unknown).select(["video_id", "duration", "fps", "error"]).to_pylist()
    errors = {row["video_id"]: row["error"] for row in rows if row["error"]}
    usable = [row for row in rows if not row["error"]]
    return replace(
        found,
        uris={v: uri for v, uri in found.uris.items() if v not in errors},
        failures=found.failures | errors,
        durations=found.durations | {row["video_id"]: row["duration"] for row in usable},
        rates=found.rates | {row["video_id"]: row["fps"] for row in usable},
    )


def find_sources(places: Sequence[str], *, option: str) -> dict[str, str]:
    """Find videos, and name them by their files.

    Args:
        places: paths or URIs of files, with any ending; of folders, in which files with the ending
            of a video count; or patterns with `*`, `?`, `[...]` and, in paths, `**`.
        option: command-line option for these places, for messages.

    Returns:
        Video id, which is the file's name without its ending, to absolute path or URI.

    Raises:
        UserError: if a place does not exist or holds no video, or two videos have one name.
    """
    if not places:
        raise UserError(f"The videos: none given. Say which with {option} FILE_OR_FOLDER ...")
    uris = [uri for place in places for uri in _files(place, option)]
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for uri in dict.fromkeys(uris):  # a file that two patterns match is one video
        video_id = Path(uri).stem
        if other := taken.get(normal_form(video_id)):
            raise UserError(
                f"The videos: {other} and {uri} have one name, which would make their "
                f"results one. Rename one, or give them to {option} of separate runs."
            )
        found[video_id] = taken[normal_form(video_id)] = uri
    return dict(sorted(found.items()))


def _files(place: str, option: str) -> list[str]:
    """Return the video files of one place."""
    if _is_pattern(place):
        found = _matches(place, option)
    else:
        uri = require(place, what="The videos", option=option)
        found = _videos(uri) if is_folder(uri) else [uri]
    if not found:
        what = "matches no file" if _is_pattern(place) else f"holds no video ({_ENDINGS})"
        raise UserError(f"The videos: {place} {what}. Correct {option}.")
    return found


_ENDINGS = ", ".join(EXTENSIONS)


def _is_pattern(place: str) -> bool:
    """Tell whether a place is a pattern; an existing file may have brackets in its name."""
    return glob.has_magic(place) and ("://" in place or not Path(place).expanduser().exists())


def _matches(pattern: str, option: str) -> list[str]:
    if "://" not in pattern:
        whole = Path(pattern).expanduser().absolute()
        paths = Path(whole.anchor).glob(str(whole.relative_to(whole.anchor)))
        return sorted(str(path) for path in paths if path.is_file())
    folder, _, name = pattern.rpartition("/")
    if glob.has_magic(folder):
        raise UserError(
            f"The videos: {pattern} has a wildcard in the name of a folder; in a URI only the name "
            f"of the file may have one. Correct {option}."
        )
    files = list_files(require(folder, what="The videos", option=option))
    return [uri for file, uri in files.items() if fnmatchcase(file, name)]


def _videos(folder: str) -> list[str]:
    return [uri for name, uri in list_files(folder).items() if is_video(name)]
