"""Step 4 of the paper: the script as a user runs it, and its parts."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors import safe_open
from torch import Tensor

from pipelines.config.clip_recipes import (
    RECIPES,
    ClassificationRecipe,
    TrimmedDataConfig,
    finetuning,
    toy,
)
from pipelines.config.recipe import FinetuneConfig, Recipe
from pipelines.config.recipes import toy as train_toy
from pipelines.core.models import fetch_weights, require_weights
from pipelines.core.storage import local_copy
from pipelines.core.tracking import Run
from pipelines.data.batches import Batch, decode_batches
from pipelines.data.clip_plan import BACKGROUND, ClassificationPlan, make_plan, read_lists
from pipelines.data.inputs import classification_inputs
from pipelines.data.videos import probe_files_here
from pipelines.finetune_backbone import parse
from pipelines.training.beside import evaluate
from pipelines.training.checkpoints import Waiting
from pipelines.training.classification import (
    ClassificationTask,
    accuracy_metrics,
    build_classifier,
    score_videos,
)
from pipelines.training.local import LocalRuntime
from pipelines.training.run import _log_backbone, check_model
from pipelines.training.trainer import Trainer
from re2tal import rewire
from re2tal.backbones.swin import SwinConfig, swin_toy
from re2tal.backbones.weights import load_backbone_weights
from re2tal.classifier import Classifier, ClipClassifierConfig
from re2tal.datasets import load_annotations
from re2tal.datasets.toy import TRIMMED_CLASSES, TrimmedToyConfig, make_trimmed_toy
from re2tal.datasets.trimmed import ClipConfig, TrimmedVideo, ViewConfig, views
from re2tal.errors import UserError
from re2tal.reversible.controls import reversible_stages
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.windows import Window
from tests.pipelines.scripts import run_here

SCRIPT = Path(__file__).parents[2] / "pipelines" / "finetune_backbone.py"
TINY = SwinConfig(patch=(2, 8, 8), embed_dim=16, depths=(1, 1), heads=(1, 2), window=(4, 4, 4))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiniest trimmed toy split."""
    folder = tmp_path_factory.mktemp("trimmed")
    return make_trimmed_toy(folder, TrimmedToyConfig(training=8, validation=7, seconds=1.5))


@pytest.fixture(scope="module")
def recipe(clips: Path) -> ClassificationRecipe:
    """Toy recipe on the tiniest split, one epoch from random weights."""
    base = toy()
    data = replace(
        base.data,
        training=str(clips / "training"),
        validation=str(clips / "validation"),
        size=32,
        clip=ClipConfig(frames=8, fps=12.0),
    )
    model = replace(base.model, weights=None, backbone=TINY)
    return replace(
        base,
        epochs=1,
        batch_size=4,
        data=data,
        model=model,
        views=ViewConfig(clips=2),
        scale=replace(base.scale, workers=1),
    )


@pytest.fixture(scope="module")
def plan(recipe: ClassificationRecipe) -> ClassificationPlan:
    """Plan with all clips of the tiniest split."""
    lists = read_lists(recipe.data)
    found = {
        subset: tuple(
            TrimmedVideo(
                video_id=f"{subset}/{entry.video_id}",
                label=lists.classes.index(entry.label),
                start=0.0,
                end=1.5,
            )
            for entry in lists.subsets[subset].entries
        )
        for subset in ("training", "validation")
    }
    return ClassificationPlan(
        classes=lists.classes,
        training=found["training"],
        validation=found["validation"],
        uris={
            f"{subset}/{name.removesuffix('.mp4')}": uri
            for subset in found
            for name, uri in lists.files[subset].items()
        },
        failures={},
        fingerprint=lists.fingerprint,
    )


def couplings(model: Any) -> set[tuple[float, float]]:
    stages = [stage for _, stage in reversible_stages(model)]
    assert stages
    found = [stage.settings.coupling for stage in stages]
    return {(coupling.alpha, coupling.beta) for coupling in found}


