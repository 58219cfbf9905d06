"""Typed configuration of training runs: the recipe of `train.py`, and the parts of all recipes."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from pipelines.config.annotations import ScoredAnnotationConfig
from re2tal.backbones.adapters import AdapterConfig
from re2tal.backbones.lora import LoraConfig
from re2tal.backbones.protocol import BackboneConfig
from re2tal.backbones.table import IMAGENET_MEAN, IMAGENET_STD
from re2tal.components import Component
from re2tal.detection.suppression import NmsConfig
from re2tal.errors import check_within
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.precision import Precision
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.windows import WindowConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneModelConfig:
    """Model with a pretrained backbone.

    Attributes:
        backbone: the video backbone.
        weights: pretrained weights of the backbone: path or URI, also of an artifact or a model in
            MLflow, or a name such as `torchvision:swin3d_t/KINETICS400_V1` or
            `hf:MCG-NJU/videomae-base`; None for random initialization.
        mean: mean of red, green and blue in [0, 1] that the backbone was pretrained with.
        std: standard deviation of red, green and blue, likewise.
        reversible: rewire the backbone (Re2TAL), so that its activations are recomputed.
        stored: store the activations of the rewired backbone nevertheless: the same function and
            gradients, with more memory and in less time.
        slice_mb: size in MiB of the pieces in which branches run; smaller pieces need less memory
            and more time. None selects a size for the device.
        coupling_epochs: epochs over which the connections move gradually from the pretrained to the
            rewired ones (Dr2Net's alpha from 1 to 0 and beta from 0 to 1); None rewires at once.
            Activations are stored until the move is complete.
        tuning: trained part of the backbone: "full", all of it; "adapters", a temporal adapter in
            each block (AdaTAD); "lora", low-rank matrices beside the blocks' linear layers;
            "frozen", nothing. All but "full" freeze the backbone itself, as `frozen` does.
        adapters: shape of the adapters.
        lora: shape of LoRA's matrices.
        frozen: names of modules that are not trained, such as "localizer.stem" or
            "backbone.patch_embed": their parameters and BatchNorm statistics stay fixed, and they
            run in evaluation mode.
        norms: training of the backbone's norm layers: "trained"; "statistics" fixes the running
            statistics of BatchNorms; "frozen" also fixes scale and shift of all norms.
    """

    backbone: Annotated[BackboneConfig, Component()]
    weights: str | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    reversible: bool = True
    stored: bool = False
    slice_mb: int | None = None
    coupling_epochs: float | None = None
    tuning: Literal["full", "adapters", "lora", "frozen"] = "full"
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    frozen: tuple[str, ...] = ()
    norms: Literal["trained", "statistics", "frozen"] = "trained"

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of frozen modules; adapters and LoRA's matrices inside them are trained."""
        return self.frozen if self.tuning == "full" else ("backbone", *self.frozen)

    @property
    def added(self) -> dict[str, Any]:
        """Additions to the backbone, by the fields of `re2tal.trained.DetectorSpec`."""
        return {name: getattr(self, name) for name in ("adapters", "lora") if name == self.tuning}

    def _check_tuning(self) -> None:
        for name, default in (("adapters", AdapterConfig()), ("lora", LoraConfig())):
            if getattr(self, name) != default and self.tuning != name:
                raise ValueError(
                    f"--model.{name} goes with --model.tuning {name}, which is {self.tuning}: make "
                    "the two agree."
                )
        if self.tuning == "full":
            return
        inside = [name for name in self.frozen if name.split(".")[0] == "backbone"]
        if inside or self.norms != "trained":
            option = f"frozen {' '.join(inside)}" if inside else f"norms {self.norms}"
            raise ValueError(
                f"--model.{option} is for a trained backbone, but --model.tuning {self.tuning} "
                "freezes all of it: leave one of them out."
            )
        if self.tuning == "frozen" and self.coupling_epochs is not None:
            raise ValueError(
                "--model.coupling-epochs moves the connections of a backbone during its training, "
                "but --model.tuning frozen does not train it: leave one of them out."
            )

    def __post_init__(self) -> None:
        self._check_tuning()
        if self.reversible:
            return
        for field_name in ("stored", "slice_mb", "coupling_epochs"):
            if getattr(self, field_name) not in (None, False):
                option = field_name.replace("_", "-")
                raise ValueError(
                    f"--model.{option} is for rewired connections, but --model.no-reversible does "
                    "not rewire: leave one of them out."
                )

    def check_epochs(self, epochs: int) -> None:
        """Check that `coupling_epochs` ends within a run's epochs.

        Raises:
            ValueError: it does not.
        """
        moving = self.coupling_epochs
        if moving is not None and not 0 < moving <= epochs:
            raise ValueError(
                f"--model.coupling-epochs must be above 0 and at most the {epochs} epochs of the "
                f"run, not {moving:g}: the network would end partly rewired."
            )


WITHOUT_BACKBONE: dict[str, Any] = {
    "weights": None,
    "reversible": False,
    "stored": False,
    "slice_mb": None,
    "coupling_epochs": None,
    "tuning": "full",
    "norms": "trained",
}
"""Values of the model's fields that a run on features does not use; they switch the fields off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with separate learning rates for backbone and localizer, warm-up and cosine decay.

    Attributes:
        backbone_lr: learning rate of the backbone; far below the localizer's, because the backbone
            is pretrained.
        adapter_lr: learning rate of adapters or LoRA's matrices (`model.tuning`).
        localizer_lr: learning rate of the localizer.
        layer_decay: each block of the backbone has this factor times the learning rate of the next
            block; the last has `backbone_lr`, its adapter `adapter_lr` (Clark et al., ICLR 2020).
        weight_decay: decay of matrices and kernels; vectors (biases, norms) are not decayed.
        warmup_epochs: epochs of linear warm-up.
        schedule_epochs: length of the cosine in epochs; None for the run's number of epochs.
        clip: largest norm of the gradient.
        ema: decay of the weights' moving average (EMA), which is evaluated and saved.
        precision: number format of branches and localizer; the reversible streams stay float32.
            With float16 the loss is scaled, and steps with overflowing gradients are skipped.
        accumulation: forward and backward passes of a worker in one step; more while workers are
            missing (`scale.min_workers`).
    """

    backbone_lr: float
    localizer_lr: float
    adapter_lr: float = 2e-4
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    schedule_epochs: int | None = None
    clip: float = 1.0
    ema: float = 0.999
    precision: Precision = "bfloat16"
    accumulation: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """Layout of a run on the cluster.

    Attributes:
        workers: number of training processes.
        gpu: give each worker a GPU.
        min_workers: smallest number of workers with which a run continues while GPUs or nodes are
            missing; None waits for all workers. The remaining workers make more passes, so that a
            step keeps its number of windows, or has a few less if the passes do not divide evenly.
        resize_seconds: seconds between checks whether missing workers can return; when they do, all
            workers continue from the last checkpoint.
        sharded: split parameters, gradients and optimizer state over the workers (FSDP2), for
            backbones that are large relative to a GPU's memory.
        cpus_per_worker: logical CPUs reserved for a worker; the remaining CPUs decode videos.
        cpus_per_decoder: logical CPUs reserved for a decoding task; they limit how many tasks run
            at once.
        decoder_threads: threads of a decoding task; more than one helps only with large frames.
        max_failures: largest number of times that lost workers are replaced, each time from the
            last checkpoint, and that a lost evaluation is restarted.
        validation_workers: largest number of evaluations at a time beside the training, which then
            continues at once when an epoch ends. Each has the resources of a worker and evaluates
            one epoch, with the same results. With 0 the workers evaluate before they continue.
    """

    workers: int = 1
    min_workers: int | None = None
    resize_seconds: float = 60.0
    sharded: bool = False
    gpu: bool = True
    cpus_per_worker: float = 1.0
    cpus_per_decoder: float = 0.5
    decoder_threads: int = 1
    max_failures: int = 2
    validation_workers: int = 0

    def __post_init__(self) -> None:
        if self.validation_workers < 0:
            raise ValueError(
                f"--scale.validation-workers must be at least 0, not {self.validation_workers}."
            )
        if self.validation_workers and self.min_workers is not None:
            raise ValueError(
                "--scale.validation-workers does not go with --scale.min-workers, by which the "
                "training takes whatever the cluster has: leave either out."
            )
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(
                f"ScaleConfig.min_workers of {self.min_workers} is not from 1 to the "
                f"{self.workers} of ScaleConfig.workers."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Actors that run a model, and the tasks that decode for them.

    Attributes:
        actors: number of processes that run the model; by default one a GPU.
        gpu: give each actor a GPU; by default if the cluster has any.
        cpus_per_actor: logical CPUs reserved for an actor; the remaining CPUs decode videos.
        cpus_per_decoder: logical CPUs reserved for a decoding task; they limit how many tasks run
            at once.
        decoder_threads: threads of a decoding task; more than one helps only with large frames.
    """

    actors: int | None = None
    gpu: bool | None = None
    cpus_per_actor: float = 1.0
    cpus_per_decoder: float = 0.5
    decoder_threads: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Writing of checkpoints, and the choice of those that are kept in addition to the newest.

    Attributes:
        steps: number of steps between checkpoints within an epoch; None writes checkpoints only at
            the end of each epoch.
        keep: number of checkpoints to keep.
        which: checkpoints to keep: those with the highest mAP, or the last ones.
    """

    steps: int | None = None
    keep: int = 2
    which: Literal["best", "last"] = "best"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Fields of all recipes.

    Attributes:
        name: name of the recipe, and start of the MLflow run's name.
        experiment: MLflow experiment.
        output: folder of checkpoints and of the default MLflow store.
        seed: seed of weights, windows, order and dropout.
        epochs: passes over the training videos.
        evaluate_from: first epoch that ends with an evaluation, counted from 1; skipping early ones
            saves time. Only evaluated checkpoints can become the best one.
        batch_size: windows of a worker's forward pass. A step has `scale.workers` times
            `optim.accumulation` times as many.
        resume: continue the last run of the same configuration and data if it did not finish.
        optim: learning rates, schedule and precision.
        scale: layout of the run on the cluster.
        checkpoints: checkpoints to write and to keep.

    Raises:
        ValueError: no epoch would be evaluated.
    """

    name: str
    experiment: str
    output: str = "runs"
    seed: int = 0
    epochs: int
    evaluate_from: int = 1
    batch_size: int
    resume: bool = True
    optim: OptimConfig
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.evaluate_from <= self.epochs:
            raise ValueError(
                f"--evaluate-from must be from 1 to the {self.epochs} epochs of the run, not "
                f"{self.evaluate_from}: the last epoch must be evaluated. Set it too."
            )


def check_frames(data: object, augmentation: AugmentationConfig, size: int) -> None:
    """Refuse settings of data whose crops would be larger than the frames."""
    decoded, name = augmentation.decoded_size(size), type(data).__name__
    if decoded < size:
        raise ValueError(
            f"{name}.augmentation.source_size of {decoded} pixels is below {name}.size of {size}: "
            "crops are taken from frames at least as large."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(ScoredAnnotationConfig):
    """Videos, and the windows that are cut from them.

    Attributes:
        videos: folder of the video files, named by id; a path or a URI.
        features: folder of features, from extract_features.py or elsewhere
            (pipelines/data/README.md); a path or a URI. The localizer is then trained on features,
            without videos and backbone.
        make_toy: make the toy data set at `annotations` and `videos` when it is missing.
        training_subset: subset for training; by default that of the data set, or "training".
        validation_subset: subset for evaluation after every epoch; by default that of the data set,
            or "validation".
        size: pixels of a frame's side: the short side is resized to it, the centre is cut out.
        window: windows; at random places in training, overlapping in evaluation.
        augmentation: random changes of training windows.
        max_failed: share of unusable videos above which the run stops.

    Raises:
        ValueError: crops would be taken from frames smaller than `size`, or stitched windows would
            be shown at another speed or backwards.
    """

    videos: str | None = None
    features: str | None = None
    make_toy: bool = False
    training_subset: str | None = None
    validation_subset: str | None = None
    size: int = 224
    window: WindowConfig
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_failed: float = 0.05

    @property
    def trained_on(self) -> str:
        """Name of the training subset."""
        return self.training_subset or self.record.training

    @property
    def evaluated_on(self) -> str:
        """Name of the validation subset."""
        return self.validation_subset or self.record.validation

    @property
    def subsets(self) -> dict[str, str]:
        """Names of the data that a run trains on and is evaluated on."""
        return {
            "training": f"{self.title} {self.trained_on}",
            "validation": f"{self.title} {self.evaluated_on}",
        }

    def __post_init__(self) -> None:
        check_frames(self, self.augmentation, self.size)
        if self.window.stitch.enabled and self.augmentation.in_time != AugmentationConfig():
            raise ValueError(
                "--data.augmentation.speed and --data.augmentation.reverse need windows with one "
                "frame rate, but --data.window.stitch.enabled shows clips at two rates: leave one "
                "of them out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(BackboneModelConfig):
    """Detector: backbone and localizer.

    Attributes:
        localizer: network that turns features into segments.
        localizer_weights: initial weights of the localizer, from a detector of re2tal
            (`weights.safetensors`) or its authors' release; path or URI, also of an artifact in
            MLflow; None for random initialization.
        class_agnostic: detect actions without their classes. `data.video_scores` supplies the
            classes; without it, the proposals themselves are evaluated.
    """

    localizer: Annotated[LocalizerConfig, Component()]
    localizer_weights: str | None = None
    class_agnostic: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Finetuning of the backbone on the data set's own classes, before the detector: Re2TAL step 4.

    Attributes:
        epochs: passes over the annotated segments of the training videos; 0 for no finetuning.
        frames: frames of a clip, at the rate of the windows.
        lr: learning rate of the backbone; that of the classifier's head is ten times as large.
        background: add a class "background" of clips between the segments.

    Raises:
        ValueError: a field is out of its range.
    """

    # a short alias: most who finetune set only this field
    epochs: Annotated[int, tyro.conf.arg(aliases=("--finetune-epochs",))] = 0
    frames: int = 32
    lr: float = 1e-4
    background: bool = False

    def __post_init__(self) -> None:
        check_within(self, epochs=(0, 10**6), frames=(1, 2**20), lr=(0, 1e3))


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(RunConfig):
    """Complete configuration of one training run of `train.py`.

    Attributes:
        data: annotations, videos and windows.
        finetune: finetuning of the backbone on the annotated segments, before the detector.
        model: backbone and localizer.
        nms: suppression of overlapping detections.
        thresholds: tIoU thresholds of mAP; the mean over them selects the best checkpoint.
        ignore_ambiguous: ignore detections on stretches annotated as ambiguous, as THUMOS-14's own
            toolkit does. Published results count them as false positives.
        watched_videos: number of training videos on which every evaluation also measures mAP, at
            most as many as validation videos: the difference shows overfitting. 0 leaves out this
            mAP and the validation loss.
        save_raw: keep the detections before non-maximum suppression with each checkpoint, for
            ensembles and for tuning the suppression without training.
        registered_model: name in MLflow's registry that gets the best checkpoint as its next
            version; None registers nothing.

    Raises:
        ValueError: settings contradict one another.
    """

    experiment: str = "re2tal"
    data: DataConfig
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    model: ModelConfig
    nms: NmsConfig = field(default_factory=NmsConfig)
    thresholds: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    ignore_ambiguous: bool = False
    watched_videos: int = 8
    save_raw: bool = False
    registered_model: str | None = None

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        check_within(self, watched_videos=(0, 2**20))
        self.model.check_epochs(self.epochs)
        if self.model.added and self.data.features is not None:
            raise ValueError(
                f"--model.tuning {self.model.tuning} trains parts of a backbone, but "
                "--data.features replaces the backbone: leave one of them out."
            )
        if self.scale.sharded and self.optim.precision == "float16":
            raise ValueError(
                "Recipe.scale.sharded needs Recipe.optim.precision bfloat16 or float32: sharded "
                "workers do not share the loss scale of float16."
            )
