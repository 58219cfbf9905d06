"""Adapters and LoRA: no change at the start, loops over a window's steps, gradients to the bit."""

import copy
import json
import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from re2tal.backbones.adapters import (
    Adapted,
    AdapterConfig,
    TemporalAdapter,
    _adapted,
    _joined,
    additions,
)
from re2tal.backbones.clips import Timeline
from re2tal.backbones.internvideo2 import InternVideo2Config
from re2tal.backbones.lora import LoraConfig
from re2tal.backbones.slowfast import slowfast_toy
from re2tal.backbones.swin import SwinConfig, swin_toy
from re2tal.backbones.timesformer import TimeSformerConfig
from re2tal.backbones.vivit import ViViTConfig
from re2tal.backbones.vjepa2 import VJEPA2Config
from re2tal.errors import UserError
from re2tal.reversible import rewire, set_reversible
from re2tal.reversible.branches import Branch, branches, split
from re2tal.reversible.layouts import ByToken
from re2tal.reversible.rewire import reversible_blocks
from re2tal.trained import SPEC_FILE, DetectorSpec, load_detector, save_detector
from re2tal.videos.windows import WindowConfig
from tests.backbones.test_clips import TINY
from tests.localizers.small import ACTIONFORMER
from tests.reversible.test_families import Call, saved_bytes
from tests.reversible.toy_blocks import assert_reversible_is_stored
from tests.reversible.zoo import Precision, both_precisions, scrambled

SWIN = SwinConfig(
    patch=(2, 4, 4), embed_dim=8, depths=(2, 1), heads=(2, 2), window=(2, 2, 2), drop_path=0.4
)
ADAPTERS, LORA = AdapterConfig(ratio=2), LoraConfig(rank=2, dropout=0.3)
Tuning = AdapterConfig | LoraConfig
# Models of other libraries: one without a class token, and some with one.
SHAPE: dict[str, Any] = {"patch": 4, "depths": (1,), "heads": 2, "mlp_ratio": 2.0, "clip": 4}
VJEPA2 = VJEPA2Config(channels=24, **SHAPE)
SHAPE |= {"channels": 16, "trained_clip": 4, "trained_size": 16}
VIVIT, TIMESFORMER = ViViTConfig(**SHAPE), TimeSformerConfig(**SHAPE)
every_kind = pytest.mark.parametrize(
    ("config", "tuning"),
    [
        (TINY, ADAPTERS),
        (SWIN, ADAPTERS),
        (VJEPA2, ADAPTERS),
        (VIVIT, ADAPTERS),
        (TIMESFORMER, ADAPTERS),
        (TINY, LORA),
        (SWIN, replace(LORA, layers="mlp")),
        (InternVideo2Config(**SHAPE), LORA),
    ],
    ids=lambda value: type(value).__name__,
)


@pytest.fixture
def video() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 12, 16, 16)


def tuned(config: Any, tuning: Tuning) -> Any:
    """A backbone and what learns in it; nothing else does."""
    torch.manual_seed(0)
    backbone = config.build()
    tuning.add_to(backbone)
    backbone.requires_grad_(False)
    for part in additions(backbone):
        part.requires_grad_(True)
    return backbone


def spec(config: Any, tuning: Tuning | None = None) -> DetectorSpec:
    return DetectorSpec(
        classes=("a", "b"),
        backbone=config,
        localizer=ACTIONFORMER,
        size=16,
        window=WindowConfig(frames=32, fps=4.0),
        adapters=tuning if isinstance(tuning, AdapterConfig) else None,
        lora=tuning if isinstance(tuning, LoraConfig) else None,
    )


# The function


@every_kind
@pytest.mark.parametrize("way", ["plain", "whole branches", "pieces"])
def test_new_ones_change_no_bit(config: Any, tuning: Tuning, way: str, video: Tensor) -> None:
    torch.manual_seed(0)
    plain = config.build()
    backbone = config.build()
    backbone.load_state_dict(plain.state_dict())
    before = sum(p.numel() for p in backbone.parameters())
    tuning.add_to(backbone)
    assert sum(p.numel() for p in backbone.parameters()) > before
    found = []
    for model in (plain, backbone):
        if way != "plain":
            rewire(model, slice_bytes=2000 if way == "pieces" else None)
        torch.manual_seed(0)  # of stochastic depth; LoRA's dropout would draw as well
        found.append(model.train(isinstance(tuning, AdapterConfig))(video))
    if way == "pieces":  # of other tokens, which a matrix product may round in another way
        # and the grid then by one of its steps: 1.7e-5 with AVX2
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(*found)


