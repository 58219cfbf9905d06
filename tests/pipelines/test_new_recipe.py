"""Advice for a new data set: a recipe that loads and builds, whatever the data are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from pipelines.config.choices import recipe_named
from pipelines.config.clip_recipes import finetuning
from pipelines.config.recipe import Recipe
from pipelines.config.recipes import RECIPES
from pipelines.new_recipe import main
from pipelines.training import facts as facts_module
from pipelines.training.advice import _ON_GPU, Advice, advise
from pipelines.training.facts import Machine, NewRecipeConfig, look_at, this_machine
from pipelines.training.run import check_model
from pipelines.training.written_recipe import written
from re2tal.annotations import AnnotationError
from re2tal.datasets.toy import make_toy, unseen_toy
from re2tal.errors import UserError
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.videos.encoding import encode

CORES = Machine(gpus=0, here=True, memory=2**31, cores=2, described="no GPU, 2 cores")


def gpu(gibibytes: float) -> Machine:
    return Machine(
        gpus=1, here=False, memory=int(gibibytes * 2**30), cores=8, described=f"{gibibytes} GiB"
    )


Segments = Sequence[tuple[float, float, str]]


def data_set(
    folder: Path,
    videos: Mapping[str, tuple[str, float, Segments]],
    *,
    lost: Sequence[str] = (),
    fps: int = 12,
) -> NewRecipeConfig:
    """Write annotations (id to subset, duration and segments) and video files, all of 1 s."""
    database = {
        video_id: {
            "subset": subset,
            "duration": duration,
            "annotations": [{"segment": [s, e], "label": label} for s, e, label in segments],
        }
        for video_id, (subset, duration, segments) in videos.items()
    }
    (folder / "videos").mkdir(parents=True)
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    first = None
    for video_id in sorted(videos.keys() - set(lost)):
        path = folder / "videos" / f"{video_id}.mp4"
        if first is None:
            encode(path, np.zeros((fps, 32, 32, 3), np.uint8), fps=fps)
            first = path.read_bytes()
        path.write_bytes(first)
    return NewRecipeConfig(
        annotations=str(folder / "annotations.json"), videos=str(folder / "videos")
    )


def loaded(advice: Advice, text: str, folder: Path) -> Recipe:
    """Load the recipe from its text as `train.py` does, and check that it is the advised one."""
    path = folder / f"recipe_{abs(hash(str(folder)))}.py"
    path.write_text(text)
    recipe = recipe_named(str(path), RECIPES, Recipe)
    assert recipe == advice.recipe
    assert all(len(line) <= 100 for line in text.splitlines() if line.lstrip().startswith("#"))
    return recipe


ONE = [(1.0, 3.0, "jump")]
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "one class": (
        {"a": ("training", 20.0, ONE), "b": ("validation", 20.0, ONE)},
        "1 class has fewer than 10 training instances",
    ),
    "one video": ({"a": ("training", 20.0, ONE)}, "all videos are in the subset 'training'"),
    "no segment in training": (
        {"a": ("training", 20.0, []), "b": ("validation", 20.0, ONE)},
        "the subset 'training' has no annotated segment",
    ),
    "no segment in validation": (
        {"a": ("training", 20.0, ONE), "b": ("validation", 20.0, [])},
        "the subset 'validation' has no annotated segment",
    ),
    "very short segments": (
        {
            "a": ("training", 600.0, [(float(i), i + 0.01, "jump") for i in range(500)]),
            "b": ("validation", 60.0, ONE),
        },
        "500 segments are shorter than two features",
    ),
    "very long segments": (
        {
            "a": ("training", 90000.0, [(1.0, 80000.0, "sit"), (80001.0, 80001.2, "jump")]),
            "b": ("validation", 60.0, ONE),
        },
        "1 segment is longer than a window",
    ),
    "a class that only one subset has": (
        {
            "a": ("training", 20.0, [(1.0, 2.0, "a'b\"c\\\n'''"), (3.0, 5.0, "jump")]),
            "b": ("validation", 20.0, ONE),
        },
        "the subset 'validation' has no instance of",
    ),
    "other names of subsets": (
        {"a": ("train", 20.0, ONE), "b": ("val", 20.0, ONE), "c": ("unused", 9.0, [])},
        "fewer than 10",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_recipe_loads_and_builds_whatever_the_data_is_like(kind: str, tmp_path: Path) -> None:
    videos, warning = HOSTILE[kind]
    facts = look_at(data_set(tmp_path, videos))
    advice = advise(facts, CORES)
    recipe = loaded(advice, written(advice, facts, CORES), tmp_path)
    assert any(warning in text for text in advice.warnings), advice.warnings
    check_model(replace(recipe, output=str(tmp_path)), facts.classes)
    if recipe.finetune.epochs:
        finetuning(recipe)
    if kind == "other names of subsets":
        assert (recipe.data.trained_on, recipe.data.evaluated_on) == ("train", "val")


def test_videos_that_cannot_be_used_are_named_and_without_data_there_is_no_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = {f"v{i}": ("training" if i else "validation", 20.0, ONE) for i in range(5)}
    config = data_set(tmp_path, videos, lost=["v2"])
    (tmp_path / "videos" / "v4.mp4").write_bytes(b"no video")
    facts = look_at(config)
    assert [v.video_id for v in facts.training] == ["v1", "v3"]
    (warning,) = [text for text in advise(facts, CORES).warnings if "cannot be used" in text]
    assert warning.startswith("of 5 videos, of which 4 were opened, 2 cannot be used (v2: ")
    assert warning.endswith("(--exclude FILE), or give it --data.max-failed 0.4")
    (tmp_path / "videos" / "v3.mp4").write_bytes(b"no video")
    monkeypatch.setattr(facts_module, "_LOOKED_AT", 2)  # v0 and v3
    (warning,) = [t for t in advise(look_at(config), CORES).warnings if "cannot be used" in t]
    assert warning.startswith("of 5 videos, of which 2 were opened, 2 cannot be used (v2: ")
    assert warning.endswith("--data.max-failed 0.6"), "one absent, and half of the four files"
    nothing = data_set(tmp_path / "nothing", {"a": ("training", 20.0, [])})
    with pytest.raises(AnnotationError, match="there is nothing to learn"):
        look_at(nothing)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="None of the 5 annotated videos is in"):
        look_at(replace(config, videos=str(empty)))


def test_the_windows_and_levels_cover_the_lengths(tmp_path: Path) -> None:
    lengths = [0.5] * 20 + [4.0] * 60 + [20.0] * 20
    segments = [(50.0 * i, 50.0 * i + length, f"c{i % 3}") for i, length in enumerate(lengths)]
    videos = {"a": ("training", 5000.0, segments), "b": ("validation", 50.0, ONE)}
    facts = look_at(data_set(tmp_path, videos, fps=25))
    advice = advise(facts, CORES)
    recipe, localizer = advice.recipe, cast("ActionFormerConfig", advice.recipe.model.localizer)
    window = recipe.data.window
    assert window.fps == 15.0  # the files have 25
    assert window.frames / window.fps >= 20.0
    half = 20.0 * window.fps / 2 / 2  # features from the middle of the longest to its end
    assert localizer.first_range * 2 ** (localizer.levels - 1) >= half
    assert "to 0.8 s 20%, to 1.6 s 0%" in advice.reasons["model.localizer.levels"]
    shares = [int(part.split()[-1][:-1]) for part in
              advice.reasons["model.localizer.levels"].split(", ")]  # fmt: skip
    assert sum(shares) == 100


@pytest.mark.parametrize(
    ("labels", "flip"), [(("turn left", "turn right"), 0.0), (("jump", "sit"), 0.5)]
)
def test_actions_with_a_side_are_not_mirrored(
    labels: Sequence[str], flip: float, tmp_path: Path
) -> None:
    segments = [(4.0 * i, 4.0 * i + 2, labels[i % 2]) for i in range(40)]
    videos = {"a": ("training", 200.0, segments), "b": ("validation", 200.0, segments)}
    facts = look_at(data_set(tmp_path, videos))
    advice = advise(facts, CORES)
    assert advice.recipe.data.augmentation.flip == flip
    assert advice.warnings == []
    assert "40 segments" in advice.reasons["finetune.epochs"]


@pytest.mark.slow
def test_the_model_is_the_largest_that_fits_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = {"a": ("training", 200.0, ONE), "b": ("validation", 200.0, ONE)}
    facts = look_at(data_set(tmp_path, videos))
    advice = advise(facts, gpu(24))
    large = advice.recipe
    assert large.model.weights == "torchvision:swin3d_t/KINETICS400_V1"
    assert (large.data.size, large.scale.gpu, large.optim.precision) == (224, True, "bfloat16")
    assert any("this machine has none" in text for text in advice.warnings)
    loaded(advice, written(advice, facts, gpu(24)), tmp_path)
    # of a table with fewer sizes, for the sake of the test's time: 1.3 and 1.0 GiB
    monkeypatch.setattr("pipelines.training.advice._ON_GPU", large_and_small())
    chosen = [advise(facts, gpu(memory)).recipe for memory in (1.35, 0.3)]
    assert [(one.data.size, one.scale.gpu) for one in chosen] == [(48, True), (64, False)]
    small = gpu(0.001)
    monkeypatch.setattr("pipelines.training.advice._ON_GPU", ())
    assert any("does not fit" in text for text in advise(facts, small).warnings)


def large_and_small() -> tuple[Any, ...]:
    """Smallest size of the table, and a smaller one."""
    least = _ON_GPU[-1]
    return least, replace(least, size=48)


def test_the_script_prints_the_recipe_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_toy(tmp_path, replace(unseen_toy(), training=2, validation=1, seconds=(12.0, 13.0)))
    command = ["--annotations", str(tmp_path / "annotations.json"),
               "--videos", str(tmp_path / "videos")]  # fmt: skip
    main(command)
    printed = capsys.readouterr()
    assert "warning: " in printed.err
    path = tmp_path / "of_the_script.py"
    path.write_text(printed.out)
    recipe = recipe_named(str(path), RECIPES, Recipe)
    if not torch.cuda.is_available():
        assert recipe.data.size == 64
        assert not recipe.scale.gpu
    assert "# warning: " in printed.out
    with pytest.raises(UserError, match=r"--memory: 'much' is not a memory size"):
        main([*command, "--memory", "much"])
    assert capsys.readouterr().out == ""
    assert this_machine(2**34).memory == 2**34
