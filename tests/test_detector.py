from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from re2tal.detector import Detector
from re2tal.localizers import ActionFormer, ActionFormerConfig

LOCALIZER = ActionFormerConfig(
    width=16, head_width=16, heads=2, levels=3, window=5, stem_layers=1, drop_path=0.0
)


class TinyBackbone(nn.Module):
    """A convolution over blocks of four frames, averaged over space."""

    channels = 6
    temporal_stride = 4
    multiple = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 6, (4, 3, 3), stride=(4, 1, 1), padding=(0, 1, 1))
        self.seen: Tensor | None = None

    def forward(self, video: Tensor) -> Tensor:
        self.seen = video
        features: Tensor = self.conv(video).relu().mean(dim=(3, 4))
        return features

    def layer_of(self, name: str) -> int:
        assert name.startswith("conv.")
        return 0


def detector() -> Detector[TinyBackbone, ActionFormer]:
    torch.manual_seed(0)
    return Detector(TinyBackbone(), LOCALIZER.build(6, 4), mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2))


def batch(valid: int = 30) -> tuple[Tensor, Tensor]:
    frames = torch.randint(0, 256, (2, 32, 8, 10, 3), dtype=torch.uint8)
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1, valid:] = False
    return frames, mask


def test_pixels_become_normalised_channels() -> None:
    model = detector()
    frames, mask = batch()
    before = frames.clone()
    model(frames, mask)
    seen = model.backbone.seen
    assert seen is not None
    assert seen.shape == (2, 3, 32, 8, 10)
    assert seen.dtype == torch.float32
    expected = (frames[1, 5, 2, 3].float() / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor(
        [0.5, 1, 2]
    )
    torch.testing.assert_close(seen[1, :, 5, 2, 3], expected)
    assert torch.equal(frames, before)


def test_a_feature_is_valid_when_any_of_its_frames_is() -> None:
    model = detector()
    for valid, features in ((32, 8), (30, 8), (28, 7), (1, 1), (0, 0)):
        _, mask = batch(valid)
        assert model.feature_mask(mask).sum(dim=1).tolist() == [8, features]


def test_the_content_of_padding_frames_changes_nothing() -> None:
    model = detector().eval()
    frames, mask = batch(valid=20)
    other = frames.clone()
    other[1, 20:] = 255 - other[1, 20:]
    assert model.num_classes == 4
    for a, b in zip(model(frames, mask), model(other, mask), strict=True):
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.segments, b.segments)


def test_the_state_is_that_of_the_two_parts() -> None:
    assert {name.split(".")[0] for name in detector().state_dict()} == {"backbone", "localizer"}


def test_wrong_shapes_are_refused_in_a_sentence() -> None:
    model = detector()
    frames, mask = batch()
    with pytest.raises(ValueError, match="Frames must be uint8"):
        model(frames.float(), mask)
    with pytest.raises(ValueError, match="Frames must be uint8"):
        model(frames.permute(0, 4, 1, 2, 3), mask)
    with pytest.raises(ValueError, match="temporal stride of 4"):
        model(frames, mask[:, :30])
