"""A run is a function that returns a complete, typed configuration.

`train.py RECIPE` picks the function by its name; `--field.sub value` and a sweep override single
fields. Nothing else configures a run: no file inheritance, no globals.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from re2tal.backbones.swin import SwinConfig, swin_t, swin_toy
from re2tal.detection.nms import NmsConfig
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.videos.windows import WindowConfig

TOY_WEIGHTS = str(
    Path(__file__).parents[1] / "re2tal" / "backbones" / "weights" / "toy_swin.safetensors"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which videos, and how they are cut into windows.

    Attributes:
        annotations: ActivityNet-style JSON; a path or a URI that pyarrow opens (s3://, gs://, ...).
        videos: folder of the video files, named by id; a path or a URI.
        make_toy: make the toy data set at these two places when it is missing.
        training_subset: name of the subset that is trained on.
        validation_subset: name of the subset that is evaluated after every epoch.
        size: pixels of a frame's side: the short side is resized to it, the centre is cut out.
        window: cut at random places for training, overlapping for the evaluation.
        max_failed: stop when more than this share of the videos cannot be used.
    """

    annotations: str | None = None
    videos: str | None = None
    make_toy: bool = False
    training_subset: str = "training"
    validation_subset: str = "validation"
    size: int = 224
    window: WindowConfig
    max_failed: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The detector: backbone and localizer.

    Attributes:
        backbone: the video backbone.
        weights: pretrained weights of the backbone (path or URI); None starts at random.
        reversible: rewire the backbone, so that its activations are recomputed.
        freeze_backbone: train the localizer only.
        localizer: what turns features into segments.
    """

    backbone: SwinConfig
    weights: str | None = None
    reversible: bool = True
    freeze_backbone: bool = False
    localizer: ActionFormerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with a learning rate each for backbone and localizer, warm-up and cosine decay.

    Attributes:
        backbone_lr: learning rate of the backbone; far below the localizer's, as it is pretrained.
        localizer_lr: learning rate of the localizer.
        weight_decay: of matrices and kernels; vectors (biases, norms) are not decayed.
        warmup_epochs: epochs of linear warm-up.
        schedule_epochs: length of the cosine; None means the run's own number of epochs.
        clip: largest norm of the gradient.
        ema: decay of the moving average of the weights that is evaluated and saved.
        precision: what branches and localizer compute in; the reversible streams stay float32.
    """

    backbone_lr: float
    localizer_lr: float
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    schedule_epochs: int | None = None
    clip: float = 1.0
    ema: float = 0.999
    precision: Literal["float32", "bfloat16"] = "bfloat16"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """How a run is laid over the cluster.

    Attributes:
        workers: number of training processes.
        gpu: one GPU a worker.
        cpus_per_worker: logical CPUs that a worker holds; what is left over decodes videos.
        max_failures: how often a lost worker may be replaced from the last checkpoint.
    """

    workers: int = 1
    gpu: bool = True
    cpus_per_worker: float = 1.0
    max_failures: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The complete configuration of one training run.

    Attributes:
        name: of the recipe; the MLflow run is named after it.
        experiment: MLflow experiment.
        output: folder of checkpoints and of the default MLflow store.
        seed: of weights, windows, order and dropout.
        epochs: passes over the training videos.
        batch_size: windows a step and worker.
        thresholds: tIoU thresholds of the mAP; the mean over them selects the best checkpoint.
    """

    name: str
    experiment: str = "re2tal"
    output: str = "runs"
    seed: int = 0
    epochs: int
    batch_size: int
    thresholds: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    nms: NmsConfig = field(default_factory=NmsConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)


def toy() -> Recipe:
    """The toy data set and a small Swin pretrained on toy clips: minutes on two CPU cores."""
    return Recipe(
        name="toy",
        epochs=4,
        batch_size=2,
        data=DataConfig(
            annotations="data/toy/annotations.json",
            videos="data/toy/videos",
            make_toy=True,
            size=64,
            window=WindowConfig(frames=128, fps=12.0),
        ),
        model=ModelConfig(
            backbone=swin_toy(),
            weights=TOY_WEIGHTS,
            localizer=ActionFormerConfig(
                width=96,
                stem_layers=1,
                levels=5,
                window=9,
                head_width=96,
                drop_path=0.0,
                first_range=6.0,
                initial_normalizer=20.0,
            ),
        ),
        optim=OptimConfig(
            backbone_lr=3e-4,
            localizer_lr=1e-3,
            warmup_epochs=0.5,
            ema=0.98,
            precision="float32",
        ),
        scale=ScaleConfig(workers=2, gpu=False, cpus_per_worker=0.5, max_failures=0),
    )


def thumos_re2_swin_t_actionformer() -> Recipe:
    """THUMOS-14 with a reversible Swin-T and ActionFormer; needs data, weights and a GPU.

    1024 frames at 15 fps (every second one of 30), 224 pixels, batch 2. The settings are those that
    the authors' implementation publishes for this pair: 120 epochs of a cosine laid out for 1500.
    THUMOS trains on its validation set and is evaluated on its test set; in the usual
    ActivityNet-style file of it these are called training and validation.
    """
    return Recipe(
        name="thumos_re2_swin_t_actionformer",
        epochs=120,
        batch_size=2,
        data=DataConfig(window=WindowConfig(frames=1024, fps=15.0)),
        model=ModelConfig(
            backbone=replace(swin_t(), drop_path=0.2),
            localizer=ActionFormerConfig(window=0),
        ),
        optim=OptimConfig(backbone_lr=1e-5, localizer_lr=1e-4, schedule_epochs=1500),
        nms=NmsConfig(sigma=0.7, top_k=2000),
    )


def anet_re2_swin_t_actionformer() -> Recipe:
    """ActivityNet-1.3 with a reversible Swin-T and ActionFormer; needs data, weights and a GPU.

    Each video is resampled to 768 frames, 224 pixels, batch 8. The settings are those that the
    authors' implementation publishes for this pair. It finds proposals and takes their classes
    from an external video classifier; here ActionFormer classifies the 200 classes itself.
    """
    return Recipe(
        name="anet_re2_swin_t_actionformer",
        epochs=15,
        batch_size=8,
        thresholds=tuple(0.5 + 0.05 * i for i in range(10)),
        data=DataConfig(window=WindowConfig(frames=768, fps=None)),
        model=ModelConfig(
            backbone=replace(swin_t(), drop_path=0.2),
            localizer=ActionFormerConfig(
                width=256,
                head_width=256,
                window=0,
                positions=384,
                label_smoothing=0.1,
                regression_weight=2.0,
                initial_normalizer=200.0,
            ),
        ),
        optim=OptimConfig(backbone_lr=1e-5, localizer_lr=1e-3),
        nms=NmsConfig(sigma=0.7, top_k=100, per_class=False, voting="score_tiou", voting_iou=0.9),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (toy, thumos_re2_swin_t_actionformer, anet_re2_swin_t_actionformer)
}
