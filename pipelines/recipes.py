"""A run is a function that returns a complete, typed configuration.

`train.py RECIPE` picks the function by its name; `--field.sub value` and a sweep override single
fields. Nothing else configures a run: no file inheritance, no globals.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipelines.precision import Precision
from re2tal.backbones.protocol import BackboneConfig
from re2tal.backbones.slowfast import slowfast_101
from re2tal.backbones.swin import swin_t, swin_toy
from re2tal.detection.nms import NmsConfig
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.trained import IMAGENET_MEAN, IMAGENET_STD
from re2tal.videos.annotations import Form
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.stitching import StitchConfig
from re2tal.videos.windows import WindowConfig

CompiledPart = Literal["branches", "localizer"]

Dataset = Literal[
    "activitynet-1.3",
    "thumos-14",
    "multithumos",
    "hacs-segments",
    "fineaction",
    "epic-kitchens-100",
    "ego4d-mq",
]

TOY_WEIGHTS = str(
    Path(__file__).parents[1] / "re2tal" / "backbones" / "weights" / "toy_swin.safetensors"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which videos, and how they are cut into windows.

    Attributes:
        annotations: ActivityNet-style JSON, or one of the other forms that
            `re2tal.videos.annotations` reads; a path or, for a single file, a URI that pyarrow
            opens (s3://, gs://, ...).
        form: how the annotations are laid out; "auto" looks at them.
        dataset: what is known to be wrong in this data set is repaired, listed and logged; by
            default any fault in the annotations is an error.
        exclude: file with ids of videos to leave out, such as those that cannot be had any more:
            one a line, or JSON.
        keep: ids of videos that count although `dataset` leaves them out, as they do in some
            published results.
        videos: folder of the video files, named by id; a path or a URI.
        features: folder of features (extract_features.py, or others': `pipelines.features`); a path
            or a URI. The localizer is then trained on them, without videos and backbone.
        make_toy: make the toy data set at these two places when it is missing.
        training_subset: name of the subset that is trained on.
        validation_subset: name of the subset that is evaluated after every epoch.
        size: pixels of a frame's side: the short side is resized to it, the centre is cut out.
        window: cut at random places for training, overlapping for the evaluation.
        augmentation: what is changed at random in training windows.
        max_failed: stop when more than this share of the videos cannot be used.
        video_scores: for a class-agnostic model, what an external classifier says of the
            validation videos (`re2tal.detection.video_scores`); a path or a URI.
        video_scores_top: of each video so many of these classes are given to each proposal.
        video_scores_logits: the file holds logits (HACS), of which a softmax makes scores.

    Raises:
        ValueError: crops would be taken from frames smaller than `size`.
    """

    annotations: str | None = None
    form: Form = "auto"
    dataset: Dataset | None = None
    exclude: str | None = None
    keep: tuple[str, ...] = ()
    videos: str | None = None
    features: str | None = None
    make_toy: bool = False
    training_subset: str = "training"
    validation_subset: str = "validation"
    size: int = 224
    window: WindowConfig
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_failed: float = 0.05
    video_scores: str | None = None
    video_scores_top: int = 2
    video_scores_logits: bool = False

    def __post_init__(self) -> None:
        decoded = self.augmentation.decoded_size(self.size)
        if decoded < self.size:
            raise ValueError(
                f"DataConfig.augmentation.source_size of {decoded} pixels is below "
                f"DataConfig.size of {self.size}: crops are taken from frames at least as large."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The detector: backbone and localizer.

    Attributes:
        backbone: the video backbone.
        weights: pretrained weights of the backbone (path or URI); None starts at random.
        mean: of red, green and blue in [0, 1] that the backbone was pretrained with.
        std: their standard deviation.
        reversible: rewire the backbone, so that its activations are recomputed.
        frozen: names of modules of the detector that are not trained, such as "backbone" or
            "backbone.patch_embed": their parameters keep their values, their BatchNorms the
            statistics, and they are run as in evaluation.
        norms: of the norm layers of the backbone: "trained"; "statistics" keeps the running
            statistics of BatchNorms as they are; "frozen" keeps scale and shift of all norms too.
        localizer: what turns features into segments.
        class_agnostic: find actions of whatever class; their classes come from
            `data.video_scores` or, without it, the proposals themselves are evaluated.
    """

    backbone: BackboneConfig
    weights: str | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    reversible: bool = True
    frozen: tuple[str, ...] = ()
    norms: Literal["trained", "statistics", "frozen"] = "trained"
    localizer: LocalizerConfig
    class_agnostic: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with a learning rate each for backbone and localizer, warm-up and cosine decay.

    Attributes:
        backbone_lr: learning rate of the backbone; far below the localizer's, as it is pretrained.
        localizer_lr: learning rate of the localizer.
        layer_decay: the backbone's last block learns at its rate, each block before it at this
            times the rate of the next (Clark et al., ICLR 2020).
        weight_decay: of matrices and kernels; vectors (biases, norms) are not decayed.
        warmup_epochs: epochs of linear warm-up.
        schedule_epochs: length of the cosine; None means the run's own number of epochs.
        clip: largest norm of the gradient.
        ema: decay of the moving average of the weights that is evaluated and saved.
        precision: what branches and localizer compute in; the reversible streams stay float32.
            The loss is scaled for float16, and a step whose gradients overflow is left out.
        compile: have `torch.compile` compile "branches" (the modules in the backbone's reversible
            branches), "localizer", or both; see pipelines/README.md for what it gained.
        accumulation: forward and backward passes of a worker whose gradients make one step.
    """

    backbone_lr: float
    localizer_lr: float
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    schedule_epochs: int | None = None
    clip: float = 1.0
    ema: float = 0.999
    precision: Precision = "bfloat16"
    compile: tuple[CompiledPart, ...] = ()
    accumulation: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """How a run is laid over the cluster.

    Attributes:
        workers: number of training processes.
        gpu: one GPU a worker.
        min_workers: with fewer GPUs or nodes than `workers` need, go on with so many at least, and
            grow again when they are back; None waits for all of them. A step then has fewer
            windows.
        sharded: split parameters, gradients and optimizer state over the workers (FSDP2), for
            backbones that are large beside a GPU.
        cpus_per_worker: logical CPUs that a worker holds; what is left over decodes videos.
        cpus_per_decoder: logical CPUs that a decoding task holds, so how many of them run at once.
        decoder_threads: of a decoding task; more than one helps with large pictures only.
        max_failures: how often a lost worker may be replaced from the last checkpoint.
    """

    workers: int = 1
    min_workers: int | None = None
    sharded: bool = False
    gpu: bool = True
    cpus_per_worker: float = 1.0
    cpus_per_decoder: float = 0.5
    decoder_threads: int = 1
    max_failures: int = 2

    def __post_init__(self) -> None:
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(
                f"ScaleConfig.min_workers of {self.min_workers} is not from 1 to the "
                f"{self.workers} of ScaleConfig.workers."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, and which of them are kept beside the newest.

    Attributes:
        steps: after so many steps one is written in the midst of an epoch too; None writes one at
            the end of each epoch only.
        keep: how many are kept.
        which: those with the highest mAP, or the last ones.
    """

    steps: int | None = None
    keep: int = 2
    which: Literal["best", "last"] = "best"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The complete configuration of one training run.

    Attributes:
        name: of the recipe; the MLflow run is named after it.
        experiment: MLflow experiment.
        output: folder of checkpoints and of the default MLflow store.
        seed: of weights, windows, order and dropout.
        epochs: passes over the training videos.
        batch_size: windows of a worker's forward pass. A step has `scale.workers` times
            `optim.accumulation` times as many.
        thresholds: tIoU thresholds of the mAP; the mean over them selects the best checkpoint.
        ignore_ambiguous: detections on stretches that cannot be judged count for nothing, as in
            THUMOS-14's own toolkit. Published results count them as false positives.
        resume: go on with the last run of the same configuration and data if it did not end.
        save_raw: keep the detections before non-maximum suppression with each checkpoint, for
            ensembles and for searching its settings without training.
    """

    name: str
    experiment: str = "re2tal"
    output: str = "runs"
    seed: int = 0
    epochs: int
    batch_size: int
    thresholds: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    ignore_ambiguous: bool = False
    resume: bool = True
    save_raw: bool = False
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    nms: NmsConfig = field(default_factory=NmsConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.scale.sharded and self.optim.precision == "float16":
            raise ValueError(
                "Recipe.scale.sharded goes with Recipe.optim.precision bfloat16 or float32: the "
                "scale of a float16 loss is not agreed on between the workers."
            )


# As the authors' implementation publishes it, but for RandAugment, which follows the flip there.
# Their crops are shares of the whole frame, ours of the square in its middle, which is also what
# the evaluation sees.
_AUGMENTATION = AugmentationConfig(
    source_size=256,
    crop_area=(0.08, 1.0),
    flip=0.5,
    brightness=0.5,
    contrast=0.5,
    saturation=0.5,
    hue=0.1,
)


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
        scale=ScaleConfig(workers=2, gpu=False, cpus_per_worker=0.5),
    )


def toy_vsgn() -> Recipe:
    """The toy data set with VSGN in the place of ActionFormer.

    Without self-stitching: the toy actions fill a good part of a window as they are, and half of
    the time would go into clips (--data.window.stitch.enabled).
    """
    recipe = toy()
    return replace(
        recipe,
        name="toy_vsgn",
        epochs=5,
        model=replace(
            recipe.model,
            localizer=VSGNConfig(
                width=96,
                levels=4,
                stem_stride=1,
                head_layers=2,
                neighbours=6,
                anchor_scales=(2.0, 3.0),
            ),
        ),
        optim=replace(recipe.optim, localizer_lr=5e-4),
    )


def thumos_re2_swin_t_actionformer() -> Recipe:
    """THUMOS-14 with a reversible Swin-T and ActionFormer; needs data, weights and a GPU.

    1024 frames at 15 fps (every second one of 30), 224 pixels, batch 2. The settings are those that
    the authors' implementation publishes for this pair: 120 epochs of a cosine laid out for 1500.
    Of its augmentation, RandAugment is left out, and an epoch shows all of a video where it takes
    one random window.
    THUMOS trains on its validation set and is evaluated on its test set; in the usual
    ActivityNet-style file of it these are called training and validation. Of its 213 test videos
    210 count, as in VSGN's ground truth: falsely annotated ones are left out. OpenTAD's published
    results are of 211 (--data.keep video_test_0001496), ActionFormer's of 212 (and
    video_test_0000270).
    """
    return Recipe(
        name="thumos_re2_swin_t_actionformer",
        epochs=120,
        batch_size=2,
        data=DataConfig(
            dataset="thumos-14",
            window=WindowConfig(frames=1024, fps=15.0, sliding_overlap=0.5),
            augmentation=_AUGMENTATION,
        ),
        model=ModelConfig(
            backbone=replace(swin_t(), drop_path=0.2),
            localizer=ActionFormerConfig(window=0),
        ),
        optim=OptimConfig(backbone_lr=1e-5, localizer_lr=1e-4, schedule_epochs=1500),
        nms=NmsConfig(sigma=0.7, top_k=2000),
    )


def thumos_re2_slowfast_101_actionformer() -> Recipe:
    """THUMOS-14 with a reversible SlowFast-101 and ActionFormer; needs data, weights and a GPU.

    As `thumos_re2_swin_t_actionformer`: this backbone too makes 512 features of a window.
    """
    recipe = thumos_re2_swin_t_actionformer()
    backbone = replace(slowfast_101(), temporal_stride=2)
    return replace(
        recipe,
        name="thumos_re2_slowfast_101_actionformer",
        model=replace(recipe.model, backbone=backbone),
    )


def thumos_re2_swin_t_vsgn() -> Recipe:
    """THUMOS-14 with a reversible Swin-T and VSGN; needs data, weights and a GPU.

    VSGN's own settings are those that its authors publish for THUMOS-14 (on features; windows of
    1280 there, 512 here), self-stitching and windows every quarter included. As there, all classes
    of a video are thinned out together by Gaussian soft-NMS. What differs: they first thin out each
    class of each window by hard NMS (tIoU 0.4), where here that is done only between clip and copy
    of stitched windows (`re2tal.inference`); and they drop detections of 50 s and more. The paper
    pairs VSGN with these backbones but publishes no settings of the pair: frames, backbone and
    optimiser are ActionFormer's.
    """
    recipe = thumos_re2_swin_t_actionformer()
    stitch = StitchConfig(enabled=True)
    window = replace(recipe.data.window, sliding_overlap=0.75, stitch=stitch)
    return replace(
        recipe,
        name="thumos_re2_swin_t_vsgn",
        data=replace(recipe.data, window=window),
        model=replace(recipe.model, localizer=VSGNConfig()),
        nms=NmsConfig(sigma=0.46, top_k=200, per_class=False),
    )


def anet_re2_swin_t_actionformer() -> Recipe:
    """ActivityNet-1.3 with a reversible Swin-T and ActionFormer; needs data, weights and a GPU.

    Each video is resampled to 768 frames, 224 pixels, batch 8; 192 features. The settings are those
    that the authors' implementation publishes for this pair. It finds actions of whatever class,
    and their classes are the two best of an external video classifier: give its file as
    --data.video-scores (`re2tal.detection.video_scores` says in which form; the authors' results
    are with cuhk_val_simp_7.json). Of their augmentation, RandAugment is left out.
    """
    return Recipe(
        name="anet_re2_swin_t_actionformer",
        epochs=15,
        batch_size=8,
        thresholds=tuple(0.5 + 0.05 * i for i in range(10)),
        data=DataConfig(
            dataset="activitynet-1.3",
            window=WindowConfig(frames=768, fps=None),
            augmentation=_AUGMENTATION,
        ),
        model=ModelConfig(
            backbone=replace(swin_t(), drop_path=0.2, pooling=2),
            localizer=ActionFormerConfig(
                width=256,
                head_width=256,
                window=0,
                positions=192,
                label_smoothing=0.1,
                regression_weight=2.0,
                initial_normalizer=200.0,
            ),
            class_agnostic=True,
        ),
        optim=OptimConfig(backbone_lr=1e-5, localizer_lr=1e-3),
        nms=NmsConfig(sigma=0.7, top_k=100, per_class=False, voting="score", voting_iou=0.9),
    )


def anet_re2_slowfast_101_actionformer() -> Recipe:
    """ActivityNet-1.3 with a reversible SlowFast-101 and ActionFormer; needs data, weights, a GPU.

    As `anet_re2_swin_t_actionformer`.
    """
    recipe = anet_re2_swin_t_actionformer()
    return replace(
        recipe,
        name="anet_re2_slowfast_101_actionformer",
        model=replace(recipe.model, backbone=slowfast_101()),
    )


def anet_re2_swin_t_vsgn() -> Recipe:
    """ActivityNet-1.3 with a reversible Swin-T and VSGN; needs data, weights and a GPU.

    As `anet_re2_swin_t_actionformer`, with VSGN's settings for ActivityNet as OpenTAD publishes
    them: a stem at full rate, anchors of 3 and 7.5 node strides, 10 neighbours, matches from tIoU
    0.6 on. What differs: its classification loss there is focal, ours the authors' balanced cross
    entropy; 256 features of a video there, 192 here. A window holds the whole video, so nothing is
    stitched.
    """
    recipe = anet_re2_swin_t_actionformer()
    localizer = VSGNConfig(stem_stride=1, anchor_scales=(3.0, 7.5), neighbours=10, match_tiou=0.6)
    return replace(
        recipe,
        name="anet_re2_swin_t_vsgn",
        model=replace(recipe.model, localizer=localizer),
        optim=replace(recipe.optim, localizer_lr=1e-4),
        nms=NmsConfig(sigma=0.5, top_k=100, per_class=False),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        toy,
        toy_vsgn,
        thumos_re2_swin_t_actionformer,
        thumos_re2_slowfast_101_actionformer,
        thumos_re2_swin_t_vsgn,
        anet_re2_swin_t_actionformer,
        anet_re2_slowfast_101_actionformer,
        anet_re2_swin_t_vsgn,
    )
}
