"""Fixtures: a toy data set of a few short videos, and a recipe that trains on it in seconds."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlflow.store.db.utils as mlflow_db
import pytest
import ray
from sqlalchemy import Engine

from pipelines.config.recipe import Recipe
from pipelines.config.recipes import toy
from pipelines.core.cluster import init_ray
from pipelines.data.batches import Video
from pipelines.data.plan import Plan
from re2tal.datasets import load_annotations
from re2tal.datasets.toy import ToyConfig, make_toy
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.videos.files import find_videos
from re2tal.videos.windows import WindowConfig
from tests.pipelines.object_store import BUCKET, object_store


@pytest.fixture(autouse=True)
def _no_store_is_left_over() -> Iterator[None]:
    """Remove the store that MLflow leaves in the environment for the next test to use."""
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session", autouse=True)
def _new_stores_are_copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Create the tables of this process's first MLflow store, whose migrations take seconds.

    Later stores are copies of it. Scripts in processes of their own create their own tables.
    """
    empty = tmp_path_factory.mktemp("store") / "mlflow.db"
    made = mlflow_db._initialize_tables

    def copied(engine: Engine) -> None:
        new = engine.url.database
        if engine.dialect.name != "sqlite" or not new:
            made(engine)
        elif empty.exists():
            _copy(empty, new)
        else:
            made(engine)
            _copy(new, empty)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_db, "_initialize_tables", copied)
        yield


def _copy(one: str | Path, other: str | Path) -> None:
    """Copy a database, also one that is open."""
    with closing(sqlite3.connect(one)) as source, closing(sqlite3.connect(other)) as target:
        source.backup(target)


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a toy data set of three training and two validation videos."""
    return _tiny_set(tmp_path_factory.getbasetemp())


@cache  # for the tests of other folders too, which have this fixture of their own
def _tiny_set(parent: Path) -> Path:
    folder = parent / "tiny_set"
    make_toy(folder, ToyConfig(training=3, validation=2, seconds=(14.0, 16.0)))
    return folder


@pytest.fixture(scope="session")
def tiny_plan(tiny_set: Path) -> Plan:
    """Plan of a run on the tiny set."""
    annotations = load_annotations(tiny_set / "annotations.json")
    files, failures = find_videos(annotations, tiny_set / "videos")

    def usable(subset: str) -> tuple[Video, ...]:
        return tuple(
            Video(annotation=video, uri=str(files[video.video_id]))
            for video in annotations.subset(subset).videos
        )

    return Plan(
        classes=annotations.classes,
        training=usable("training"),
        validation=usable("validation"),
        failures=failures,
        fingerprint=annotations.fingerprint,
    )


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Function that sets the number of free bytes that the disk reports."""

    def has(free: int) -> None:
        found = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr("pipelines.core.storage.shutil.disk_usage", lambda _: found)

    return has


@pytest.fixture
def tiny_recipe(tiny_set: Path) -> Recipe:
    """The toy recipe for one worker on the tiny set: one epoch, random weights, fewer pixels."""
    recipe = toy()
    return replace(
        recipe,
        epochs=1,
        scale=replace(recipe.scale, workers=1),
        data=replace(
            recipe.data,
            annotations=str(tiny_set / "annotations.json"),
            videos=str(tiny_set / "videos"),
            size=32,
            window=WindowConfig(frames=64, fps=12.0),
        ),
        model=replace(
            recipe.model,
            weights=None,
            localizer=ActionFormerConfig(
                width=16, heads=2, stem_layers=1, levels=3, window=5, head_width=16, drop_path=0.0
            ),
        ),
    )


@pytest.fixture(scope="session")
def store_environment() -> Iterator[dict[str, str]]:
    """Environment of an object store that lives as long as the tests."""
    with object_store() as environment:
        yield environment


@pytest.fixture
def remote(
    store_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> str:
    """URI of an empty folder in the object store."""
    for name, value in store_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture(scope="session")
def ray_instance() -> Iterator[None]:
    """Ray instance of this test run, for tests that use it from this process.

    Scripts that are called in this process find it running and start no other.
    """
    if ray.is_initialized():  # by the tests of another folder, which end it
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
        init_ray(trains=True, cpus=2)
        yield
        ray.shutdown()