def term(adapter: TemporalAdapter, z: Tensor, steps: int) -> Tensor:
    """Term that an adapter adds to one window (clips, steps a clip times places, C), by loops.

    Args:
        adapter: the adapter.
        z: the tokens.
        steps: time steps of a clip.
    """
    state = {name: value.detach() for name, value in adapter.named_parameters()}
    times = [step for clip in z for step in clip.chunk(steps)]  # each (places, C)

    def hidden(t: int, place: int) -> Tensor:
        a = state["down.weight"] @ times[t][place] + state["down.bias"]
        return a * (1 + torch.erf(a / math.sqrt(2))) / 2

    rows = []
    for t in range(len(times)):
        for place in range(len(times[t])):
            seen = state["temporal.bias"].clone()
            for offset in (-1, 0, 1):
                if 0 <= t + offset < len(times):
                    kernel = state["temporal.weight"][:, 0, 1 + offset]
                    seen = seen + kernel * hidden(t + offset, place)
            mixed = hidden(t, place) + state["mix.weight"] @ seen + state["mix.bias"]
            rows.append(state["gate"] * (state["up.weight"] @ mixed + state["up.bias"]))
    return torch.stack(rows).view(z.shape)


def blocks_by_hand(
    backbone: Any, tokens: Tensor, windows: int, steps: int, rewired: bool
) -> Tensor:
    """The blocks on tokens (clips of all windows, ..., C), windows one by one in the adapters."""

    def added(block: Any, z: Tensor) -> Tensor:
        return torch.cat([term(block.adapter, w, steps) for w in z.chunk(windows)])

    current, previous = tokens, tokens
    for block in backbone.encoder.layer:
        attention = block.attention(block.layernorm_before(current))
        if not rewired:
            middle = current + attention
            z = block.output(block.intermediate(block.layernorm_after(middle)), middle)
            current = z + added(block, z)
            continue
        previous, current = current, previous + attention
        zero = torch.zeros_like(current)  # instead of the skip connection
        mlp = block.output(block.intermediate(block.layernorm_after(current)), zero)
        previous, current = current, previous + mlp + added(block, current + mlp)
    return (current + previous) / 2 if rewired else current


@pytest.mark.parametrize(("rewired", "budget"), [(False, None), (True, None), (True, 4000)])
def test_an_adapter_crosses_the_clips_of_a_window_and_no_windows(
    rewired: bool, budget: int | None, video: Tensor
) -> None:
    backbone: Any = scrambled(tuned(TINY, AdapterConfig())).eval()
    with torch.no_grad():
        stem = backbone.embeddings(video)
        wanted = blocks_by_hand(backbone, stem.flatten(1, 3), len(video), stem.shape[1], rewired)
        wanted = wanted.unflatten(1, (stem.shape[1], -1)).mean(dim=2).view(2, 6, -1).mT
    if rewired:
        rewire(backbone, slice_bytes=budget)
    found = backbone(video)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=3e-4)  # streams are on a grid
    longer = backbone(torch.cat([video, video], dim=2))  # a window of another length
    assert longer.shape == (2, 16, 12)