def test_an_epoch_shows_a_clip_of_every_video_and_follows_seed_and_epoch(
    recipe: ClassificationRecipe, plan: ClassificationPlan
) -> None:
    def shown(seed: int, epoch: int) -> list[tuple[str, float]]:
        task = ClassificationTask(recipe=replace(recipe, seed=seed), plan=plan)
        return [(w.video_id, w.grid.offset) for w in task.windows(stride=2, epoch=epoch)]

    first = shown(0, 0)
    assert sorted(name for name, _ in first) == sorted(v.video_id for v in plan.training)
    assert first == shown(0, 0)
    assert first not in (shown(0, 1), shown(1, 0))
    assert [name for name, _ in first] != [name for name, _ in shown(0, 1)]


def test_clips_are_shown_at_other_speeds_and_backwards_inside_their_segments(
    recipe: ClassificationRecipe, plan: ClassificationPlan
) -> None:
    def windows(**changes: Any) -> list[Window]:
        data = replace(recipe.data, augmentation=AugmentationConfig(**changes))
        task = ClassificationTask(recipe=replace(recipe, data=data), plan=plan)
        return task.windows(stride=2, epoch=0)

    plain, same = windows(), windows(speed=(1.0, 1.0))
    assert [(w.video_id, w.grid, w.backwards) for w in plain] == [
        (w.video_id, w.grid, w.backwards) for w in same
    ]
    ends = {video.video_id: (video.start, video.end) for video in plan.training}
    changed = windows(speed=(0.5, 2.0), reverse=0.5)
    assert [w.video_id for w in changed] == [w.video_id for w in plain]
    assert {w.backwards for w in changed} == {False, True}
    rates = [w.grid.fps for w in changed]
    assert 6.0 <= min(rates) < 12.0 < max(rates) <= 24.0
    for window in changed:
        start, end = ends[window.video_id]
        times = window.frame_times()
        assert start <= times.min() <= times.max() <= end
        assert (np.sign(np.diff(times)) == (-1 if window.backwards else 1)).all()
        assert len(times) == sum(
            window.grid.offset + (frame + 0.5) / window.grid.fps <= end for frame in range(8)
        )


def test_a_run_trains_evaluates_and_tests(
    recipe: ClassificationRecipe, plan: ClassificationPlan, tmp_path: Path
) -> None:
    runtime = LocalRuntime(recipe, plan, tmp_path)
    task = ClassificationTask(recipe=recipe, plan=plan)
    trainer = Trainer(task, runtime, weights=None, output=str(tmp_path))
    before = [p.detach().clone() for p in trainer.state.detector.parameters()]
    metrics = trainer.run()
    changed = [
        not torch.equal(old, new)
        for old, new in zip(before, trainer.state.detector.parameters(), strict=True)
    ]
    assert sum(changed) > 0.8 * len(changed)
    # the metrics are those of the averaged classifier: computed here window by window
    classifier = cast("Classifier", trainer.state.average.module).eval()
    for prefix, view in (("val", ViewConfig()), ("test", recipe.views)):
        right = 0
        for video in plan.validation:
            windows = list(views(video, recipe.data.clip, view, stride=2))
            batches = decode_batches(windows, plan.uris, size=32, batch_size=1)
            with torch.no_grad():
                scores = [clip_scores(classifier, batch.frames) for batch in batches]
            assert len(scores) == view.clips
            right += int(torch.stack(scores).mean(dim=0).argmax()) == video.label
        assert metrics[f"{prefix}/top1"] == pytest.approx(right / 7)
    assert any("test" in line and "2 x 1 views" in line for line in runtime.lines)
    # beside the training they would be the same
    waiting = Waiting(steps=2, parts=(), threads=torch.get_num_threads(), failures={})
    other = LocalRuntime(recipe, plan, tmp_path / "other")
    folder = tmp_path / "checkpoint"
    assert evaluate(task, other, folder, epoch=1, waiting=waiting).metrics == metrics


