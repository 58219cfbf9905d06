"""Videos that end the process which reads them: a crash of a decoder, or memory that runs out."""

import json

from pipelines.storage import file_sizes, join, read_bytes, remove, replacing

ENDING = ".attempts"
"""Of the names of the files in which attempts are noted, beside the shards."""

_MOST = 2


class Attempts:
    """Notes which video of a shard is being encoded, for the process that comes after a crash.

    Ray starts a task again whose process died. Without a note it would die of the same video again,
    for ever.

    Args:
        shard: Path or URI of the shard.
    """

    def __init__(self, shard: str) -> None:
        folder, _, name = shard.rpartition("/")
        self._uri = join(folder, name + ENDING)
        self._counts: dict[str, int] = {}
        self._noted = name + ENDING in file_sizes(folder)
        if self._noted:
            self._counts = json.loads(read_bytes(self._uri))

    def begin(self, video_id: str) -> None:
        """Notes that a video is begun."""
        self._counts[video_id] = self._counts.get(video_id, 0) + 1
        with replacing(self._uri) as stream:
            stream.write(json.dumps(self._counts).encode())
        self._noted = True

    def reason(self, video_id: str) -> str:
        """Why a video must not be tried again; empty if it may be."""
        if self._counts.get(video_id, 0) <= _MOST:
            return ""
        return f"ended the process that read it, {_MOST} times: a crash, or too little memory"

    def end(self, video_id: str) -> None:
        """Forgets a video that is through."""
        del self._counts[video_id]

    def clear(self) -> None:
        """Removes the note: the shard is whole."""
        if self._noted:
            remove(self._uri)
