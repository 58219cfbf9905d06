"""The complete, typed configuration of a training run of `train.py`."""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from pipelines.config.annotations import AnnotationConfig, ScoredAnnotationConfig
from re2tal.backbones.adapters import AdapterConfig
from re2tal.backbones.lora import LoraConfig
from re2tal.backbones.protocol import BackboneConfig
from re2tal.backbones.table import IMAGENET_MEAN, IMAGENET_STD
from re2tal.classifier import ClipClassifierConfig
from re2tal.components import Component
from re2tal.datasets.trimmed import ClipConfig, ViewConfig
from re2tal.detection.suppression import NmsConfig
from re2tal.errors import check_within
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.precision import Precision
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.windows import WindowConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneModelConfig:
    """A model whose backbone starts from pretrained weights.

    Attributes:
        backbone: the video backbone.
        weights: pretrained weights of the backbone: path or URI, also of an artifact or a model in
            MLflow, or a name as `torchvision:swin3d_t/KINETICS400_V1` or
            `hf:MCG-NJU/videomae-base`; None starts at random.
        mean: mean of red, green and blue in [0, 1] that the backbone was pretrained with.
        std: their standard deviation.
        reversible: rewire the backbone (Re2TAL), so that its activations are recomputed.
        stored: keep the activations of the rewired connections all the same: the same function and
            gradients, in more memory and less time.
        slice_mb: size in MiB of the pieces in which branches run; smaller ones take less memory and
            more time. None takes the size that suits the device.
        coupling_epochs: epochs over which the connections move from the pretrained network's to the
            rewired ones, step by step (Dr2Net's alpha from 1 to 0 and beta from 0 to 1); None
            rewires at once. Activations are stored until it is through.
        tuning: what learns in the backbone: "full", all of it; "adapters", a temporal adapter in
            each block (AdaTAD); "lora", matrices of low rank beside the blocks' linear layers;
            "frozen", nothing. All but "full" keep the backbone itself as it is, as `frozen` does.
        adapters: shape of the adapters.
        lora: shape of LoRA's matrices.
        frozen: names of modules of the model that are not trained, such as "localizer.stem" or
            "backbone.patch_embed": their parameters keep their values, their BatchNorms the
            statistics, and they are run as in evaluation.
        norms: training of the backbone's norm layers: "trained"; "statistics" keeps the running
            statistics of BatchNorms as they are; "frozen" keeps scale and shift of all norms too.
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
        """Names of the modules that are not trained, except for what is added inside them."""
        return self.frozen if self.tuning == "full" else ("backbone", *self.frozen)

    @property
    def added(self) -> dict[str, Any]:
        """Additions to the backbone, by the fields of `re2tal.trained.DetectorSpec`."""
        return {name: getattr(self, name) for name in ("adapters", "lora") if name == self.tuning}

    def _check_tuning(self) -> None:
        for name, default in (("adapters", AdapterConfig()), ("lora", LoraConfig())):
            if getattr(self, name) != default and self.tuning != name:
                raise ValueError(
                    f"--model.{name} is of --model.tuning {name}, but that is {self.tuning}: set "
                    "one of them to the other."
                )
        if self.tuning == "full":
            return
        inside = [name for name in self.frozen if name.split(".")[0] == "backbone"]
        if inside or self.norms != "trained":
            option = f"frozen {' '.join(inside)}" if inside else f"norms {self.norms}"
            raise ValueError(
                f"--model.{option} is of a backbone that is trained, but --model.tuning "
                f"{self.tuning} keeps all of it as it is: leave one of them out."
            )
        if self.tuning == "frozen" and self.coupling_epochs is not None:
            raise ValueError(
                "--model.coupling-epochs moves the connections of a backbone that learns "
                "meanwhile, but --model.tuning frozen keeps it as it is: leave one of them out."
            )

    def __post_init__(self) -> None:
        self._check_tuning()
        if self.reversible:
            return
        for field_name in ("stored", "slice_mb", "coupling_epochs"):
            if getattr(self, field_name) not in (None, False):
                option = field_name.replace("_", "-")
                raise ValueError(
                    f"--model.{option} is of rewired connections, but --model.no-reversible says "
                    "that there are none: leave one of them out."
                )

    def check_epochs(self, epochs: int) -> None:
        """Check that the connections reach their end within a run's epochs.

        Raises:
            ValueError: they do not.
        """
        moving = self.coupling_epochs
        if moving is not None and not 0 < moving <= epochs:
            raise ValueError(
                f"--model.coupling-epochs must be above 0 and at most the {epochs} epochs of the "
                f"run, not {moving:g}: the network would end between the two."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with a learning rate each for backbone and localizer, warm-up and cosine decay.

    Attributes:
        backbone_lr: learning rate of the backbone; far below the localizer's, as it is pretrained.
        adapter_lr: learning rate of what `model.tuning` adds to a backbone: adapters or LoRA.
        localizer_lr: learning rate of the localizer.
        layer_decay: factor from the learning rate of a backbone's block to that of the block before
            it; the last block learns at `backbone_lr` (Clark et al., ICLR 2020), or its adapter at
            `adapter_lr`.
        weight_decay: decay of matrices and kernels; vectors (biases, norms) are not decayed.
        warmup_epochs: epochs of linear warm-up.
        schedule_epochs: length of the cosine; None means the run's own number of epochs.
        clip: largest norm of the gradient.
        ema: decay of the moving average of the weights that is evaluated and saved.
        precision: number format of branches and localizer; the reversible streams stay float32.
            The loss is scaled for float16, and a step whose gradients overflow is left out.
        accumulation: forward and backward passes of a worker in one step; more of them while
            workers are missing (`scale.min_workers`).
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
        min_workers: smallest number of workers with which a run goes on while GPUs or nodes are
            missing; None waits for all of them. The workers that are left make more passes, so that
            a step keeps its number of windows, or a few less if the passes cannot be divided
            evenly.
        resize_seconds: seconds between checks whether missing workers can come back; each time they
            do, all go on from the last checkpoint.
        sharded: split parameters, gradients and optimizer state over the workers (FSDP2), for
            backbones that are large beside a GPU.
        cpus_per_worker: logical CPUs that a worker holds; what is left over decodes videos.
        cpus_per_decoder: logical CPUs that a decoding task holds, so how many of them run at once.
        decoder_threads: threads of a decoding task; more than one only helps with large pictures.
        max_failures: most times that a lost worker is replaced from the last checkpoint.
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

    def __post_init__(self) -> None:
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(
                f"ScaleConfig.min_workers of {self.min_workers} is not from 1 to the "
                f"{self.workers} of ScaleConfig.workers."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Actors that run a model, and the tasks that decode for them.

    Attributes:
        actors: processes that run the model; by default one a GPU.
        gpu: give each of them a GPU; by default if the cluster has any.
        cpus_per_actor: logical CPUs that each of them holds; what is left over decodes videos.
        cpus_per_decoder: logical CPUs that a decoding task holds, so how many of them run at once.
        decoder_threads: threads of a decoding task; more than one only helps with large pictures.
    """

    actors: int | None = None
    gpu: bool | None = None
    cpus_per_actor: float = 1.0
    cpus_per_decoder: float = 0.5
    decoder_threads: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints that are written, and those that are kept beside the newest.

    Attributes:
        steps: number of steps between checkpoints within an epoch; None writes one at the end of
            each epoch only.
        keep: number of checkpoints that are kept.
        which: choice of those that are kept: the highest mAP, or the last.
    """

    steps: int | None = None
    keep: int = 2
    which: Literal["best", "last"] = "best"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Fields that all recipes have.

    Attributes:
        name: name of the recipe, from which the MLflow run has its name.
        experiment: MLflow experiment.
        output: folder of checkpoints and of the default MLflow store.
        seed: seed of weights, windows, order and dropout.
        epochs: passes over the training videos.
        evaluate_from: the first epoch that ends with an evaluation; where that takes long, early
            ones can do without. The best checkpoint is one of those that were evaluated.
        batch_size: windows of a worker's forward pass. A step has `scale.workers` times
            `optim.accumulation` times as many.
        resume: go on with the last run of the same configuration and data if it did not end.
        optim: learning rates, schedule and precision.
        scale: layout of the run on the cluster.
        checkpoints: checkpoints that are written and kept.

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
                f"{self.evaluate_from}: its last epoch has to be evaluated. Set it too."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(ScoredAnnotationConfig):
    """Videos, and the windows that are cut from them.

    Attributes:
        videos: folder of the video files, named by id; a path or a URI.
        features: folder of features (extract_features.py, or others': pipelines/data/README.md); a
            path or a URI. The localizer is then trained on them, without videos and backbone.
        make_toy: make the toy data set at `annotations` and `videos` when it is missing.
        training_subset: subset that is trained on; by default that of the data set, or "training".
        validation_subset: subset that is evaluated after every epoch; by default that of the data
            set, or "validation".
        size: pixels of a frame's side: the short side is resized to it, the centre is cut out.
        window: windows, cut at random places for training, overlapping for the evaluation.
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
        decoded = self.augmentation.decoded_size(self.size)
        if decoded < self.size:
            raise ValueError(
                f"DataConfig.augmentation.source_size of {decoded} pixels is below "
                f"DataConfig.size of {self.size}: crops are taken from frames at least as large."
            )
        if self.window.stitch.enabled and self.augmentation.in_time != AugmentationConfig():
            raise ValueError(
                "--data.augmentation.speed and --data.augmentation.reverse are of windows with one "
                "rate, but --data.window.stitch.enabled shows clips at two: leave one of them out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(BackboneModelConfig):
    """The detector: backbone and localizer.

    Attributes:
        localizer: network that turns features into segments.
        localizer_weights: initial weights of the localizer, from a detector of ours
            (`weights.safetensors`) or its authors' release; path or URI, also of an artifact in
            MLflow; None begins at random.
        class_agnostic: find actions of whatever class; their classes come from
            `data.video_scores` or, without it, the proposals themselves are evaluated.
    """

    localizer: Annotated[LocalizerConfig, Component()]
    localizer_weights: str | None = None
    class_agnostic: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Finetuning of the backbone before the detector is trained: step 4 of Re2TAL on one's classes.

    Attributes:
        epochs: passes over the annotated segments of the training videos; 0 leaves it out.
        frames: frames of a clip, at the rate of the windows.
        lr: learning rate of the backbone; the classifier's head learns ten times as fast.
        background: tell the segments from clips between them too.

    Raises:
        ValueError: a field is out of its range.
    """

    # without the names of the fields around it, as most who finetune give no other
    epochs: Annotated[int, tyro.conf.arg(aliases=("--finetune-epochs",))] = 0
    frames: int = 32
    lr: float = 1e-4
    background: bool = False

    def __post_init__(self) -> None:
        check_within(self, epochs=(0, 10**6), frames=(1, 2**20), lr=(0, 1e3))


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(RunConfig):
    """The complete configuration of one training run.

    Attributes:
        data: annotations, videos and windows.
        finetune: finetuning of the backbone on the annotated segments, before all else.
        model: backbone and localizer.
        nms: suppression of detections that overlap.
        thresholds: tIoU thresholds of the mAP; the mean over them selects the best checkpoint.
        ignore_ambiguous: do not count detections on stretches that cannot be judged, as in
            THUMOS-14's own toolkit. Published results count them as false positives.
        watched_videos: training videos on which mAP is measured too at every evaluation, but no
            more than there are validation videos: the difference shows whether the detector
            overfits. 0 leaves out these and the validation loss.
        save_raw: keep the detections before non-maximum suppression with each checkpoint, for
            ensembles and for searching its settings without training.
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
                f"--model.tuning {self.model.tuning} trains parts of a backbone, but with "
                "--data.features there is none: leave one of them out."
            )
        if self.scale.sharded and self.optim.precision == "float16":
            raise ValueError(
                "Recipe.scale.sharded goes with Recipe.optim.precision bfloat16 or float32: the "
                "scale of a float16 loss is not agreed on between the workers."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedDataConfig(AnnotationConfig):
    """Trimmed videos, and the clips that are cut from them.

    With `annotations`, the clips are cut from the annotated segments of untrimmed videos; the lists
    in `training` and `validation` are then not read.

    Attributes:
        training: a folder with a folder of videos for each class, or a list of videos: Kinetics'
            own CSV, a CSV with `path` and `label`, or lines of `path label` (described in
            `re2tal.datasets.trimmed.lists`); a path or a URI.
        validation: folder or list, as above, of the videos that are evaluated after every epoch.
        videos: folder that the paths in lists are in, or that of the untrimmed videos, named by id;
            a path or a URI.
        training_subset: subset of the annotations that is trained on; by default that of the data
            set, or "training".
        validation_subset: subset that is evaluated; by default that of the data set, or
            "validation".
        background: tell the annotated segments from what lies between them too: a class more, with
            as many stretches as the most frequent class has segments.
        classes: file with the names of all classes, one a line; needed where lists have numbers.
            None takes the classes of the training videos, sorted.
        training_split: value of the training list's column `split` in the rows that are taken; None
            takes all rows.
        validation_split: the same value in the validation list.
        make_toy: make the toy data set's trimmed split when there is nothing at `training`.
        size: pixels of a frame's side: the short side is resized to it.
        clip: frames of a clip and their rate.
        augmentation: random changes of training clips.
        max_failed: share of unusable videos above which the run stops. Kinetics always lacks some.

    Raises:
        ValueError: crops would be taken from frames smaller than `size`.
    """

    training: str | None = None
    validation: str | None = None
    videos: str | None = None
    training_subset: str | None = None
    validation_subset: str | None = None
    background: bool = False
    classes: str | None = None
    training_split: str | None = None
    validation_split: str | None = None
    make_toy: bool = False
    size: int = 224
    clip: ClipConfig = field(default_factory=ClipConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_failed: float = 0.05

    def __post_init__(self) -> None:
        decoded = self.augmentation.decoded_size(self.size)
        if decoded < self.size:
            raise ValueError(
                f"TrimmedDataConfig.augmentation.source_size of {decoded} pixels is below "
                f"TrimmedDataConfig.size of {self.size}: crops are taken from frames at least as "
                "large."
            )

    @property
    def subsets(self) -> dict[str, str]:
        """Names of the data that a run trains on and is evaluated on."""
        if self.annotations is not None:
            named = {"training": self.trained_on, "validation": self.evaluated_on}
            return {use: f"{self.title} {name} segments" for use, name in named.items()}
        lists = {"training": self.training, "validation": self.validation}
        paths = {use: PurePath(path or "") for use, path in lists.items()}
        return {use: f"{path.parent.name} {path.stem}".strip() for use, path in paths.items()}

    @property
    def counted(self) -> str:
        """Name of the things that have a class each."""
        return "videos" if self.annotations is None else "segments"

    @property
    def trained_on(self) -> str:
        """Name of the training subset of the annotations."""
        return self.training_subset or self.record.training

    @property
    def evaluated_on(self) -> str:
        """Name of the validation subset of the annotations."""
        return self.validation_subset or self.record.validation

    @property
    def window(self) -> WindowConfig:
        """Windows that a classifier cuts from videos longer than a clip."""
        return WindowConfig(frames=self.clip.frames, fps=self.clip.fps)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierModelConfig(BackboneModelConfig):
    """The classifier: backbone and a linear layer. Without `reversible`, this is plain pretraining.

    Attributes:
        head: network that turns features into classes.
    """

    head: ClipClassifierConfig = field(default_factory=ClipClassifierConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationRecipe(RunConfig):
    """The complete configuration of one run of `finetune_backbone.py`.

    An epoch shows one clip of each training video. `optim.localizer_lr` is the learning rate of the
    classifier's head. Whatever checkpoints are kept, the result is the last epoch's.

    Attributes:
        data: trimmed videos and clips.
        model: backbone and classifying head.
        views: views whose scores the last evaluation averages; those after every epoch look at the
            middle clip.
        weights_file: path of another copy of the backbone's weights; an existing file is replaced.

    Raises:
        ValueError: settings contradict one another.
    """

    experiment: str = "re2tal-backbones"
    data: TrimmedDataConfig
    model: ClassifierModelConfig
    views: ViewConfig = field(default_factory=lambda: ViewConfig(clips=4, crops=3))
    weights_file: str | None = None
    checkpoints: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(keep=1, which="last")
    )

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        self.model.check_epochs(self.epochs)
        if self.model.added:
            raise ValueError(
                f"--model.tuning {self.model.tuning} is for train.py: here the backbone's own "
                "weights are the result. Take full, or frozen to train the classifier alone."
            )


AnyRecipe: TypeAlias = Recipe | ClassificationRecipe
