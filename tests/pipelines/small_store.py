"""Stream twenty times the bytes that Ray's object store holds as frames, and print measurements.

This is a script because a Ray instance has one store, and that of the other tests is larger.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import psutil
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from pipelines.core.cluster import quiet_data
from pipelines.data.batches import stream_batches
from pipelines.data.streaming import FrameStream
from re2tal.videos.encoding import encode
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window

STORE = 80 * 2**20  # about the smallest that Ray starts with
TIMES = 20
FRAMES, SIZE, BATCH = 32, 160, 1


def main() -> None:
    """Stream frames, and print a line of JSON."""
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=STORE,
        include_dashboard=False,
        logging_level="ERROR",
    )
    quiet_data()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        encode(path, _pictures(), fps=25)
        print(json.dumps(_stream(path)))
    ray.shutdown()


def _pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (SIZE, SIZE, 3), np.uint8) // 16 for _ in range(FRAMES)]


def _stream(path: Path) -> dict[str, float]:
    grid = TimeGrid(fps=25.0, stride=2, length=FRAMES)
    window = Window(
        video_id="video",
        grid=grid,
        valid=FRAMES,
        segments=np.zeros((0, 2), np.float32),
        labels=np.zeros(0, np.int64),
    )
    windows = [window] * (TIMES * STORE // (FRAMES * SIZE * SIZE * 3) + 1)
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    used, memory, total = [], [], 0
    batches = stream_batches(
        FrameStream(), windows, {"video": str(path)}, size=SIZE, batch_size=BATCH
    )
    for number, batch in enumerate(batches):
        total += batch.frames.numel()
        if number % 10 == 0:
            used.append(get_memory_info_reply(state).store_stats.object_store_bytes_used)
            memory.append(_own_bytes())
    store = get_memory_info_reply(state).store_stats
    return {
        "frames_bytes": total,
        "store_bytes": STORE,
        "most_used_bytes": max(used),
        "spilled_bytes": store.spilled_bytes_total,
        "grown_bytes": max(memory) - memory[len(memory) // 4],
    }


def _own_bytes() -> int:
    """Return the memory of this process and of those that decode and stream, without the store.

    Ray's own services are left out: their records of tasks and executions are not bounded here.
    """
    here = psutil.Process()
    total = 0
    for process in [here, *here.children(recursive=True)]:
        try:
            name = process.name()
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (FileNotFoundError, psutil.NoSuchProcess):
            continue  # it ended in between
        if process is here or name.startswith(("ray::_Stream", "ray::IDLE", "ray::Map")):
            # a process that is just ending has no such line any more
            total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total * 1024


if __name__ == "__main__":
    main()