def clip_scores(classifier: Classifier, frames: Tensor) -> Tensor:
    """Compute the probabilities (K,) of one unpadded clip from the parts of the network."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    video = ((frames / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    features = classifier.backbone(video).mean(dim=2)
    return torch.as_tensor(classifier.localizer.linear(features)[0].softmax(dim=0))


def test_scores_are_averaged_over_the_views_that_could_be_decoded(
    recipe: ClassificationRecipe, plan: ClassificationPlan
) -> None:
    torch.manual_seed(0)
    classifier = build_classifier(recipe, plan.classes, None).eval()
    video, other = plan.validation[:2]
    windows = [
        *views(video, recipe.data.clip, ViewConfig(clips=3), stride=2),
        *views(other, recipe.data.clip, ViewConfig(clips=1), stride=2),
    ]
    batches = list(decode_batches(windows, plan.uris, size=32, batch_size=2))
    lost = Batch(
        windows=batches[0].windows,
        frames=batches[0].frames,
        mask=batches[0].mask & torch.tensor([[True], [False]]),
        targets=batches[0].targets,
        failures={video.video_id: "cut off"},
    )
    scores, failures = score_videos(classifier, [lost, batches[1]])
    assert failures == {video.video_id: "cut off"}
    with torch.no_grad():
        kept = [clip_scores(classifier, f[None]) for f in (lost.frames[0], batches[1].frames[0])]
    torch.testing.assert_close(
        scores[video.video_id].float(), torch.stack(kept).mean(dim=0), rtol=1e-4, atol=1e-5
    )
    metrics = accuracy_metrics(scores, plan.validation, prefix="x")  # of those that have scores
    right = [int(scores[v.video_id].argmax()) == v.label for v in (video, other)]
    assert metrics["x/top1"] == pytest.approx(sum(right) / 2)


def test_connections_move_from_the_pretrained_ones_to_the_rewired(
    recipe: ClassificationRecipe, plan: ClassificationPlan, tmp_path: Path
) -> None:
    model = replace(recipe.model, coupling_epochs=0.5)
    moving = replace(recipe, batch_size=2, model=model)
    task = ClassificationTask(recipe=moving, plan=plan)
    runtime = LocalRuntime(moving, plan, tmp_path)
    trainer = Trainer(task, runtime, weights=None, output=str(tmp_path))
    seen = []
    for step in range(5):
        metrics = task.before_step(trainer.state, done=step, steps=4)
        seen.append((metrics["coupling/alpha"], metrics["coupling/beta"]))
        assert couplings(trainer.state.detector) == {seen[-1]}
    assert seen == [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)]
    trainer.run()
    logged = [m["coupling/beta"] for _, m in runtime.history if "coupling/beta" in m]
    assert logged == [0.0, 0.5, 1.0, 1.0]
    assert couplings(trainer.state.averaged()) == {(0.0, 1.0)}


def test_a_run_that_goes_on_ends_like_one_that_was_not_interrupted(
    recipe: ClassificationRecipe, plan: ClassificationPlan, tmp_path: Path
) -> None:
    model = replace(recipe.model, coupling_epochs=1.5, head=ClipClassifierConfig(dropout=0.5))
    optim = replace(recipe.optim, schedule_epochs=2)
    whole = replace(recipe, epochs=2, model=model, optim=optim)
    part = replace(whole, checkpoints=replace(whole.checkpoints, steps=1))

    def trainer(of: ClassificationRecipe, folder: str) -> Trainer:
        runtime = LocalRuntime(of, plan, tmp_path / folder)
        task = ClassificationTask(recipe=of, plan=plan)
        return Trainer(task, runtime, weights=None, output=str(tmp_path))

    undisturbed = trainer(whole, "whole")
    undisturbed.run()
    killed = trainer(part, "part")
    with pytest.raises(KeyboardInterrupt):
        _stop_in_step(killed, 3)
    resumed = trainer(part, "part")
    assert resumed.state.step == 3
    resumed.run()
    for name, value in undisturbed.state.detector.state_dict().items():
        assert torch.equal(resumed.state.detector.state_dict()[name], value), name
    assert couplings(resumed.state.averaged()) == {(0.0, 1.0)}


def _stop_in_step(trainer: Trainer, step: int) -> None:
    """Run a training, and interrupt it at a certain step."""
    take = trainer.step

    def interrupted(batches: Sequence[Batch]) -> dict[str, float]:
        if trainer.state.step == step:
            raise KeyboardInterrupt
        return take(batches)

    trainer.step = interrupted  # type: ignore[assignment]
    trainer.run()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"coupling_epochs": 1.0, "reversible": False}, "leave one of them out"),
        ({"slice_mb": 4, "reversible": False}, "--model.slice-mb is for rewired connections"),
        ({"coupling_epochs": 1.5}, "at most the 1 epochs"),
        ({"coupling_epochs": 0.0}, "above 0"),
    ],
)
def test_contradictions_of_a_recipe_are_refused(
    recipe: ClassificationRecipe, model: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        replace(recipe, model=replace(recipe.model, **model))
    augmentation = replace(recipe.data.augmentation, source_size=16, crop_area=(0.5, 1.0))
    with pytest.raises(ValueError, match="source_size of 16 pixels is below"):
        replace(recipe.data, augmentation=augmentation)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_can_be_overridden_and_builds(name: str) -> None:
    chosen = parse([name, "--data.training", "t", "--optim.backbone-lr", "0.5"])
    assert (chosen.name, chosen.data.training, chosen.optim.backbone_lr) == (name, "t", 0.5)
    with torch.device("meta"):
        built = chosen.model.backbone.build()
    assert rewire(built).stages


def _help(option: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse([option])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_shows_what_most_runs_need_and_all_where_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = {"--data.training", "--data.clip.frames", "--model.weights", "--epochs", "--batch-size"}
    more = {"--optim.weight-decay", "--views.crops", "--scale.workers"}
    shown = _help("--help", capsys)
    assert all(word in shown for word in (*first, "--help-all", "kinetics_re2_swin_t"))
    assert not any(word in shown for word in more)
    assert "folder of the video files" not in shown, "the fields are those of this kind of recipe"
    assert "folder that contains the paths in lists" in shown
    shown = _help("--help-all", capsys)
    assert all(word in shown for word in first | more)


def test_a_recipe_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="There is no recipe 'no'"):
        parse(["no"])


def test_what_is_missing_is_said_before_anything_starts(
    recipe: ClassificationRecipe, tmp_path: Path
) -> None:
    lost = replace(recipe.model, weights=str(tmp_path / "lost.safetensors"))
    with pytest.raises(UserError, match=r"nothing at .*lost.*Correct --model.weights"):
        classification_inputs(replace(recipe, model=lost))
    empty = TrimmedDataConfig(training=str(tmp_path / "no"))
    with pytest.raises(UserError, match=r"nothing at .*Correct --data.training"):
        classification_inputs(replace(recipe, data=empty))
    (tmp_path / "list.txt").write_text("a.mp4 spin\n")
    listed = str(tmp_path / "list.txt")
    data = TrimmedDataConfig(training=listed, validation=listed)
    with pytest.raises(UserError, match=r"Say where with --data.videos"):
        classification_inputs(replace(recipe, data=data))


def test_weights_by_name_pass_and_lost_ones_do_not(tmp_path: Path) -> None:
    for name in ("torchvision:swin3d_t/KINETICS400_V1", "hf:owner/name"):
        assert require_weights(name) == name == fetch_weights(name, tmp_path)
    assert require_weights(None) is fetch_weights(None, tmp_path) is None
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="Correct --weights"):
        require_weights(str(path), option="--weights")
    path.touch()
    assert fetch_weights(require_weights(str(path)), tmp_path) == str(path)


def written_lists(folder: Path, clips: Path, extra: Sequence[str]) -> TrimmedDataConfig:
    """Write lists of the clips with class numbers into `folder`."""
    names = {subset: sorted(p.relative_to(clips) for p in (clips / subset).rglob("*.mp4"))
             for subset in ("training", "validation")}  # fmt: skip
    (folder / "classes.txt").write_text("\n".join(TRIMMED_CLASSES))
    for subset, of_subset in names.items():
        lines = [f"{name} {TRIMMED_CLASSES.index(name.parent.name)}" for name in of_subset]
        added = extra if subset == "training" else []
        (folder / f"{subset}.txt").write_text("\n".join([*lines, *added]) + "\n")
    return TrimmedDataConfig(
        training=str(folder / "training.txt"),
        validation=str(folder / "validation.txt"),
        videos=str(clips),
        classes=str(folder / "classes.txt"),
        max_failed=0.2,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_a_plan_holds_what_can_be_used_and_says_why_the_rest_cannot(
    clips: Path, tmp_path: Path
) -> None:
    first = next((clips / "training").rglob("*.mp4")).relative_to(clips)
    broken = clips / "broken.mp4"
    broken.write_bytes(b"no video")
    extra = ["broken.mp4 0", "lost.mp4 1", f"{first} 0 0.5 1", f"{first} 0 7 9"]
    config = written_lists(tmp_path, clips, extra)
    made = make_plan(config, read_lists(config))
    broken.unlink()
    stem = first.with_suffix("")
    assert set(made.failures) == {"training/broken", "training/lost", f"training/{stem}@7-9"}
    assert "no file lost.mp4" in made.failures["training/lost"]
    assert "ends at 1.5 s, before 7 s" in made.failures[f"training/{stem}@7-9"]
    assert made.classes == TRIMMED_CLASSES
    assert (len(made.training), len(made.validation)) == (9, 7)
    part = next(v for v in made.training if v.video_id.endswith("@0.5-1"))
    assert (part.start, part.end, part.label) == (0.5, 1.0, 0)
    whole = next(v for v in made.training if v.video_id == f"training/{stem}")
    assert whole.start == 0.0
    assert whole.end == pytest.approx(1.5)
    assert made.uris[part.video_id] == made.uris[whole.video_id] == str(clips / first)
    with pytest.raises(UserError, match=r"3 of 19 videos .*--data.max-failed"):
        make_plan(replace(config, max_failed=0.1), read_lists(config))


def of_annotations(folder: Path, **fields: Any) -> ClassificationRecipe:
    """Return the toy recipe on a detection set's segments, as the command line makes it."""
    made = parse(["toy", "--data.annotations", str(folder / "annotations.json"),
                  "--data.videos", str(folder / "videos")])  # fmt: skip
    return classification_inputs(replace(made, data=replace(made.data, **fields)))


