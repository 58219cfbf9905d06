from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from re2tal.detection import Detections
from re2tal.localizers import ActionFormer, ActionFormerConfig, Localizer, Targets
from re2tal.localizers.actionformer import assign
from re2tal.localizers.transformer import Embedding, Strip, TransformerBlock
from tests.localizers.learning import learnt

SMALL = ActionFormerConfig(
    width=16, head_width=16, heads=2, levels=3, window=5, stem_layers=1, residual_scale=0.5
)
NOTHING = Targets(segments=torch.zeros(0, 2), labels=torch.zeros(0, dtype=torch.int64))


def built(config: ActionFormerConfig = SMALL, seed: int = 0) -> ActionFormer:
    """A localizer for 6 channels and 4 classes whose parameters are all away from their start."""
    torch.manual_seed(seed)
    model = config.build(6, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def sample(lengths: list[int]) -> tuple[Tensor, Tensor]:
    features = torch.randn(len(lengths), 6, 32, generator=torch.Generator().manual_seed(1))
    return features, torch.arange(32)[None] < torch.tensor(lengths)[:, None]


ACTIONS = [
    Targets(segments=torch.tensor([[2.0, 6.5], [8.0, 20.0]]), labels=torch.tensor([1, 3])),
    NOTHING,
]


def same(a: Detections, b: Detections) -> bool:
    return (
        torch.equal(a.segments, b.segments)
        and torch.equal(a.scores, b.scores)
        and torch.equal(a.labels, b.labels)
    )


def test_it_is_a_localizer() -> None:
    localizer: Localizer = built()
    features, mask = sample([32, 20])
    losses = localizer(features, mask, ACTIONS)
    assert isinstance(losses, dict)
    assert set(losses) == {"classification", "regression"}
    assert all(loss.shape == () and loss > 0 for loss in losses.values())
    found = localizer(features, mask)
    assert isinstance(found, list)
    assert [type(f) for f in found] == [Detections, Detections]


def test_what_the_padding_holds_changes_nothing() -> None:
    model = built()
    features, mask = sample([32, 21])
    mask[0, 9:15] = False  # a window of two stitched parts
    filled = features.masked_fill(~mask[:, None], torch.nan)
    other = features.masked_fill(~mask[:, None], 1e4)
    for a, b in zip(model(filled, mask), model(other, mask), strict=True):
        assert same(a, b)
    losses, others = model(filled, mask, ACTIONS), model(other, mask, ACTIONS)
    assert all(torch.equal(losses[term], others[term]) for term in losses)


def test_padded_points_detect_nothing() -> None:
    features, mask = sample([32, 9])
    logits, _, valid, points = built().predict(features, mask)
    assert valid[1].tolist() == [time < 9 for time in points.times.tolist()]
    found = built(replace(SMALL, score_threshold=0.0, min_duration=-1.0))(features, mask)
    assert len(found[0]) == logits.shape[1] * 4
    assert len(found[1]) == int(valid[1].sum()) * 4


def test_a_sample_does_not_depend_on_the_batch() -> None:
    model = built()
    features, mask = sample([32, 20])
    both = model(features, mask)
    alone = model(features[1:], mask[1:])[0]
    assert len(alone) > 0
    torch.testing.assert_close(both[1].scores, alone.scores)
    torch.testing.assert_close(both[1].segments, alone.segments)


@pytest.mark.parametrize("window", [5, 0])
def test_gaps_and_samples_without_a_valid_step_are_harmless(window: int) -> None:
    model = built(replace(SMALL, window=window, score_threshold=0.0)).train()
    features, mask = sample([32, 0])
    mask[0, 9:23] = False
    losses = model(features, mask, ACTIONS)
    sum(losses.values(), torch.zeros(())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    found = model.eval()(features, mask)
    assert len(found[1]) == 0
    assert found[0].segments.isfinite().all()
    assert len(found[0]) > 0


def test_heads_treat_every_level_by_itself() -> None:
    model = built()
    features, mask = sample([32, 20])
    pyramid = model.pyramid(features, mask)
    together = model.class_head(Strip.lay_out(pyramid)).split([32, 16, 8], dim=1)
    for level in range(3):
        single = replace(
            pyramid, features=(pyramid.features[level],), masks=(pyramid.masks[level],)
        )
        torch.testing.assert_close(model.class_head(Strip.lay_out(single)), together[level])


def test_decoding_is_the_inverse_of_assignment() -> None:
    """Points that predict exactly what they were assigned detect the instances themselves."""
    features, mask = sample([32, 32])
    model = built()
    _, _, valid, points = model.predict(features, mask)
    actual = assign(points, ACTIONS, 4, radius=1.5)
    logits = torch.where(actual.classes > 0, 5.0, -50.0)
    found = model._decode(logits, actual.offsets, valid, points)
    assert len(found[1]) == 0
    rows = zip(found[0].segments.tolist(), found[0].labels.tolist(), strict=True)
    assert {(start, end, label) for (start, end), label in rows} == {(2.0, 6.5, 1), (8.0, 20.0, 3)}


def test_each_level_passes_on_its_best() -> None:
    features, mask = sample([32, 32])
    every = built(replace(SMALL, score_threshold=0.0, min_duration=-1.0))(features, mask)[0]
    some = built(replace(SMALL, score_threshold=0.0, min_duration=-1.0, top_k=5))
    best = some(features, mask)[0]
    for level, (first, count) in enumerate([(0, 128), (128, 64), (192, 32)]):
        expected = every.scores[first : first + count].sort(descending=True).values[:5]
        assert torch.equal(best.scores[5 * level : 5 * level + 5], expected)
    middle = float(every.scores.median())
    lengths = every.segments[:, 1] - every.segments[:, 0]
    usual = float(lengths.median())
    few = built(replace(SMALL, score_threshold=middle, min_duration=usual))(features, mask)[0]
    expected_count = ((every.scores > middle) & (lengths > usual)).sum()
    assert 0 < len(few) == expected_count < len(every)


def test_every_parameter_learns_and_batches_without_actions_are_harmless() -> None:
    model = built().train()
    features, mask = sample([32, 20])
    for targets in ([ACTIONS[0], NOTHING], [NOTHING, NOTHING]):
        model.zero_grad()
        losses = model(features.requires_grad_(), mask, targets)
        sum(losses.values(), torch.zeros(())).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            if targets[0] is not NOTHING:
                # A bias common to all keys cancels in the softmax.
                assert parameter.grad.any() or name.endswith("key.bias"), name
    assert losses["regression"].item() == 0
    assert features.grad is not None
    assert not features.grad[1, :, 21:].any()


def test_half_precision_inside_gives_float32_outside() -> None:
    model = built()
    features, mask = sample([32, 20])
    exact = model(features, mask, ACTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(features.bfloat16(), mask, ACTIONS)
        found = model(features.bfloat16(), mask)
    for term, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[term].item(), rel=0.05)
    sum(losses.values(), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert found[0].scores.dtype == found[0].segments.dtype == torch.float32


def test_drop_path_is_for_training_and_follows_the_seed() -> None:
    model = built(replace(SMALL, drop_path=0.5))
    features, mask = sample([32, 32])
    assert same(model(features, mask)[0], model(features, mask)[0])
    model.train()
    torch.manual_seed(3)
    first = model(features, mask)[0]
    assert not same(first, model(features, mask)[0])
    torch.manual_seed(3)
    assert same(first, model(features, mask)[0])


def test_dropout_leaves_the_skip_connections_alone() -> None:
    block = TransformerBlock(
        4, heads=2, window=3, stride=1, residual_scale=1.0, dropout=1.0, drop_path=0.0
    )
    x, mask = torch.randn(2, 8, 4), torch.ones(2, 8, dtype=torch.bool)
    assert torch.equal(block(x, mask)[0], x)
    assert not torch.allclose(block.eval()(x, mask)[0], x)
    block.train()
    second, last = block.mlp[3], block.mlp[4]
    assert isinstance(second, nn.Linear)
    assert isinstance(last, nn.Dropout)
    block.attn.drop.p = last.p = 0.0  # what is left lies between the layers of the MLP
    nn.init.ones_(second.bias)
    torch.testing.assert_close(block(x, mask)[0], x + block.attn(block.ln1(x), mask) + 1)


def test_input_dropout_leaves_out_whole_channels() -> None:
    embed = Embedding(32, 32, streams=(), layers=0, positions=0, dropout=0.5)
    x, mask = torch.ones(4, 8, 32), torch.ones(4, 8, dtype=torch.bool)
    dropped = embed(x, mask)
    assert torch.equal(dropped, dropped[:, :1].expand(4, 8, 32))
    assert dropped.unique().tolist() == [0, 2]
    assert torch.equal(embed.eval()(x, mask), x)


def test_scores_start_at_the_prior() -> None:
    features, mask = sample([32, 32])
    torch.manual_seed(0)
    logits, *_ = replace(SMALL, empty_classes=(2,)).build(6, 4).eval().predict(features, mask)
    scores = logits.sigmoid().mean(dim=(0, 1))
    assert all(0.003 < scores[label] < 0.03 for label in (0, 1, 3))
    assert scores[2] < 1e-5


def test_positions_are_stretched_over_longer_sequences() -> None:
    config = replace(SMALL, positions=16)
    features, mask = sample([32, 32])
    embed = built(config).pyramid.embed
    plain = built(replace(config, positions=0)).pyramid.embed
    plain.load_state_dict(embed.state_dict())
    x = features.transpose(1, 2)
    assert embed.positions is not None
    added = embed(x[:, :8], mask[:, :8]) - plain(x[:, :8], mask[:, :8])
    torch.testing.assert_close(added[0], embed.positions[:8])
    stretched = embed(x, mask) - plain(x, mask)
    between = embed.positions[:2].lerp(embed.positions[1:3], 0.25)
    torch.testing.assert_close(stretched[0, 1], between[0], atol=1e-6, rtol=1e-5)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        built()(torch.zeros(1, 6, 30), torch.ones(1, 30, dtype=torch.bool))
    with pytest.raises(ValueError, match="one for each level"):
        ActionFormerConfig(window=(3, 3))
    with pytest.raises(ValueError, match="odd"):
        ActionFormerConfig(window=8)
    with pytest.raises(ValueError, match="heads"):
        ActionFormerConfig(width=10)
    with pytest.raises(ValueError, match="add up"):
        ActionFormerConfig(streams=((4, 256), (8, 128)))
    with pytest.raises(ValueError, match="features of 6 channels"):
        ActionFormerConfig(streams=((4, 256), (3, 256))).build(6, 4)
    for label in (4, -1):
        with pytest.raises(ValueError, match="empty classes"):
            replace(SMALL, empty_classes=(label,)).build(6, 4)


def test_published_configurations_have_the_published_number_of_parameters() -> None:
    """Counted once in the public implementation, with the files that it publishes."""
    thumos = ActionFormerConfig()
    anet = replace(thumos, width=256, head_width=256, window=(7, 7, 7, 7, 7, 0), positions=192)
    epic = replace(thumos, window=9, overlapping_ranges=True)
    ego4d = replace(epic, levels=8, positions=1024, dropout=0.1)
    three = ((2304, 256), (1536, 384), (256, 384))
    joined = replace(ego4d, width=1024, streams=three, heads=16, head_width=1024)
    for config, channels, classes, expected in (
        (thumos, 2048, 20, 29_251_612),
        (anet, 512, 1, 6_943_497),
        (epic, 2304, 97, 29_763_177),
        (epic, 2304, 300, 30_075_188),
        (ego4d, 1536, 110, 34_927_736),
        (joined, 4096, 110, 134_048_888),
    ):
        with torch.device("meta"):
            model = config.build(channels, classes)
        assert sum(p.numel() for p in model.parameters()) == expected
    assert [most for _, most in thumos.ranges] == [4, 8, 16, 32, 64, math.inf]
    assert [least for least, _ in thumos.ranges] == [0, 4, 8, 16, 32, 64]
    assert [least for least, _ in epic.ranges] == [0, 2, 4, 8, 16, 32]


def planted(count: int, seed: int) -> tuple[Tensor, list[Targets]]:
    """Noise with a pattern for each class where an action is."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.eye(6)[:3]
    features = 0.3 * torch.randn(count, 6, 32, generator=generator)
    targets = []
    for sample in features:
        first = 2 + int(torch.randint(0, 4, (), generator=generator))
        lengths = torch.randint(3, 10, (2,), generator=generator).tolist()
        segments, labels = [], []
        for start, length in ((first, lengths[0]), (first + lengths[0] + 3, lengths[1])):
            label = int(torch.randint(0, 3, (), generator=generator))
            sample[:, start : start + length] += 2 * patterns[label][:, None]
            segments.append([start - 0.5, start + length - 0.5])
            labels.append(label)
        targets.append(Targets(segments=torch.tensor(segments), labels=torch.tensor(labels)))
    return features, targets


def test_it_learns_planted_segments() -> None:
    torch.manual_seed(0)
    model = replace(SMALL, width=32, head_width=32, initial_normalizer=20.0).build(6, 3)
    assert learnt(model, planted, rate=6e-3, steps=60) > 0.9
