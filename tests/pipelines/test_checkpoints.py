"""A checkpoint is accepted only if it is complete and undamaged."""

import errno
import json
import math
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pyarrow.fs as pafs
import pytest
import ray.train
import torch
from fsspec.implementations.local import LocalFileSystem
from ray.train.v2._internal.execution.storage import StorageContext

from pipelines.config.recipe import CheckpointConfig, Recipe
from pipelines.core.metric_names import UNSCORED
from pipelines.core.storage import remove, resolve
from pipelines.data.batches import Batch
from pipelines.data.plan import Plan
from pipelines.training.checkpoints import (
    DamagedCheckpointError,
    Waiting,
    complete,
    read_listing,
)
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.optimizer import build_optimizer, build_schedule
from pipelines.training.retention import (
    best_checkpoint,
    checkpoint_name,
    checkpoints,
    drop_list,
    make_room,
    newest_checkpoint,
    remove_surplus,
)
from pipelines.training.run import _start_ray
from pipelines.training.trainer import Trainer
from pipelines.training.worker import RayRuntime, TrainingProblem, Upload, _train
from re2tal.errors import UserError
from re2tal.videos.windows import Window


def _trainer(recipe: Recipe, plan: Plan, folder: Path) -> Trainer:
    runtime = LocalRuntime(recipe, plan, folder)
    return Trainer(
        DetectionTask(recipe=recipe, plan=plan),
        runtime,
        weights=None,
        output=str(folder / "output"),
    )