def test_annotated_segments_of_untrimmed_videos_are_classified_without_lists(
    tiny_set: Path,
) -> None:
    recipe = of_annotations(tiny_set)
    lists = read_lists(recipe.data)
    plan = make_plan(recipe.data, lists, probe=probe_files_here)
    annotations = load_annotations(tiny_set / "annotations.json")
    assert plan.classes == annotations.classes
    assert plan.fingerprint == annotations.fingerprint
    for name, found in (("training", plan.training), ("validation", plan.validation)):
        known = [(v.video_id, i) for v in annotations.subset(name).videos for i in v.instances]
        assert len(found) == len(known) > 2
        for video, (video_id, instance) in zip(found, known, strict=True):
            assert plan.uris[video.video_id] == str(tiny_set / "videos" / f"{video_id}.mp4")
            assert (video.start, video.end) == (instance.start, instance.end)
            assert plan.classes[video.label] == instance.label


def test_background_is_what_lies_between_the_segments(tiny_set: Path) -> None:
    data = of_annotations(tiny_set, background=True, clip=ClipConfig(frames=12, fps=12.0)).data
    plan = make_plan(data, read_lists(data), probe=probe_files_here)
    assert plan.classes[-1] == BACKGROUND
    between = [v for v in plan.training if plan.classes[v.label] == BACKGROUND]
    counts = Counter(v.label for v in plan.training)
    assert 0 < len(between) <= max(counts.values())
    marked = {
        v.video_id: v.instances for v in load_annotations(tiny_set / "annotations.json").videos
    }
    for stretch in between:
        assert stretch.end - stretch.start >= 0.5
        for instance in marked[stretch.video_id.split("/")[1]]:
            assert stretch.end <= instance.start or stretch.start >= instance.end


