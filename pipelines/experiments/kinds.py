"""Backbones of three libraries, rewired: 49 kinds, each in a small configuration.

The list is fixed: it has the backbones that localization and related tasks use, whether or not they
can be rewired. `README.md` of `re2tal.reversible` shows the table.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import groupby
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.experiments.experiment import Finding, Job, Result, Row, Section, refuse_unknown
from re2tal.memory import measure_activations
from re2tal.precision import Precision, autocast
from re2tal.reversible import rewire, set_reversible, unwire

Built = tuple[nn.Module, tuple[Tensor, ...]]

_IMAGE, _CLIP = (2, 3, 32, 32), (2, 3, 4, 32, 32)


def _torchvision(name: str, shape: Sequence[int] = _IMAGE, **options: Any) -> Built:
    module = import_module("torchvision.models")
    model = module.get_model(name, weights=None, num_classes=3, **options)
    return model, (torch.randn(*shape),)


def _mvit(*, second: bool) -> Built:
    """Make a small MViT v1 or v2 of two resolutions; the library's own need 224 pixels."""
    library = import_module("torchvision.models.video.mvit")
    whole, halved = [1, 1, 1], [1, 2, 2]

    def config(channels: int, out: int, stride: list[int]) -> Any:
        pools = second or stride != whole
        kernel, strides = ([3, 3, 3], stride) if pools else ([], [])
        return library.MSBlockConfig(2, channels, out, kernel, [3, 3, 3], strides, halved)

    between = [config(16, 32, halved)]
    if not second:
        between = [config(16, 32, whole), config(32, 32, halved)]
    blocks = [*[config(16, 16, whole)] * 2, *between, *[config(32, 32, whole)] * 2]
    model = library.MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=blocks,
        residual_pool=second,
        residual_with_cls_embed=not second,
        rel_pos_embed=second,
        proj_after_attn=second,
        num_classes=3,
    )
    return model, (torch.randn(*_CLIP),)


def _timm(name: str, shape: Sequence[int] = _IMAGE, **options: Any) -> Built:
    model = import_module("timm").create_model(name, num_classes=3, **options)
    return model, (torch.randn(*shape),)


def _small(depth: int = 3, width: int = 48, **others: Any) -> dict[str, Any]:
    return {"img_size": 32, "embed_dim": width, "depth": depth, "num_heads": 3, **others}


def _transformers(
    name: str, shape: Sequence[int] = _IMAGE, *, pooled: bool = False, **options: Any
) -> Built:
    """Make a model from a configuration; `pooled` ones without their layer on pooled tokens."""
    library = import_module("transformers")
    config = getattr(library, f"{name}Config")(**options)
    without = {"add_pooling_layer": False} if pooled else {}
    return getattr(library, f"{name}Model")(config, **without), (torch.randn(*shape),)


def _encoder(width: int = 48, layers: int = 3, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "intermediate_size": 2 * width,
        "image_size": 32,
        "patch_size": 8,
        **others,
    }