@pytest.fixture
def checkpoint(tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path) -> Path:
    trainer = _trainer(tiny_recipe, tiny_plan, tmp_path)
    folder = tmp_path / "checkpoint_2026-01-01"
    trainer.state.save(folder, trainer.task.spec)
    complete(folder, {"val/mAP": 0.5})
    return folder


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_an_interrupted_copy_leaves_is_no_checkpoint(
    checkpoint: Path, tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    trainer = _trainer(tiny_recipe, tiny_plan, tmp_path)
    trainer.state.load(checkpoint)
    for name, content in _content(checkpoint).items():
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DamagedCheckpointError, match=name):
            read_listing(checkpoint)
        (checkpoint / name).unlink()
        with pytest.raises(DamagedCheckpointError, match=f"not whole: {name} is missing"):
            trainer.state.load(checkpoint)
        (checkpoint / name).write_bytes(content)
    read_listing(checkpoint)


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _zero(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(8) + content[middle + 8 :]


@pytest.mark.parametrize("damage", [_flip, _zero])
def test_content_that_changed_is_found_in_each_file(
    checkpoint: Path, damage: Callable[[bytes], bytes]
) -> None:
    listing = read_listing(checkpoint, digests=True)
    assert listing.metrics == {"val/mAP": 0.5}
    files = _content(checkpoint)
    assert listing.files.keys() == files.keys() - {"complete.json"}
    for name in listing.files:
        (checkpoint / name).write_bytes(damage(files[name]))
        read_listing(checkpoint)  # the sizes are those that were written
        with pytest.raises(DamagedCheckpointError, match=f"{name} does not have the CRC-32"):
            read_listing(checkpoint, digests=True)
        (checkpoint / name).write_bytes(files[name])


@pytest.mark.parametrize("listed", [b"{}", b"[]", b"", b"\0" * 99, b"{", b"null", b'{"files": {}}'])
def test_a_listing_that_lists_nothing_is_one_clear_message(checkpoint: Path, listed: bytes) -> None:
    (checkpoint / "complete.json").write_bytes(listed)
    with pytest.raises(DamagedCheckpointError) as caught:
        read_listing(checkpoint)
    assert f"The checkpoint in {checkpoint} is not whole: complete.json " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_an_earlier_version_is_read(
    checkpoint: Path, tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    sizes = {name: len(content) for name, content in _content(checkpoint).items()}
    del sizes["complete.json"]
    (checkpoint / "complete.json").write_text(json.dumps(sizes))
    assert read_listing(checkpoint, digests=True).metrics == {}
    _trainer(tiny_recipe, tiny_plan, tmp_path).state.load(checkpoint)
    (checkpoint / "training.pt").write_bytes(b"half")
    with pytest.raises(DamagedCheckpointError, match=r"training.pt has 4 bytes instead of"):
        read_listing(checkpoint)


class _Storage:
    """Folder of a run, with the part of Ray Train's storage that is used."""

    storage_filesystem = pafs.LocalFileSystem()

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def build_checkpoint_path_from_name(self, name: str) -> str:
        return str(self._folder / name)

    def persist_current_checkpoint(self, checkpoint: Any, name: str) -> None:
        shutil.copytree(checkpoint.path, self._folder / name)


class _Kept(LocalRuntime):
    """Runtime that keeps the checkpoints of a run in a folder, as a worker of Ray Train does."""

    def __init__(self, recipe: Recipe, plan: Plan, folder: Path) -> None:
        super().__init__(recipe, plan, folder)
        task = DetectionTask(recipe=recipe, plan=plan)
        self._metrics, self._job = None, SimpleNamespace(output=str(folder), task=task)
        self._storage, self._upload, self._unsettled = _Storage(folder), None, False

    def report(self, metrics: Mapping[str, float], checkpoint: Path) -> None:
        RayRuntime.report(cast("Any", self), metrics, checkpoint)

    def settle(self, *, wait: bool = True) -> None:
        RayRuntime.settle(cast("Any", self), wait=wait)

    def preempted(self) -> bool:
        return RayRuntime.preempted(cast("Any", self))

    def checkpoints(self) -> Sequence[AbstractContextManager[Path]]:
        return RayRuntime.checkpoints(cast("Any", self))


@pytest.fixture
def begin(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Trainer]]:
    """Function that begins or continues a run with three checkpoints, all of which are kept."""
    folder = tmp_path / "run"
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    recipe = replace(tiny_recipe, checkpoints=CheckpointConfig(steps=2, keep=9))

    def begun() -> Trainer:
        runtime = _Kept(recipe, tiny_plan, folder)
        return Trainer(runtime._job.task, runtime, weights=None, output=str(tmp_path / "output"))

    with ThreadPoolExecutor(max_workers=1) as thread:

        def report(metrics: Any, *, checkpoint_upload_fn: Any, **given: Any) -> None:
            assert given["checkpoint_upload_mode"] == ray.train.CheckpointUploadMode.ASYNC
            thread.submit(checkpoint_upload_fn, given["checkpoint"], given["checkpoint_dir_name"])

        monkeypatch.setattr("ray.train.report", report)
        yield begun


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    begin: Callable[[], Trainer], tmp_path: Path
) -> None:
    first = begin()
    first.run()
    kept, rest = checkpoints(str(tmp_path / "run"))
    assert [one.metrics["step"] for one in kept] == [2, 4, 6]
    assert (rest, first.state.step) == ({}, 6)
    assert begin().state.step == 6
    for one, step in ((kept[2], 4), (kept[1], 2)):
        state = Path(one.uri) / "training.pt"
        state.write_bytes(_flip(state.read_bytes()))
        again = begin()
        assert again.state.step == step
        told = [line for line in again.runtime.lines if "training.pt" in line]  # type: ignore[attr-defined]
        assert any(one.name in line and "The one before it is taken" in line for line in told)
    again.run()  # which writes the damaged ones again
    for one in kept:
        read_listing(one.uri, digests=True)
    for one in kept[1:]:
        Path(one.uri, "training.pt").write_bytes(_flip(Path(one.uri, "training.pt").read_bytes()))
    Path(kept[0].uri, "detector", "spec.json").write_bytes(b" " * 8)
    weights = Path(kept[0].uri, "detector", "weights.safetensors")
    weights.write_bytes(_zero(weights.read_bytes()))
    with pytest.raises(UserError, match=r"No checkpoint of the run can be used.*--no-resume"):
        begin()
    # another attempt would not help: a worker returns the problem instead of raising it
    runtime: Any = first.runtime
    problem = _train(runtime._job, first.task, runtime)
    assert isinstance(problem, TrainingProblem)
    assert kept[2].name in problem.message