def test_a_class_named_background_is_not_mixed_with_it(tiny_set: Path, tmp_path: Path) -> None:
    content = json.loads((tiny_set / "annotations.json").read_text())
    next(iter(content["database"].values()))["annotations"][0]["label"] = BACKGROUND
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    (tmp_path / "videos").symlink_to(tiny_set / "videos")
    data = of_annotations(tmp_path).data
    assert BACKGROUND in read_lists(data).classes
    with pytest.raises(UserError, match="has a class 'background' of its own"):
        read_lists(replace(data, background=True))


@pytest.mark.parametrize("subset", ["training", "validation"])
def test_a_subset_without_segments_is_named(tiny_set: Path, tmp_path: Path, subset: str) -> None:
    content = json.loads((tiny_set / "annotations.json").read_text())
    for video in content["database"].values():
        if video["subset"] == subset:
            video["annotations"] = []
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    (tmp_path / "videos").symlink_to(tiny_set / "videos")
    with pytest.raises(UserError, match=f"subset '{subset}': has no annotated segment"):
        read_lists(of_annotations(tmp_path).data)


def test_a_detector_s_recipe_finetunes_on_the_same_data_and_frames(tiny_recipe: Recipe) -> None:
    settings = FinetuneConfig(epochs=3, frames=16, lr=2e-4)
    made = finetuning(replace(tiny_recipe, finetune=settings, seed=5))
    assert (made.data.annotations, made.data.videos, made.data.size) == (
        tiny_recipe.data.annotations, tiny_recipe.data.videos, 32)  # fmt: skip
    assert (made.epochs, made.seed, made.batch_size) == (3, 5, tiny_recipe.batch_size * 4)
    assert made.data.clip == ClipConfig(frames=16, fps=12.0)
    assert made.optim.backbone_lr == 2e-4
    assert made.optim.localizer_lr == pytest.approx(2e-3)
    assert made.model.backbone == tiny_recipe.model.backbone
    model = replace(tiny_recipe.model, coupling_epochs=1.0)
    assert (
        finetuning(replace(tiny_recipe, model=model, finetune=settings)).model.coupling_epochs == 1
    )


