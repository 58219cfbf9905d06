"""Processes import only what they use, because every import costs time at each start."""

import subprocess
import sys
from pathlib import Path

# In an order in which each needs more than those before it.
CHAIN = """
import importlib, sys
for module, *unused in (
    # Ray's decoding tasks
    ("pipelines.data.decoding", "torch", "ray", "mlflow", "matplotlib"),
    ("pipelines.data.shard_writing", "torch", "mlflow", "matplotlib"),
    # the controllers of Ray Train and of a stream of frames
    ("pipelines.training.entry", "torch", "mlflow", "matplotlib"),
    ("pipelines.data.streaming", "torch", "mlflow", "matplotlib"),
    # `--help` of what trains
    ("pipelines.config.command_line", "ray.train", "mlflow", "optuna", "matplotlib"),
    ("pipelines.config.recipes", "mlflow", "optuna", "matplotlib"),
    ("pipelines.core.tracking", "mlflow", "optuna", "matplotlib"),
    ("pipelines.core.models", "mlflow", "optuna", "matplotlib"),
    ("pipelines.train", "ray.train", "mlflow", "optuna", "matplotlib"),
    ("pipelines.finetune_backbone", "ray.train", "mlflow", "optuna", "matplotlib"),
    # Ray's workers
    ("pipelines.training.worker", "optuna", "matplotlib", "rich"),
):
    importlib.import_module(module)
    found = [name for name in unused if name in sys.modules]
    assert not found, f"{module} imports {found}"
"""


def test_a_process_imports_what_it_uses() -> None:
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", CHAIN], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


MISTYPED = """
import runpy, sys
for script, *words in (
    ("pipelines/train.py", "toi"),
    ("pipelines/train.py", "toy", "--model.backbone", "swin_x"),
    ("pipelines/train.py", "toy", "--data.dataset", "thumos"),
    ("pipelines/train.py", "toy", "--model.localizer.widht", "8"),
    ("pipelines/finetune_backbone.py", "toi"),
    ("pipelines/evaluate.py", "--dataset", "thumos"),
    ("pipelines/detect.py", "--modle", "m"),
    ("pipelines/prepare.py", "--dataset", "thumos"),
    ("pipelines/extract_features.py", "--backbone", "swin_x"),
    ("sweeps/finetune.py", "toi"),
    ("sweeps/localizer.py", "toy", "--base.model.backbone", "swin_x"),
    ("sweeps/models.py", "--sampler", "tpa"),
    ("sweeps/pareto.py", "--constraint", "memroy <= 20GiB"),
    ("sweeps/postprocessing.py", "--rnu", "r"),
):
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as refused:
        assert refused.code, script
    else:
        raise AssertionError(f"{script} {words} went through")
    found = [name for name in ("ray", "mlflow", "optuna") if name in sys.modules]
    assert not found, f"{script} {words} imported {found}"
"""


def test_a_mistyped_name_is_refused_before_ray_and_mlflow_are_imported() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", MISTYPED]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