def test_without_room_a_run_stops_in_one_sentence_and_goes_on_when_there_is_some(
    begin: Callable[[], Trainer],
    disk: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    disk(2**20)
    with pytest.raises(
        UserError, match=r"^There is no room for a checkpoint: \d+ MiB are needed"
    ) as caught:
        begin().run()
    assert "1 MiB are free. Make room, and give the same command again" in str(caught.value)
    assert not run.exists()
    disk(2**40)
    copied = _Storage.persist_current_checkpoint

    def full(storage: _Storage, checkpoint: Any, name: str) -> None:
        if "step_00000004" not in name:
            copied(storage, checkpoint, name)
            return
        (run / name).mkdir()
        (run / name / "training.pt").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_Storage, "persist_current_checkpoint", full)
        with pytest.raises(UserError, match=rf"^There was no room for a checkpoint in {run}"):
            begin().run()
    name = checkpoint_name(epoch=0, step=2)
    assert _names(run) == [name]
    # what an attempt that was killed left behind fills the disk
    left = run / checkpoint_name(epoch=0, step=3) / "training.pt"
    left.parent.mkdir()
    left.write_bytes(b"half")
    usage = shutil.disk_usage("/")

    def filled(place: Path) -> Any:
        return usage._replace(free=0 if place == run and left.exists() else 2**40)

    monkeypatch.setattr("pipelines.core.storage.shutil.disk_usage", filled)
    again = begin()
    assert again.state.step == 2
    again.run()
    assert again.state.step == 6
    kept, rest = checkpoints(str(run))
    assert [one.metrics["step"] for one in kept] == [2, 4, 6]
    assert rest == {}


class _Slow(LocalFileSystem):
    """File system whose writes wait until they are allowed, or fail then."""

    protocol = "slow"
    cachable = False

    def __init__(self) -> None:
        super().__init__(auto_mkdir=True)
        self.let, self.waiting, self.failure = threading.Event(), threading.Event(), 0

    def open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if "w" in mode and "checkpoint_" in path:
            self.waiting.set()
            assert self.let.wait(60), "the training waited"
            if self.failure:
                raise OSError(self.failure, os.strerror(self.failure))
        return super().open(path, mode, **more)