def test_the_weights_are_those_of_the_last_epoch_or_none(
    recipe: ClassificationRecipe, tmp_path: Path
) -> None:
    run = Run(uri=f"sqlite:///{tmp_path}/mlflow.db", run_id="0")
    two = replace(recipe, epochs=2)
    with pytest.raises(UserError, match=r"last epoch is damaged. Give the same command again"):
        _log_backbone(two, run, tmp_path, {"epoch": 1.0})


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_the_run_in_mlflow_is_complete(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path
    printed = run_here(
        SCRIPT, "toy",
        "--data.training", str(clips / "training"),
        "--data.validation", str(clips / "validation"),
        "--data.size", "32", "--data.clip.frames", "8", "--epochs", "1", "--batch-size", "4",
        "--views.clips", "2", "--scale.workers", "1", "--model.coupling-epochs", "0.5",
        "--weights-file", "out/weights.safetensors",
        folder=folder,
    )  # fmt: skip
    store = f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
    client = MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name = 're2tal-backbones'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["views.clips"] == "2"
    for name in (
        "train/loss", "train/loss/classification", "lr/backbone_decayed", "coupling/beta",
        "val/top1", "val/top5", "val/mean_class_accuracy", "test/top1", "videos/failed",
        "train/frames_per_second", "memory/rss_mb", "reversible/stages_stored",
    ):  # fmt: skip
        assert name in run.data.metrics, name
    assert run.data.metrics["videos/failed"] == 0
    assert "data.fingerprint" in run.data.tags
    for needed in ("epoch 1/1", "top-1", "2 clips x 1 crops", "runs:/", "models:/"):
        assert needed in printed
    # all three places hold the same weights, and they fit the plain and the rewired backbone
    written = folder / "out" / "weights.safetensors"
    for uri in (
        f"runs:/{run.info.run_id}/backbone.safetensors",
        run.data.tags["model.uri"],
    ):
        copy = local_copy(uri, folder, tracking_uri=store)
        assert copy.read_bytes() == written.read_bytes()
    with safe_open(written, "np") as file:
        assert run.info.run_id in file.metadata()["re2tal"]
    plain, rewired = swin_toy().build(), swin_toy().build()
    rewire(rewired)
    for backbone in (plain, rewired):
        load_backbone_weights(backbone, written)
    shipped = swin_toy().build()
    load_backbone_weights(shipped, toy().model.weights or "")
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(plain.parameters(), shipped.parameters(), strict=True)
    ]
    assert 0 < np.median(moved) < 0.01  # finetuned: not as it was, and not from random weights
    # and train.py takes them by their URI
    end_to_end = train_toy()
    model = replace(end_to_end.model, weights=run.data.tags["model.uri"])
    detector = check_model(
        replace(end_to_end, model=model, output=str(folder / "runs")), TRIMMED_CLASSES
    )
    found = detector.backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in plain.state_dict().items())
    with pytest.raises(UserError, match="cannot be downloaded from MLflow's store"):
        local_copy(f"runs:/{run.info.run_id}/no.safetensors", folder, tracking_uri=store)