@pytest.mark.parametrize("config", [TINY, VJEPA2, VIVIT, TIMESFORMER, SWIN])
def test_tokens_of_every_order_are_seen_by_place_and_time(config: Any) -> None:
    """A block's branch, in one piece and in pieces; a class token in front stays as it is."""
    backbone = scrambled(tuned(config, ADAPTERS)).eval()
    block = next(m for m in backbone.modules() if isinstance(m, Adapted))
    shape: tuple[int, ...]
    line, channels, places = block.adapter.timeline, block.adapter.channels, 6
    if line is None:  # Video Swin's: (B, T, H, W, C)
        line, shape = Timeline(steps=4), (2, 4, 2, 3, channels)
    else:
        line.clips = 3
        shape = (2 * 3, line.first + line.steps * places, channels)
    torch.manual_seed(1)
    x = torch.randn(shape)
    plain, branch = branches.dispatch(block.original)(block)[-1], _adapted(block)[-1]
    with torch.no_grad():
        z = (x + plain(x)).view(2, line.clips, -1, channels)
        wanted = z.clone()
        for window in range(2):
            tokens = z[window, :, line.first :]
            sizes = (places, line.steps) if line.by_place else (line.steps, places)
            if line.by_place:
                tokens = tokens.unflatten(1, sizes).transpose(1, 2).flatten(1, 2)
            added = term(block.adapter, tokens, line.steps)
            if line.by_place:
                added = added.unflatten(1, sizes[::-1]).transpose(1, 2).flatten(1, 2)
            wanted[window, :, line.first :] += added
        assert branch.cut is not None
        layout = branch.cut(x)
        found = layout.new(x, x.shape)
        for span in ((0, 5), (5, 7), (7, layout.units)):
            piece = layout.run(branch, layout.take(x, *span), *span, layout.share())
            layout.put(found, *span, piece)
        for y in (branch(x), found):
            torch.testing.assert_close((x + y).view_as(wanted), wanted, rtol=1e-4, atol=1e-4)


def test_a_change_is_seen_one_step_further_a_block_across_clips(video: Tensor) -> None:
    backbone = scrambled(tuned(replace(TINY, clip=2), ADAPTERS)).eval()
    changed = video.clone()
    changed[0, :, 4:6] += 1  # the third of six clips of one step each
    with torch.no_grad():
        moved = (backbone(changed) - backbone(video)).abs().amax(dim=1) > 0
    assert moved[0].tolist() == [True, True, True, True, True, False]
    assert not moved[1].any()


# Gradients


@every_kind
@both_precisions
@pytest.mark.parametrize("budget", [2000, "auto", None])
def test_gradients_are_those_of_stored_activations(
    config: Any, tuning: Tuning, bf16: bool, budget: Any, video: Tensor
) -> None:
    backbone = scrambled(tuned(config, tuning))
    rewire(backbone, slice_bytes=budget)
    result = assert_reversible_is_stored(Precision(backbone, bf16=bf16).train(), video)
    for name, gradient in result.gradients.items():
        own = ".adapter." in name or ".lora_" in name
        assert (gradient is not None) is own, name
        assert gradient is None or gradient.abs().sum() > 0, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "config",
    [TINY, VJEPA2, VIVIT, InternVideo2Config(**SHAPE), SWIN],
    ids=lambda c: type(c).__name__,
)
def test_a_piece_is_counted_with_what_lora_keeps(config: Any, dropout: float) -> None:
    layers: Any = "mlp" if config is SWIN else "all"
    backbone = tuned(config, LoraConfig(rank=64, dropout=dropout, layers=layers)).train()
    block = list(reversible_blocks(backbone).values())[-1]
    x = torch.randn(2, *((2, 2, 2, 16) if config is SWIN else (8, backbone.channels)))
    for branch in split(block):
        assert branch.cut is not None
        layout = branch.cut(x)
        counted = layout.units * layout.elements * 4
        assert 0.2 < saved_bytes(Call(block, x, (), {}), branch) / counted <= 1, branch.name


def test_windows_of_two_lengths_before_one_backward(video: Tensor) -> None:
    backbone = scrambled(tuned(TINY, ADAPTERS)).train()
    rewire(backbone, slice_bytes=4000)
    found = []
    for reversible in (False, True):
        set_reversible(backbone, reversible)
        backbone.zero_grad()
        first, second = backbone(video), backbone(video[:, :, :8])
        (first.square().sum() + second.square().sum()).backward()
        gradients = (p.grad for p in backbone.parameters())
        found.append([gradient.clone() for gradient in gradients if gradient is not None])
    for rebuilt, stored in zip(*found, strict=True):  # summed in another order: stage by stage
        torch.testing.assert_close(rebuilt, stored, rtol=1e-4, atol=1e-4)


