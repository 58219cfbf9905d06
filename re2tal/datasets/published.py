"""Published data sets: one record for each, with all differences between them.

A new data set is a record in `DATASETS`, in this file. If its files have a new form, define a
`FileForm` with their reader before the record. The options that name data sets and forms, the
thresholds and metrics of an evaluation and the bins of a diagnosis all follow from the record.
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
    """Fault of an instance; the value describes it in messages."""

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

    Only the faults that are named here are repaired: by default every fault is an error.

    Attributes:
        name: value of the options that choose a data set.
        forms: forms in which it is published.
        repaired: known faults of the data set. A segment with such a fault is clipped to the video
            if at least half of it lies inside, and dropped otherwise, because then it is probably a
            typing error. Spaces around a label are removed.
        ambiguous: labels that are not classes but mark segments that cannot be judged.
        implied: label -> wider label that each of its instances also has. If the file lacks the
            second instance, it is added.
        unusable: video id -> reason of its exclusion. Published results differ in the videos they
            count, so the caller can keep such a video.
        training: subset for training.
        validation: subset for evaluation.
        thresholds: tIoU thresholds of the mAP.
        recall_at: each k of the Recall@kx that is reported with the mAP, at the same thresholds.
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
        """Return the same record, with removal of spaces around labels."""
        return replace(self, repaired=self.repaired | {Fault.SPACED})


ANY_OTHER = Dataset(name="any other")
"""Record of all other data sets."""

# Heilbron et al., CVPR 2015; release 1.3. Counted in 19,228 of its videos: 12 segments of zero
# length (9 of training, 3 of validation); 215 end a few milliseconds late, which is within the
# tolerance of every data set. About 2 % of the videos are no longer available: exclude them.
ACTIVITYNET13 = Dataset(
    name="activitynet-1.3",
    forms=(ACTIVITYNET_JSON,),
    repaired=frozenset({Fault.EMPTY, Fault.LATE}),
    thresholds=_HIGH,
    bins=ACTIVITYNET_BINS,
)

# Jiang et al., THUMOS challenge 2014, temporal annotations of the validation and test videos. The
# validation set is used for training and the test set for evaluation; in the usual
# ActivityNet-style files they are called training and validation.
# - "Ambiguous" is, according to the challenge's readme, hard to label either way; such segments are
#   excluded from the evaluation.
# - All 360 instances of CliffDiving are also annotated as Diving; some conversions dropped these.
# - Apart from the unusable videos, these instances lie outside their videos: 2 of
#   video_validation_0000364, 2 of _0000856, 3 of video_test_0000814 and 1 of _0001081. The ground
#   truths that papers share keep them, as instances that cannot be found.
# - 213 test videos have temporal annotations. Two of them, 270 and 1496, are wrongly annotated
#   (Zhao et al., SSN, ICCV 2017), and 1292 has only ambiguous segments. 210 remain, as in STPN and
#   later work on weak supervision, and in the ground truth of G-TAD, also used by VSGN and AFSD.
#   OpenTAD keeps 1496: 211. ActionFormer keeps 1496 and 270: 212.
THUMOS14 = Dataset(
    name="thumos-14",
    forms=(ACTIVITYNET_JSON, CLASS_FILES),
    repaired=frozenset({Fault.LATE}),
    ambiguous=frozenset({"Ambiguous"}),
    implied={"CliffDiving": "Diving"},
    unusable={
        "video_test_0000270": "wrongly annotated: 22 of its 29 instances lie outside the video",
        "video_test_0001292": "has only ambiguous segments",
        "video_test_0001496": "wrongly annotated: its 18 instances do not match the video",
    },
)

# Yeung et al., IJCV 2018: 65 classes on the videos of THUMOS-14. Counted in the published JSON
# conversion: 7 segments of zero length; 65 that end more than a second after the video, of which 5
# start inside it and look like a wrong digit (398.4 to 4000.4 in a video of 1315 s). All 413 videos
# are used, as in published results: they were annotated independently, 1292 has instances too, and
# the faults of 270 and 1496 concern THUMOS' classes only.
MULTITHUMOS = Dataset(
    name="multithumos",
    forms=(ACTIVITYNET_JSON, CLASS_FILES),
    repaired=frozenset({Fault.EMPTY, Fault.LATE}),
    thresholds=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
)

# Zhao et al., ICCV 2019; HACS Segments 1.1.1. Durations are strings. Faults were not counted; these
# are the faults that other loaders handle.
HACS_SEGMENTS = Dataset(
    name="hacs-segments",
    forms=(ACTIVITYNET_JSON,),
    repaired=frozenset({Fault.EMPTY, Fault.REVERSED, Fault.LATE}),
    thresholds=_HIGH,
    bins=ACTIVITYNET_BINS,
)

# Liu et al., TIP 2022: 106 classes, ActivityNet's form. Faults were not counted.
FINEACTION = Dataset(
    name="fineaction",
    forms=(ACTIVITYNET_JSON,),
    repaired=frozenset({Fault.EMPTY, Fault.LATE}),
    thresholds=_HIGH,
)

# Damen et al., IJCV 2022. Counted in validation: one segment ends 13 ms late, no other fault.
EPIC_KITCHENS100 = Dataset(
    name="epic-kitchens-100", forms=EPIC_CSV, training="train", thresholds=_LOW
)

# Grauman et al., CVPR 2022. Faults were not counted, because the data set needs a signed licence.
# The times of a clip are differences, which its own code neither clips nor checks. Its benchmark
# reports Recall@1x (mainly at tIoU 0.5) beside the mAP.
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
