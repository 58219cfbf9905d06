"""What is known to be wrong or unusual in the published data sets, as data, with its source."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Fault(Enum):
    """What can be wrong with a segment; the value says it as a phrase."""

    EMPTY = "has no length"
    REVERSED = "is reversed: it ends before it starts"
    EARLY = "starts before the video does"
    LATE = "reaches past the video's duration"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetQuirks:
    """How the annotations of one data set are to be read.

    Nothing is repaired unless it is named here: by default every fault is an error.

    Attributes:
        repaired: The faults that the data set is known to have. A segment with one of them is cut
            to the video where at least half of it lies inside, and dropped otherwise: most of a
            segment that lies outside is a typing error, and half a typing error is no annotation.
        ambiguous: Labels that are no class but mark stretches that cannot be judged.
        implied: Label -> the wider label that each of its instances bears as well. Where the file
            lacks the second instance it is added.
        unusable: Video id -> why it is left out. Published results differ in which videos they
            count: an id that is passed as one to keep is not left out.
    """

    repaired: frozenset[Fault] = frozenset()
    ambiguous: frozenset[str] = frozenset()
    implied: Mapping[str, str] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)


# Heilbron et al., CVPR 2015; release 1.3. Counted in 19,228 of its videos: 12 segments without
# length (9 of training, 3 of validation); 215 end a few milliseconds late, which is within the
# tolerance of every data set. About 2 % of the videos cannot be had any more: exclude them.
ACTIVITYNET13 = DatasetQuirks(repaired=frozenset({Fault.EMPTY, Fault.LATE}))

# Jiang et al., THUMOS challenge 2014, temporal annotations of the validation and test videos.
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
THUMOS14 = DatasetQuirks(
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
# instances, and what is wrong in 270 and 1496 are those of THUMOS' classes only.
MULTITHUMOS = DatasetQuirks(repaired=frozenset({Fault.EMPTY, Fault.LATE}))

# Zhao et al., ICCV 2019; HACS Segments 1.1.1. Durations are strings. Not counted here; the faults
# are those that other loaders of it guard against.
HACS_SEGMENTS = DatasetQuirks(repaired=frozenset({Fault.EMPTY, Fault.REVERSED, Fault.LATE}))

# Liu et al., TIP 2022: 106 classes, ActivityNet's form. Not counted here either.
FINEACTION = DatasetQuirks(repaired=frozenset({Fault.EMPTY, Fault.LATE}))

# Damen et al., IJCV 2022. Counted in validation: one segment ends 13 ms late, nothing else.
EPIC_KITCHENS100 = DatasetQuirks()

# Grauman et al., CVPR 2022. Not counted here: the data set needs a signed licence. The times of a
# clip come out of differences, and its own code neither clips nor checks them.
EGO4D_MQ = DatasetQuirks(repaired=frozenset({Fault.EMPTY, Fault.EARLY, Fault.LATE}))

DATASETS: Mapping[str, DatasetQuirks] = {
    "activitynet-1.3": ACTIVITYNET13,
    "thumos-14": THUMOS14,
    "multithumos": MULTITHUMOS,
    "hacs-segments": HACS_SEGMENTS,
    "fineaction": FINEACTION,
    "epic-kitchens-100": EPIC_KITCHENS100,
    "ego4d-mq": EGO4D_MQ,
}
