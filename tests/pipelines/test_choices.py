"""Choices on the command line: backbones by name, and recipes and localizers of the user's own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import save_file

from pipelines import detect, evaluate, extract_features, finetune_backbone, train
from pipelines.config.choices import own_code
from pipelines.config.recipe import Recipe
from pipelines.config.recipes import RECIPES, toy
from pipelines.data.feature_extraction import load_backbone
from pipelines.data.feature_options import FrozenBackboneConfig
from pipelines.data.plan import Plan
from pipelines.experiments import profiles as planner
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.run import check_model
from pipelines.training.trainer import Trainer
from re2tal.backbones.frames import clip_b
from re2tal.backbones.slowfast import slowfast_101, slowfast_toy
from re2tal.backbones.swin import swin_t
from re2tal.backbones.table import IMAGENET_MEAN, IMAGENET_STD, entry_of
from re2tal.backbones.videomae import videomae_toy
from re2tal.detector import grey_levels, normalize
from re2tal.errors import UserError
from re2tal.trained import load_detector

ROOT = Path(__file__).parents[2]
SMALL = (
    "--model.weights", "None",
    "--data.size", "32",
    "--data.window.frames", "64",
    "--epochs", "1",
    "--scale.workers", "1",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder with the example of the README; modules imported from it are unloaded afterwards."""
    text = (ROOT / "pipelines" / "README.md").read_text()
    found = re.search(r"## A recipe of your own.*?```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    (tmp_path / "my_recipe.py").write_text(found[1])
    shutil.copy(ROOT / "tests" / "localizers" / "tiny.py", tmp_path / "my_localizer.py")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    forget(tmp_path, before)


def forget(folder: Path, before: set[str]) -> None:
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
            del sys.modules[name]


def test_a_backbone_is_chosen_by_name_and_its_fields_stay_overridable() -> None:
    recipe = train.parse(
        ["toy", "--model.backbone", "slowfast_toy", "--model.backbone.width", "16"]
    )
    base = toy()
    expected = replace(base.model, backbone=replace(slowfast_toy(), width=16))
    assert recipe == replace(base, model=expected)
    shaped = train.parse(["--model.backbone=swin_t", "--model.backbone.pooling", "2"])
    assert shaped.model.backbone == replace(swin_t(), pooling=2)
    every = ["--model.backbone.every", "4", "--model.backbone.pool", "class"]
    images = train.parse(["--model.backbone", "clip_b", *every]).model
    assert images.backbone == replace(clip_b(), every=4, pool="class")
    assert (images.mean, images.std) == (entry_of("clip_b").mean, entry_of("clip_b").std)
    clips = finetune_backbone.parse(["--model.backbone", "slowfast_101"])
    assert clips.model.backbone == slowfast_101()
    asked = planner.parse(["toy", "--model.backbone", "swin_s"])
    assert isinstance(asked, planner.RecipeProfile)
    assert asked.recipe.model.backbone == entry_of("swin_s").make()


def test_normalisation_follows_the_backbone_unless_given() -> None:
    named = ["--model.backbone", "pytorchvideo_slowfast_50"]
    model = train.parse(["toy", *named]).model
    assert (model.mean, model.std) == ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))
    model = train.parse(["toy", *named, "--model.mean", "0.5", "0.5", "0.5"]).model
    assert (model.mean, model.std) == ((0.5, 0.5, 0.5), (0.225, 0.225, 0.225))


def test_an_unknown_backbone_is_refused_with_the_list_by_every_script() -> None:
    refusal = r"There is no backbone 'resnet'. Choose one of: .*swin_t"
    for parse in (train.parse, finetune_backbone.parse):
        with pytest.raises(UserError, match=refusal):
            parse(["--model.backbone", "resnet"])
    with pytest.raises(UserError, match=refusal):
        planner.parse(["--backbone", "resnet"]).subject()
    with pytest.raises(UserError, match=refusal):
        extract_features.parse(["--backbone", "resnet"])