def test_the_training_goes_on_while_a_checkpoint_is_under_way(
    begin: Callable[[], Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, logged, seen = tmp_path / "run", LocalRuntime.log, []
    slow = _Slow()
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(slow))
    trainer: Any = begin()
    runtime = trainer.runtime
    runtime._storage = StorageContext(str(tmp_path), "run", storage_filesystem=filesystem)

    def log(runtime: LocalRuntime, metrics: Mapping[str, float], *, step: int) -> None:
        logged(runtime, metrics, step=step)
        if step == 3:  # the one after the first checkpoint
            assert slow.waiting.wait(60)
            seen.extend(checkpoints(str(run))[0])
            slow.let.set()

    monkeypatch.setattr(LocalRuntime, "log", log)
    trainer.run()
    assert seen == [], "what is under way is nothing to go on from"
    kept, rest = checkpoints(str(run))
    assert ([one.metrics["step"] for one in kept], rest) == ([2, 4, 6], {})

    def handed_over() -> Path:
        return Path(shutil.copytree(kept[0].uri, tmp_path / checkpoint_name(epoch=1, step=8)))

    slow.let.clear()
    slow.failure = errno.ENOSPC
    runtime.report({}, handed_over())
    assert not runtime.preempted(), "it may be looked after without waiting for it"

    def say(line: str) -> None:
        if line.startswith("waiting for the upload"):
            slow.let.set()

    monkeypatch.setattr(runtime, "say", say)
    with pytest.raises(UserError, match=r"^There was no room for a checkpoint in .*/run"):
        runtime.settle()
    # of other errors Ray Train hears, which makes another attempt
    slow.failure = errno.EIO
    upload = Upload(runtime._job, runtime._storage, handed_over())
    whole = ray.train.Checkpoint.from_directory(upload.folder)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        upload(whole, upload.folder.name)
    assert not upload.ended.is_set()
    assert checkpoints(str(run)) == (kept, {})


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_became_read_only_is_one_sentence(
    begin: Callable[[], Trainer],
    tiny_recipe: Recipe,
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, opened = tmp_path / "run", tempfile.TemporaryFile
    run.mkdir()

    def locked(*, dir: Path) -> Any:  # noqa: A002 - the name of the function's argument
        if dir == run:
            raise OSError(number, os.strerror(number))
        return opened(dir=dir)

    monkeypatch.setattr("pipelines.core.storage.tempfile.TemporaryFile", locked)
    with pytest.raises(UserError) as caught:
        begin().run()
    assert str(caught.value) == (
        f"A checkpoint cannot be written to {run}: {os.strerror(number)}. "
        "Make the folder writable, and give the same command again: it goes on."
    )
    monkeypatch.setattr("pipelines.training.run.start_ray", lambda **_: pytest.fail("it began"))
    with pytest.raises(UserError) as again:
        _start_ray(replace(tiny_recipe, output=str(run)))
    assert str(again.value) == str(caught.value)


def _written(run: Path, name: str, **metrics: float) -> str:
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "training.pt").write_bytes(b"state")
    complete(folder, {key.replace("_", "/"): value for key, value in metrics.items()})
    return name


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    old = _written(tmp_path, "checkpoint_2026-01-01_00-00-00")
    new = _written(tmp_path, checkpoint_name(epoch=2, step=9))
    later = _written(tmp_path, checkpoint_name(epoch=2, step=10))
    (tmp_path / later / "training.pt").write_bytes(b"half")
    empty = checkpoint_name(epoch=10, step=40)
    (tmp_path / empty).mkdir()
    kept, rest = checkpoints(str(tmp_path))
    assert [one.name for one in kept] == [old, new]
    assert list(rest) == [later, empty]
    newest = newest_checkpoint(str(tmp_path))
    assert newest is not None
    assert newest.uri == str(tmp_path / new)
    assert newest_checkpoint(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize(
    ("which", "keep", "stay"),
    [
        ("best", 2, [1, 3, 5]),
        ("best", 1, [3, 5]),
        ("last", 2, [4, 5]),
        ("last", 9, [1, 2, 3, 4, 5]),
    ],
)
def test_as_many_checkpoints_stay_as_are_kept(
    tmp_path: Path, which: Literal["best", "last"], keep: int, stay: list[int]
) -> None:
    scores = {1: 0.5, 2: math.nan, 3: 0.7, 4: 0.5 - 1e-9, 5: UNSCORED}
    names = {
        epoch: _written(tmp_path, checkpoint_name(epoch=epoch, step=epoch), val_mAP=score)
        for epoch, score in scores.items()
    }
    config = CheckpointConfig(which=which, keep=keep)
    remove_surplus(str(tmp_path), config, "val/mAP")
    assert _names(tmp_path) == [names[epoch] for epoch in stay]
    # one that is written after the run went on from before it, because the others are damaged
    between = _written(tmp_path, checkpoint_name(epoch=1, step=2), val_mAP=UNSCORED)
    remove_surplus(str(tmp_path), config, "val/mAP", written=between)
    assert _names(tmp_path) == [*([names[1]] if 1 in stay else []), between]


@pytest.mark.parametrize("which", ["best", "last"])
def test_checkpoints_that_wait_for_their_evaluation_stay_and_are_not_the_best(
    tmp_path: Path, which: Literal["best", "last"]
) -> None:
    run, config = str(tmp_path), CheckpointConfig(which=which, keep=1)
    waiting = Waiting(steps=3, parts=(), threads=1, failures={})
    names = [checkpoint_name(epoch=epoch, step=epoch) for epoch in range(1, 5)]
    for epoch, name in enumerate(names, start=1):
        _written(tmp_path, name, val_mAP=UNSCORED, epoch=epoch)
        if epoch in (1, 3):
            (tmp_path / name / "complete.json").unlink()
            complete(tmp_path / name, {"val/mAP": UNSCORED, "epoch": epoch}, waiting=waiting)
    remove_surplus(run, config, "val/mAP")
    assert _names(tmp_path) == [names[0], names[2], names[3]]
    assert [one.waits for one in checkpoints(run)[0]] == [True, True, False]
    with (
        pytest.raises(UserError, match=r"No checkpoint in .* is whole and has val/mAP"),
        best_checkpoint(run, "val/mAP", say=print),
    ):
        raise AssertionError
    # behind the one that was written just now they were found damaged
    remove_surplus(run, config, "val/mAP", written=names[1])
    assert _names(tmp_path) == [names[0]]


def test_checkpoints_are_kept_in_an_object_store_too(remote: str, tmp_path: Path) -> None:
    for epoch, score in ((1, 0.2), (2, 0.5), (3, 0.1), (4, 0.3)):
        name = _written(tmp_path, checkpoint_name(epoch=epoch, step=epoch), val_mAP=score)
        filesystem, path = resolve(f"{remote}/{name}")
        filesystem.create_dir(path, recursive=True)
        pafs.copy_files(str(tmp_path / name), path, destination_filesystem=filesystem)
    remove(f"{remote}/{checkpoint_name(epoch=4, step=4)}/training.pt")
    make_room(remote, "", 2**60)
    remove_surplus(remote, CheckpointConfig(keep=1), "val/mAP")
    kept, rest = checkpoints(remote)
    assert [one.metrics["val/mAP"] for one in kept] == [0.5, 0.1]
    assert rest == {}
    with best_checkpoint(remote, "val/mAP", say=print) as (folder, metrics):
        assert metrics == {"val/mAP": 0.5}
        assert (folder / "training.pt").read_bytes() == b"state"


def test_the_best_checkpoint_is_one_that_is_not_damaged(tmp_path: Path) -> None:
    run = str(tmp_path)
    said: list[str] = []
    for epoch, score in ((1, 0.5), (2, 0.5), (3, 0.7), (4, UNSCORED)):
        _written(tmp_path, checkpoint_name(epoch=epoch, step=epoch), val_mAP=score, epoch=epoch)
    best = tmp_path / checkpoint_name(epoch=3, step=3) / "training.pt"
    best.write_bytes(b"stale")
    with best_checkpoint(run, "val/mAP", say=said.append) as (_, metrics):
        assert metrics["epoch"] == 1
    assert len(said) == 1
    assert best.parent.name in said[0]
    for epoch in (1, 2):
        (tmp_path / checkpoint_name(epoch=epoch, step=epoch) / "training.pt").write_bytes(b"stale")
    with (
        pytest.raises(UserError, match=r"No checkpoint in .* is whole and has val/mAP"),
        best_checkpoint(run, "val/mAP", say=said.append),
    ):
        raise AssertionError


@pytest.mark.parametrize("cut", [False, True])
def test_the_list_of_ray_train_is_not_needed(tmp_path: Path, cut: bool) -> None:
    names = [f"checkpoint_2026-01-01_00-00-0{second}" for second in range(3)]
    for name in names:
        _written(tmp_path, name)
        (tmp_path / name / "complete.json").write_text('{"training.pt": 5}')  # an earlier version
    new = _written(tmp_path, checkpoint_name(epoch=4, step=8), val_mAP=0.25)
    listed = {
        "checkpoint_results": [
            {"checkpoint_dir_name": name, "metrics": {"val/mAP": score, "epoch": 1, "note": None}}
            for name, score in zip(
                [*names, new, "checkpoint_gone"], (0.5, 0.125, 0.75, 0.875, 1), strict=True
            )
        ]
    }
    content = json.dumps(listed)
    snapshot = tmp_path / "checkpoint_manager_snapshot.json"
    snapshot.write_text(content[: len(content) // 2] if cut else content)
    drop_list(str(tmp_path))
    assert _names(tmp_path) == [*names, new]
    scores = [one.metrics.get("val/mAP") for one in checkpoints(str(tmp_path))[0]]
    assert scores == ([None] * 3 if cut else [0.5, 0.125, 0.75]) + [0.25]
    drop_list(str(tmp_path))
    with best_checkpoint(str(tmp_path), "val/mAP", say=print) as (folder, _):
        assert folder.name == (new if cut else names[2])


def test_nothing_in_a_checkpoint_is_unpickled(checkpoint: Path) -> None:
    for path in checkpoint.rglob("*.pt"):
        torch.load(path, weights_only=True)
    assert {p.suffix for p in checkpoint.rglob("*") if p.is_file()} == {
        ".pt",
        ".json",
        ".safetensors",
    }


@pytest.mark.slow
def test_a_run_goes_on_from_the_midst_of_an_epoch_bit_for_bit(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    dropping = replace(tiny_recipe.model.localizer, drop_path=0.2)  # type: ignore[type-var]
    recipe = replace(
        tiny_recipe,
        model=replace(tiny_recipe.model, localizer=dropping),
        checkpoints=replace(tiny_recipe.checkpoints, steps=2),
    )
    whole = _trainer(recipe, tiny_plan, tmp_path / "whole")
    whole.run()
    first = _trainer(recipe, tiny_plan, tmp_path / "parts")
    take = first.step
    taken: list[Sequence[Batch]] = []

    def twice(passes: Sequence[Batch]) -> dict[str, float]:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(passes)
        return take(passes)

    first.step = twice  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = _trainer(recipe, tiny_plan, tmp_path / "parts")
    assert (second.state.step, second.state.windows) == (2, 2 * recipe.batch_size)
    second.run()
    assert second.state.step == whole.state.step
    for name, value in whole.state.detector.state_dict().items():
        assert torch.equal(value, second.state.detector.state_dict()[name]), name
    for name, value in whole.state.average.state_dict().items():
        assert torch.equal(value, second.state.average.state_dict()[name]), name


def test_a_notice_that_a_node_goes_away_is_answered_by_a_checkpoint(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.training.trainer.PREEMPTION_STEPS", 2)
    trainer = _trainer(tiny_recipe, tiny_plan, tmp_path)
    runtime: Any = trainer.runtime
    asked, reported = [], []

    def preempted() -> bool:
        asked.append(trainer.state.step)
        return len(asked) == 1

    def report(metrics: dict[str, float], checkpoint: Path) -> None:
        read_listing(checkpoint, digests=True)
        state = torch.load(checkpoint / "training.pt", weights_only=True)
        reported.append((state["epoch"], state["step"], metrics["val/mAP"] >= 0))

    runtime.preempted, runtime.report = preempted, report
    trainer.run()
    last = trainer.state.step
    assert asked[0] == 2
    assert all(step % 2 == 0 for step in asked)
    assert reported == [(0, 2, False), (1, last, True)]


def test_more_workers_take_up_what_fewer_left(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    recipe = replace(tiny_recipe, batch_size=1)
    alone = _trainer(recipe, tiny_plan, tmp_path)
    everything = alone._windows(0)
    alone.state.windows, alone.state.step = 3, 3
    left: list[Window] = []
    for rank in range(2):
        runtime = LocalRuntime(recipe, tiny_plan, tmp_path / "workers")
        runtime.rank, runtime.world_size = rank, 2
        if rank == 0:
            folder = tmp_path / "workers" / "checkpoint"
            folder.mkdir(parents=True)
            alone.state.save(folder, alone.task.spec)
            complete(folder, {})
        task = DetectionTask(recipe=recipe, plan=tiny_plan)
        both = Trainer(task, runtime, weights=None, output=str(tmp_path / "output"))
        assert (both.state.windows, both.state.world_size) == (3, 2)
        assert both._steps == len(everything) // 2
        left += both._windows(0, behind=both.state.windows)
    whole_steps = (len(everything) - 3) // 2 * 2
    expected = [(w.video_id, w.grid) for w in everything[3 : 3 + whole_steps]]
    assert sorted(map(str, expected)) == sorted(str((w.video_id, w.grid)) for w in left)
    # as if two had trained all along, one step lay behind
    schedule = build_schedule(
        build_optimizer(both.state.detector, recipe.optim),
        recipe.optim,
        steps_per_epoch=both._steps,
        epochs=recipe.epochs,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule.step()
    assert both.state.schedule.get_last_lr() == pytest.approx(schedule.get_last_lr())
    assert both._windows(0, behind=len(everything) - 1) == []
