"""Published data sets: a record each, with everything that differs from one to the next.

A new data set is a record in `DATASETS`, in this file. If its files have a form of their own, their
reader stands in front of the record, as a `FileForm`. Every option that names a data set or a form,
the thresholds and the metrics of an evaluation and the bins of a diagnosis follow from that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from re2tal.annotations import Bins, Characteristics
from re2tal.datasets.forms import (
    ACTIVITYNET_JSON,
    CLASS_FILES,
    EGO4D_MOMENTS,
    EPIC_CSV,
    FileForm,
)


class Fault(Enum):
    """Fault of an instance; the value is a phrase for it."""

    EMPTY = "has no length"
    REVERSED = "is reversed: it ends before it starts"
    EARLY = "starts before the video does"
    LATE = "reaches past the video's duration"
    SPACED = "has spaces around its label"


_FIVE = ("XS", "S", "M", "L", "XL")
_FOUR = ("XS", "S", "M", "L")

ACTIVITYNET_BINS = Characteristics(
    coverage=Bins(edges=(0.2, 0.4, 0.6, 0.8), names=_FIVE),
    length=Bins(edges=(30, 60, 120, 180), names=_FIVE),
    instances=Bins(edges=(1, 4, 8), names=_FOUR),
)
"""DETAD's bins for ActivityNet: actions of minutes in short videos."""

THUMOS_BINS = Characteristics(
    coverage=Bins(edges=(0.02, 0.04, 0.06, 0.08), names=_FIVE),
    length=Bins(edges=(3, 6, 12, 18), names=_FIVE),
    instances=Bins(edges=(1, 40, 80), names=_FOUR),
)
"""DETAD's bins for THUMOS-14: actions of seconds in long videos."""