def test_a_model_of_clips_makes_features_from_the_folder_of_its_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = videomae_toy().build().eval()
    state = {f"videomae.{name}": value for name, value in made.state_dict().items()}
    save_file(state | {"fc_norm.bias": torch.zeros(made.channels)}, tmp_path / "model.safetensors")
    config = FrozenBackboneConfig(backbone="videomae_toy", weights=str(tmp_path), size=64)
    frozen = load_backbone(config, stride=4)
    assert (frozen.channels, frozen.temporal_stride, frozen.multiple) == (made.channels, 4, 16)
    frames = torch.randint(0, 256, (1, 32, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        seen = normalize(frames, grey_levels(IMAGENET_MEAN), grey_levels(IMAGENET_STD))
        wanted = made(seen).unflatten(2, (8, 2)).mean(dim=3)
    torch.testing.assert_close(frozen.build(torch.device("cpu"))(frames), wanted)


@pytest.mark.parametrize(
    ("backbone", "frames", "unit"), [("videomae_toy", 72, 32), ("swin_toy", 126, 32)]
)
def test_a_window_that_the_model_cannot_take_is_refused_before_the_start(
    backbone: str, frames: int, unit: int
) -> None:
    given = ["toy", *SMALL, "--model.backbone", backbone, "--data.window.frames"]
    check_model(train.parse([*given, "128"]), ("a", "b"))
    with pytest.raises(UserError, match=rf"frames must be a multiple of {unit} .* but is {frames}"):
        check_model(train.parse([*given, str(frames)]), ("a", "b"))


def test_a_recipe_of_ones_own_trains_and_its_detector_is_read_again(
    folder: Path, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(sys.modules)
    recipe = train.parse([str(folder / "my_recipe.py"), *SMALL, "--model.localizer.kernel", "7"])
    assert recipe.name == "mine"
    beside = {str(folder / name) for name in ("my_recipe.py", "my_localizer.py")}
    assert {path for path in own_code() if Path(path).parent == folder} == beside
    runtime = LocalRuntime(recipe, tiny_plan, folder)
    task = DetectionTask(recipe=recipe, plan=tiny_plan)
    Trainer(task, runtime, weights=None, output=str(folder / "output")).run()
    saved = folder / "checkpoint" / "detector"
    forget(folder, before)
    with pytest.raises(UserError, match="import its module first"):
        load_detector(saved)
    evaluate.parse(["--import", str(folder / "my_localizer.py"), "--model", str(saved)])
    assert str(load_detector(saved)[0].localizer) == str(recipe.model.localizer)
    forget(folder, before)
    monkeypatch.chdir(folder)
    detect.parse(["--import", "my_localizer", "--model", str(saved)])
    assert str(load_detector(saved)[0].localizer) == str(recipe.model.localizer)


@pytest.mark.usefixtures("folder")
def test_a_recipe_is_named_by_module_and_function(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in ("my_recipe:my_recipe", "my_recipe.py:my_recipe", "my_recipe.py"):
        assert train.parse([name]).name == "mine"


TWO = """
from pipelines.config.recipes import Recipe, toy
def one() -> Recipe: return toy()
def two() -> Recipe: return toy()
"""


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (None, "mine.py", "There is no file mine.py"),
        (None, "mine_nowhere:recipe", "There is no module 'mine_nowhere'"),
        ("", "mine.py", "needs one function .* a Recipe, but has none"),
        ("", "mine.py:recipe", "mine.py has no function 'recipe'"),
        ("def one() -> int:\n    return 1\n", "mine.py:one", "returns a int, not a Recipe"),
        (
            TWO,
            "mine.py",
            "but has one, two: name one as mine.py:my_recipe",
        ),
        (None, "mine", "There is no recipe 'mine'. Choose one of: toy, .* or give your own as"),
    ],
)
def test_what_is_no_recipe_is_refused_in_a_sentence(
    folder: Path, content: str | None, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if content is not None:
        (folder / "mine.py").write_text(content)
    with pytest.raises(UserError, match=expected):
        train.parse([name])


@pytest.mark.usefixtures("folder")
def test_a_file_with_the_name_of_another_module_is_refused(folder: Path) -> None:
    (folder / "json.py").write_text("")
    with pytest.raises(UserError, match=r"name of another module, .*rename the file"):
        train.parse([str(folder / "json.py")])


def test_recipes_of_ours_are_no_modules() -> None:
    assert all(isinstance(train.parse([name]), Recipe) for name in RECIPES)


@pytest.mark.slow
@pytest.mark.long
def test_the_readmes_example_runs_on_ray(folder: Path, tiny_set: Path, tmp_path: Path) -> None:
    work = tmp_path / "elsewhere"  # Ray's workers look for modules in the driver's folder
    work.mkdir()
    command = [
        *(sys.executable, str(ROOT / "pipelines" / "train.py"), str(folder / "my_recipe.py")),
        *("--data.annotations", str(tiny_set / "annotations.json")),
        *("--data.videos", str(tiny_set / "videos")),
        *SMALL,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (run,) = MlflowClient(f"sqlite:///{work / 'runs' / 'mlflow.db'}").search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.localizer.kernel"] == "5"
    assert 0 <= run.data.metrics["val/mAP"] <= 1
