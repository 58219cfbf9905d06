"""The benchmark of augmentation compares what it says."""

from re2tal.backbones.swin import swin_toy
from re2tal.videos.augmentation import AugmentationConfig
from pipelines.experiments.augmentation import compared


def test_each_configuration_is_compared_with_the_step() -> None:
    configs = {
        "nothing": AugmentationConfig(),
        "much": AugmentationConfig(source_size=48, crop_area=(0.5, 1.0), hue=0.1),
    }
    rows = compared(swin_toy(), configs, frames=16, size=32, device="cpu", rounds=1)
    assert [row["what changes"] for row in rows] == ["nothing", "much"]
    nothing, much = ((row["ms a frame"], row["% of the step"]) for row in rows)
    assert 0 <= nothing[0] < much[0]
    assert 0 <= nothing[1] < much[1]