def test_pieces_draw_a_factor_of_stochastic_depth_for_each_clip() -> None:
    torch.manual_seed(0)
    layer, drop = nn.Linear(4, 4), StochasticDepth(0.5, "row")
    adapter = TemporalAdapter(4, ADAPTERS, Timeline(steps=2, clips=3))
    scrambled(adapter)
    last = Branch("mlp", (layer,), drop_path=drop, cut=ByToken(4))
    joined = _joined(last, adapter, adapter.timeline)
    x = torch.randn(2 * 3, 2 * 5, 4)  # clips of two windows, five places
    torch.manual_seed(1)
    wanted = joined(x)
    assert joined.cut is not None
    layout = joined.cut(x)
    assert layout.units == 2 * 5
    torch.manual_seed(1)
    shared = layout.share()
    assert len(shared[0].unique()) == 2  # some clips are dropped
    found = layout.new(x, x.shape)
    for span in ((0, 3), (3, 7), (7, 10)):
        piece = layout.run(joined, layout.take(x, *span), *span, shared)
        layout.put(found, *span, piece)
    torch.testing.assert_close(found, wanted)


# Kept and rebuilt


@every_kind
def test_a_saved_detector_has_them(config: Any, tuning: Tuning, tmp_path: Path) -> None:
    detector: Any = scrambled(spec(config, tuning).build()).eval()
    save_detector(tmp_path, spec(config, tuning), detector)
    loaded_spec, loaded = load_detector(tmp_path)
    assert loaded_spec == spec(config, tuning)
    frames = torch.randint(256, (1, 32, 16, 16, 3), dtype=torch.uint8)
    mask = torch.ones(1, 32, dtype=torch.bool)
    with torch.no_grad():
        found, wanted = (d.backbone(d.normalized(frames)) for d in (loaded, detector))
        assert loaded(frames, mask)
    assert torch.equal(found, wanted)


def test_detectors_saved_before_there_were_any_load(tmp_path: Path) -> None:
    detector = spec(TINY).build()
    save_detector(tmp_path, spec(TINY), detector)
    document = json.loads((tmp_path / SPEC_FILE).read_text())
    assert document.pop("adapters", "") is None
    assert document.pop("lora", "") is None
    (tmp_path / SPEC_FILE).write_text(json.dumps(document))
    assert load_detector(tmp_path)[0] == spec(TINY)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own_adapters_and_timeline(
    copied: Callable[[nn.Module], nn.Module], video: Tensor
) -> None:
    backbone: Any = scrambled(tuned(TINY, ADAPTERS)).eval()
    rewire(backbone)
    wanted = backbone(video)
    other = copied(backbone)
    other(video[:, :, :4])
    assert backbone.timeline.clips == 3
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert torch.equal(other(video), wanted)


def test_the_localizer_begins_alike_behind_all_of_them() -> None:
    states = []
    for tuning in (None, ADAPTERS, LORA):
        torch.manual_seed(3)
        states.append(spec(TINY, tuning).build().localizer.state_dict())
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


# Refusals


@pytest.mark.parametrize(
    ("config", "tuning", "reason"),
    [
        (slowfast_toy(), ADAPTERS, r"slow_path.layer1.1 \(Bottleneck\) has an activation after"),
        (slowfast_toy(), LORA, "have no linear layers of --model.lora.layers all"),
        (swin_toy(), LORA, r"read the weights of features.0.0.attn.qkv, ... and 7 more but do"),
    ],
)
def test_blocks_that_cannot_have_them_are_refused(config: Any, tuning: Tuning, reason: str) -> None:
    asked = replace(spec(config, tuning), size=64)
    with pytest.raises(UserError, match=reason):
        asked.build()


def test_tokens_of_no_time_are_refused(video: Tensor) -> None:
    backbone = tuned(TINY, ADAPTERS)
    block = backbone.encoder.layer[0]
    with pytest.raises(UserError, match=r"tokens \(2, 33, 16\), whose times are unknown"):
        block(torch.zeros(2, 33, 16))  # with one of no place
    with pytest.raises(UserError, match="has adapters already"):
        ADAPTERS.add_to(backbone)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora needs the library peft.*pip install 're2tal\[back"):
        spec(TINY, LORA).build()


def test_both_at_once_and_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one of them or none"):
        replace(spec(TINY, LORA), adapters=ADAPTERS)
    with pytest.raises(ValueError, match=r"AdapterConfig.width must be odd.*but is 4"):
        AdapterConfig(width=4)
    with pytest.raises(ValueError, match=r"LoraConfig.rank must be 1 to"):
        LoraConfig(rank=0)