_LOW = (0.1, 0.2, 0.3, 0.4, 0.5)
_MIDDLE = (0.3, 0.4, 0.5, 0.6, 0.7)
_HIGH = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Reading, faults and evaluation of one data set.

    Nothing is repaired unless it is named here: by default every fault is an error.

    Attributes:
        name: value of the options that choose a data set.
        forms: layouts in which it is published.
        repaired: known faults of the data set. A segment with one of them is cut to the video where
            at least half of it lies inside, and dropped otherwise: most of a segment that lies
            outside is a typing error, and half a typing error is no annotation. Spaces around a
            label are removed.
        ambiguous: labels that are no class but mark stretches that cannot be judged.
        implied: label -> the wider label that each of its instances has as well. Where the file
            lacks the second instance it is added.
        unusable: video id -> reason of its exclusion. Published results differ in the videos they
            count: an id that is passed as one to keep is not left out.
        training: subset for training.
        validation: subset for evaluation.
        thresholds: tIoU thresholds of the mAP.
        recall_at: each k of the Recall@kx that is reported beside the mAP, at the same thresholds.
        bins: bins of the diagnosis.
    """

    name: str
    forms: tuple[FileForm, ...] = ()
    repaired: frozenset[Fault] = frozenset()
    ambiguous: frozenset[str] = frozenset()
    implied: Mapping[str, str] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)
    training: str = "training"
    validation: str = "validation"
    thresholds: tuple[float, ...] = _MIDDLE
    recall_at: tuple[int, ...] = ()
    bins: Characteristics = THUMOS_BINS

    def trimming(self) -> "Dataset":
        """Return the record of the same data set, which removes spaces around labels as well."""
        return replace(self, repaired=self.repaired | {Fault.SPACED})


ANY_OTHER = Dataset(name="any other")
"""Record of data sets that have none of their own."""

# Heilbron et al., CVPR 2015; release 1.3. Counted in 19,228 of its videos: 12 segments without
# length (9 of training, 3 of validation); 215 end a few milliseconds late, which is within the
# tolerance of every data set. About 2 % of the videos cannot be had any more: exclude them.
ACTIVITYNET13 = Dataset(
    name="activitynet-1.3",
    forms=(ACTIVITYNET_JSON,),
    repaired=frozenset({Fault.EMPTY, Fault.LATE}),
    thresholds=_HIGH,
    bins=ACTIVITYNET_BINS,
)

# Jiang et al., THUMOS challenge 2014, temporal annotations of the validation and test videos. The
# validation set is trained on and the test set evaluated; in the usual ActivityNet-style files
# these are called training and validation.
# - "Ambiguous" is, in the words of the challenge's readme, hard to label either way, and such
#   segments are taken out of the evaluation.
# - All 360 instances of CliffDiving are there as Diving too; some conversions dropped these.
# - Outside their videos lie, apart from the unusable ones, 2 instances of video_validation_0000364,
#   2 of _0000856, 3 of video_test_0000814 and 1 of _0001081. The ground truths that the field
#   shares keep them, as instances that nobody can find.
# - 213 test videos are annotated in time. Two are falsely annotated, 270 and 1496 (Zhao et al.,
#   SSN, ICCV 2017), and of one, 1292, nothing is but ambiguous stretches. Without the three there
#   are 210: so STPN and later work on weak supervision, and the ground truth of G-TAD, which VSGN
#   and AFSD share. OpenTAD keeps 1496: 211. ActionFormer keeps 1496 and 270: 212.
THUMOS14 = Dataset(
    name="thumos-14",
    forms=(ACTIVITYNET_JSON, CLASS_FILES),
    repaired=frozenset({Fault.LATE}),
    ambiguous=frozenset({"Ambiguous"}),
    implied={"CliffDiving": "Diving"},
    unusable={
        "video_test_0000270": "falsely annotated: 22 of its 29 instances lie outside the video",
        "video_test_0001292": "nothing but ambiguous stretches is annotated",
        "video_test_0001496": "falsely annotated: its 18 instances are not what can be seen",
    },
)

# Yeung et al., IJCV 2018: 65 classes on the videos of THUMOS-14. Counted in the published JSON
# conversion: 7 segments without length, 65 that reach more than a second past the video, of which
# 5 start inside it and look like a slipped digit (398.4 to 4000.4 in a video of 1315 s). All 413
# videos are used, as in published results: its annotators saw each of them anew, 1292 too has
# instances, and the faults of 270 and 1496 concern THUMOS' classes only.
MULTITHUMOS = Dataset(
    name="multithumos",
    forms=(ACTIVITYNET_JSON, CLASS_FILES),
    repaired=frozenset({Fault.EMPTY, Fault.LATE}),
    thresholds=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
)

# Zhao et al., ICCV 2019; HACS Segments 1.1.1. Durations are strings. Not counted here; the faults
# are those that other loaders of it guard against.
HACS_SEGMENTS = Dataset(
    name="hacs-segments",
    forms=(ACTIVITYNET_JSON,),
    repaired=frozenset({Fault.EMPTY, Fault.REVERSED, Fault.LATE}),
    thresholds=_HIGH,
    bins=ACTIVITYNET_BINS,
)

# Liu et al., TIP 2022: 106 classes, ActivityNet's form. Not counted here either.
FINEACTION = Dataset(
    name="fineaction",
    forms=(ACTIVITYNET_JSON,),
    repaired=frozenset({Fault.EMPTY, Fault.LATE}),
    thresholds=_HIGH,
)

# Damen et al., IJCV 2022. Counted in validation: one segment ends 13 ms late, nothing else.
EPIC_KITCHENS100 = Dataset(
    name="epic-kitchens-100", forms=EPIC_CSV, training="train", thresholds=_LOW
)

# Grauman et al., CVPR 2022. Not counted here: the data set needs a signed licence. The times of a
# clip come out of differences, and its own code neither clips nor checks them. Its benchmark
# reports Recall@1x (at tIoU 0.5 first of all) beside the mAP.
EGO4D_MQ = Dataset(
    name="ego4d-mq",
    forms=(EGO4D_MOMENTS,),
    repaired=frozenset({Fault.EMPTY, Fault.EARLY, Fault.LATE}),
    training="train",
    validation="val",
    thresholds=_LOW,
    recall_at=(1,),
)

DATASETS: Mapping[str, Dataset] = {
    record.name: record
    for record in (
        ACTIVITYNET13,
        THUMOS14,
        MULTITHUMOS,
        HACS_SEGMENTS,
        FINEACTION,
        EPIC_KITCHENS100,
        EGO4D_MQ,
    )
}

FORMS: Mapping[str, FileForm] = {
    form.name: form for record in DATASETS.values() for form in record.forms
}
