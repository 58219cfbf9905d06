import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.videos.made_videos import make_video

X264 = {"options": {"preset": "ultrafast", "x264-params": "bframes=2:b-adapt=0"}}
FILES: dict[str, dict[str, Any]] = {
    "a.mp4": X264,
    "fragments.mp4": {**X264, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "a.mkv": X264,
    "a.ts": X264,
    "a.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "a.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "hevc.mp4": {
        "codec": "libx265",
        "options": {"preset": "ultrafast", "x265-params": "log-level=none"},
    },
    "a.flv": X264,
    "a.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "raw.h264": X264,
}
EXAMPLES = 25


@pytest.mark.slow
def test_changed_files_give_frames_or_a_reason(tmp_path: Path) -> None:
    paths = [
        str(make_video(tmp_path / name, 30, sound=1.0 if name == "a.mkv" else 0.0, **options))
        for name, options in FILES.items()
    ]
    log = tmp_path / "example.json"
    command = [sys.executable, "-m", "tests.videos.fuzzing", *paths]
    run = subprocess.run(
        [*command, "--examples", str(EXAMPLES), "--log", str(log)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    example = log.read_text() if log.exists() else "none"
    assert run.returncode == 0, f"{run.returncode} at {example}\n{run.stderr[-4000:]}"
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert sum(outcomes.values()) >= EXAMPLES * len(FILES) // 2
    assert min(outcomes.values()) > 10  # the changes are neither harmless nor hopeless
