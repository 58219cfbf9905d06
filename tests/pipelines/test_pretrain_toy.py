import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors import safe_open

from pipelines.data.toy import augmented
from pipelines.pretrain_toy import parse
from pipelines.training.pretraining import Guide, fresh_backbone, loss_of
from re2tal import rewire
from re2tal.backbones.slowfast import slowfast_toy
from re2tal.backbones.table import entry_of
from re2tal.backbones.weights import load_backbone_weights
from re2tal.errors import UserError
from tests.pipelines.scripts import run_here

SCRIPT = Path(__file__).parents[2] / "pipelines" / "pretrain_toy.py"


@pytest.mark.parametrize(
    ("options", "name"), [((), "swin_toy"), (("--backbone", "videomae_toy"), "videomae_toy")]
)
def test_the_command_writes_weights_that_a_rewired_backbone_loads(
    options: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    clips = "--clips.training 14 --clips.validation 7 --clips.seconds 1.5"
    sizes = f"{clips} --size 32 --steps 3 --frames 32 --short 16 --long 16"
    output = ("--output", "new/weights.safetensors")
    assert "held out" in run_here(SCRIPT, *options, *output, *sizes.split(), folder=tmp_path)
    path = tmp_path / "new" / "weights.safetensors"
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["re2tal"])
    assert 0 <= float(facts["held_out_top1"]) <= 1
    assert "--steps 3" in facts["command"]
    backbone = entry_of(name).make().build()
    rewire(backbone)
    load_backbone_weights(backbone, path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 're2tal-backbones'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/top1"] == pytest.approx(float(facts["held_out_top1"]), abs=1e-4)
    assert run.data.params["steps"] == "3"
    assert run.data.params["backbone"] == type(entry_of(name).make()).__name__
    (artifact,) = client.list_artifacts(run.info.run_id)
    assert artifact.path == "weights.safetensors"


@pytest.mark.parametrize(
    ("options", "field"),
    [((), "--backbone.embed-dim"), (("--backbone", "videomae_toy"), "--backbone.tubelet")],
)
def test_help_names_every_option(
    options: tuple[str, ...], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([*options, "--help"])
    out = capsys.readouterr().out
    for option in ("--output", "--clips.training", "--steps", "--lr", field):
        assert option in out


def test_a_backbone_that_shows_no_places_is_refused() -> None:
    with pytest.raises(UserError, match="SlowFastBackbone cannot be pretrained here"):
        fresh_backbone(slowfast_toy())
    with pytest.raises(UserError, match="no backbone 'videomae'"):
        parse(["--backbone", "videomae"])


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_the_guide_looks_at_the_place_of_the_actor(shift: float) -> None:
    """Loss on a 4 x 4 grid whose features hold their place and, at one place, the motion."""
    guide = Guide(17)
    with torch.no_grad():
        for layer in (guide.here, guide.motion):
            layer.weight.zero_()
            layer.bias.zero_()
        guide.here.weight[0, 9] = 50.0  # second column of the third row
        guide.motion.weight[0, 16] = 1.0
    poses = torch.tensor([0.3, 0.6, 0.0, 0.0]).repeat(1, 4, 1)
    poses[..., 1] += shift  # into the row below
    poses[:, 1::2, 0] += 0.01
    features = torch.zeros(1, 2, 16, 17)
    features[..., torch.arange(16), torch.arange(16)] = 1.0
    features[:, :, 9, 16] = 0.64  # 0.01 of 64 pixels
    loss = float(guide(features, poses).detach())
    assert loss < 1e-6 if shift == 0 else loss > 40


def test_augmentation_mirrors_frames_and_poses_together() -> None:
    size, count = 8, 64
    frames = np.zeros((count, 2, size, size, 3), np.uint8)
    frames[:, :, 1, 6] = 255
    place = (6.5 / size, 1.5 / size, 0.3, 0.7)
    poses = np.broadcast_to(np.array(place, np.float32), (count, 2, 4)).copy()
    video, moved = augmented(frames, poses, np.random.default_rng(0))
    brightest = video.sum(dim=1).flatten(2).argmax(dim=2)
    column, row = brightest % size, brightest // size
    torch.testing.assert_close((column + 0.5) / size, moved[..., 0].float())
    torch.testing.assert_close((row + 0.5) / size, moved[..., 1].float())
    mirrored = moved[:, 0, 0] < 0.5
    assert 10 < int(mirrored.sum()) < 54
    angle = torch.where(mirrored, -0.7, 0.7)
    torch.testing.assert_close(moved[:, 0, 3].float(), angle)
    torch.testing.assert_close(moved[..., 2].float(), torch.full((count, 2), 0.3))


def test_the_loss_asks_every_feature_for_the_class() -> None:
    labels = torch.tensor([0, 1])
    sure = torch.full((2, 4, 7), -20.0)
    sure[0, :, 0] = sure[1, :, 1] = 20.0
    assert loss_of(sure, labels) < 1e-6
    unsure = torch.zeros(2, 4, 7)
    chance = 1.5 * np.log(7)
    assert float(loss_of(unsure, labels)) == pytest.approx(chance)
    # the mean over time alone would not notice that half of the features are wrong
    mixed = sure.clone()
    mixed[0, :1] = mixed[0, :1].roll(1, dims=-1)
    assert loss_of(mixed, labels) > 1