_FRAMES = (2, 4, 3, 32, 32)
_WINDOWS: dict[str, Any] = {
    "image_size": 64,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


KINDS: dict[str, dict[str, Callable[[], Built]]] = {
    "torchvision": {
        "swin3d_t": partial(_torchvision, "swin3d_t", _CLIP),
        "mvit_v1_b": partial(_mvit, second=False),
        "mvit_v2_s": partial(_mvit, second=True),
        "r3d_18": partial(_torchvision, "r3d_18", (2, 3, 4, 24, 24)),
        "mc3_18": partial(_torchvision, "mc3_18", (2, 3, 4, 24, 24)),
        "r2plus1d_18": partial(_torchvision, "r2plus1d_18", (2, 3, 4, 24, 24)),
        "s3d": partial(_torchvision, "s3d", (1, 3, 16, 224, 224)),
        "swin_t": partial(_torchvision, "swin_t"),
        "swin_v2_t": partial(_torchvision, "swin_v2_t"),
        "maxvit_t": partial(_torchvision, "maxvit_t", (1, 3, 224, 224)),
        "vit_b_16": partial(_torchvision, "vit_b_16", image_size=32),
        "resnet50": partial(_torchvision, "resnet50"),
        "convnext_tiny": partial(_torchvision, "convnext_tiny"),
        "regnet_y_400mf": partial(_torchvision, "regnet_y_400mf"),
        "efficientnet_b0": partial(_torchvision, "efficientnet_b0"),
        "mobilenet_v3_small": partial(_torchvision, "mobilenet_v3_small"),
    },
    "timm": {
        "vit": partial(_timm, "vit_small_patch16_224", **_small()),
        "deit3": partial(_timm, "deit3_small_patch16_224", **_small()),
        "dinov2": partial(_timm, "vit_small_patch14_dinov2", (2, 3, 28, 28), **_small(img_size=28)),
        "dinov3": partial(_timm, "vit_small_patch16_dinov3", **_small()),
        "eva02": partial(_timm, "eva02_tiny_patch14_224", (2, 3, 28, 28), **_small(img_size=28)),
        "beit": partial(_timm, "beit_base_patch16_224", **_small()),
        "cait": partial(_timm, "cait_xxs24_224", **_small()),
        "xcit": partial(_timm, "xcit_nano_12_p16_224", **_small()),
        "mixer": partial(_timm, "gmixer_12_224", img_size=32),
        "swin": partial(
            _timm, "swin_tiny_patch4_window7_224", (2, 3, 56, 56), img_size=56, embed_dim=24
        ),
        "swinv2": partial(
            _timm, "swinv2_tiny_window8_256", (2, 3, 64, 64), img_size=64, embed_dim=24
        ),
        "hiera": partial(_timm, "hiera_tiny_224", (2, 3, 64, 64), img_size=64),
        "mvitv2": partial(_timm, "mvitv2_tiny", (2, 3, 64, 64), img_size=64),
        "davit": partial(_timm, "davit_tiny", (2, 3, 64, 64)),
        "caformer": partial(_timm, "caformer_s18", (2, 3, 64, 64)),
        "convnextv2": partial(_timm, "convnextv2_atto"),
        "resnet50": partial(_timm, "resnet50"),
        "nfnet": partial(_timm, "dm_nfnet_f0", (2, 3, 64, 64)),
    },
    "transformers": {
        "VideoMAE": partial(_transformers, "VideoMAE", _FRAMES, **_encoder(num_frames=4)),
        "ViViT": partial(
            _transformers,
            "Vivit",
            _FRAMES,
            pooled=True,
            **_encoder(num_frames=4, tubelet_size=[2, 8, 8]),
        ),
        "TimeSformer": partial(_transformers, "Timesformer", _FRAMES, **_encoder(num_frames=4)),
        "V-JEPA 2": partial(
            _transformers,
            "VJEPA2",
            _FRAMES,
            crop_size=32,
            patch_size=8,
            frames_per_clip=4,
            hidden_size=48,
            num_attention_heads=2,
            num_hidden_layers=3,
            mlp_ratio=2.0,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=2,
            pred_mlp_ratio=2.0,
        ),
        "ViT": partial(_transformers, "ViT", pooled=True, **_encoder()),
        "DeiT": partial(_transformers, "DeiT", pooled=True, **_encoder()),
        "DINOv2": partial(_transformers, "Dinov2", **_encoder(mlp_ratio=2)),
        "DINOv3": partial(_transformers, "DINOv3ViT", **_encoder()),
        "CLIP": partial(_transformers, "CLIPVision", **_encoder()),
        "SigLIP": partial(_transformers, "SiglipVision", **_encoder()),
        "BEiT": partial(
            _transformers, "Beit", pooled=True, **_encoder(use_relative_position_bias=True)
        ),
        "Swin": partial(_transformers, "Swin", (2, 3, 64, 64), pooled=True, **_WINDOWS),
        "Swin v2": partial(_transformers, "Swinv2", (2, 3, 64, 64), pooled=True, **_WINDOWS),
        "ConvNeXt": partial(
            _transformers, "ConvNext", hidden_sizes=[16, 24, 32, 48], depths=[2, 2, 3, 2]
        ),
        "Hiera": partial(
            _transformers,
            "Hiera",
            (2, 3, 64, 64),
            pooled=True,
            image_size=[64, 64],
            embed_dim=24,
            depths=[1, 2, 3, 2],
        ),
    },
}
"""Functions that make a model and its inputs, by library and kind."""


EQUAL = "equal to the bit"
REFUSED = "not rewired"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kinds:
    """Kinds of backbones that can be rewired.

    Attributes:
        libraries: libraries whose kinds are tried.
    """

    libraries: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        refuse_unknown("library", self.libraries, KINDS)

    def jobs(self) -> Sequence[Job]:
        """List one job a kind."""
        return [
            Job(
                name=f"{library}: {kind}",
                work=row_of_a_process,
                arguments={"library": library, "kind": kind},
            )
            for library in self.libraries
            for kind in KINDS[library]
        ]

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report on all kinds."""
        rows: list[Row] = list(results.values())
        done = [row for row in rows if row["strict loading"] == "yes"]
        equal = [row for row in done if row["fp32"] == row["bf16"] == EQUAL]
        return Section(
            title="Kinds of backbones that can be rewired",
            text=(
                "Small configurations with random weights, in training mode, one step each. "
                "Gradients of all parameters with rebuilt activations are compared with those with "
                "stored ones, in float32 and with branches in bfloat16. Activations are the peak "
                "of all tensors except parameters and gradients, in float32, relative to the plain "
                "model; the next column includes parameters and gradients. Inputs are so small "
                "that weights dominate: activations are above 1 where plain training stores less "
                "than the gradients of a whole branch, which exist at once here, or where most "
                "stages have a single branch."
            ),
            tables={"": rows},
            findings=[
                Finding(
                    claim="at least 40 of 49 kinds can be rewired, with equal gradients",
                    holds=len(equal) >= 40 if len(rows) >= 49 else None,
                    evidence=f"{len(done)} of {len(rows)} are rewired, {len(equal)} are equal",
                )
            ],
        )


def row_of_a_process(library: str, kind: str) -> Row:
    """Call `rewired_row` in a separate process, whose memory is freed when it ends."""
    context = get_context("forkserver")  # libraries are imported once, in the server
    context.set_forkserver_preload([*_IMPORTED, __name__])
    with ProcessPoolExecutor(
        1,
        mp_context=context,
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    ) as pool:
        return pool.submit(rewired_row, library, kind).result()


_IMPORTED = ("torchvision.models", "timm", "transformers")


def rewired_row(library: str, kind: str) -> Row:
    """Rewire a kind, compare its gradients, and measure its memory."""
    torch.manual_seed(0)
    model, inputs = KINDS[library][kind]()
    model.train()
    row = {"library": library, "model": kind}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        report = rewire(model)
    except ValueError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:-1]]
        # the first reason about a block of a known family, if there is one
        reason = max(reasons, key=lambda line: "no family" not in line)
        return row | {"reversible": f"{REFUSED}: {reason}"} | dict.fromkeys(_MEASURED, "")
    unwire(model)
    plain = measure_activations(model, *inputs, step=_loss)
    rewire(model)
    ours = measure_activations(model, *inputs, step=_loss)
    model.load_state_dict(state, strict=True)
    kinds = groupby(sorted(report.stages, key=lambda stage: stage.kind), key=lambda s: s.kind)
    counts = [
        f"{sum(len(stage.blocks) for stage in found)} {name}"
        for name, found in ((name, list(found)) for name, found in kinds)
    ]
    measured = (
        sum(stage.branches for stage in report.stages),
        "yes",
        _compared(model, inputs, "float32"),
        _compared(model, inputs, "bfloat16"),
        round(ours.activations / plain.activations, 2),
        round(ours.peak / plain.peak, 2),
    )
    return row | {"reversible": ", ".join(counts)} | dict(zip(_MEASURED, measured, strict=True))


_MEASURED = (
    "branches",
    "strict loading",
    "fp32",
    "bf16",
    "activations, of plain",
    "peak, of plain",
)


def _compared(model: nn.Module, inputs: Sequence[Tensor], precision: Precision) -> str:
    """Compare gradients of rebuilt activations with those of stored ones."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = []
    for reversible in (False, True):
        set_reversible(model, reversible)
        model.load_state_dict(buffers, strict=False)
        model.zero_grad()
        torch.manual_seed(1)
        with autocast("cpu", precision):
            loss = _loss(model, *inputs)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    differ = 0
    for stored, rebuilt in zip(*found, strict=True):
        if stored is None or rebuilt is None:
            differ += stored is not rebuilt
        else:
            differ += not torch.equal(stored, rebuilt)
    return EQUAL if not differ else f"{differ} of {len(found[0])} differ"


def _loss(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Compute a loss that weights every output differently."""
    output = model(*inputs)
    output = getattr(output, "predictor_output", None) or output
    y = output if isinstance(output, Tensor) else output.last_hidden_state
    weights = torch.linspace(0.5, 1.5, y.numel()).view_as(y)
    return (y.float() * weights).pow(2).mean()
