"""Write `data/tridet.safetensors`: what the public implementation of TriDet computes.

It needs a checkout of that implementation, which is no part of this repository:

  python tests/localizers/published_tridet.py CHECKOUT

The weights are random, the windows two whole ones.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

SETTINGS: dict[str, Any] = {
    "backbone_type": "SGP",
    "fpn_type": "identity",
    "backbone_arch": (2, 1, 2),
    "scale_factor": 2,
    "input_dim": 6,
    "max_seq_len": 32,
    "max_buffer_len_factor": 1.0,
    "n_sgp_win_size": 3,
    "embd_kernel_size": 3,
    "embd_dim": 32,
    "embd_with_ln": True,
    "fpn_dim": 32,
    "sgp_mlp_dim": 24,
    "fpn_with_ln": True,
    "head_dim": 8,
    "regression_range": [(0, 4), (4, 8), (8, 10000)],
    "head_num_layers": 3,
    "head_kernel_size": 3,
    "boudary_kernel_size": 3,
    "head_with_ln": True,
    "use_abs_pe": False,
    "num_bins": 4,
    "iou_weight_power": 0.5,
    "downsample_type": "max",
    "input_noise": 0.0,
    "k": 1.5,
    "init_conv_vars": 0.3,
    "use_trident_head": True,
    "num_classes": 2,
    "train_cfg": {
        "center_sample": "radius",
        "center_sample_radius": 1.5,
        "loss_weight": 2.0,
        "cls_prior_prob": 0.01,
        "dropout": 0.0,
        "droppath": 0.1,
        "label_smoothing": 0.1,
        "head_empty_cls": [],
        "init_loss_norm": 20.0,
    },
    "test_cfg": {
        "pre_nms_thresh": 0.05,
        "pre_nms_topk": 15,
        "iou_threshold": 0.1,
        "min_score": 0.0,
        "max_seg_num": 1000,
        "nms_method": "none",
        "duration_thresh": 1.0,
        "multiclass_nms": True,
        "nms_sigma": 0.5,
        "voting_thresh": 0.0,
    },
}
SEGMENTS = torch.tensor([[2.0, 6.5], [8.0, 20.0], [8.0, 20.0]])
LABELS = torch.tensor([1, 0, 1])


def main(checkout: str, path: Path) -> None:
    """Run the public implementation on random weights and write what it computes."""
    sys.path.insert(0, checkout)
    # Its suppression is compiled, and not called here.
    utilities: Any = ModuleType("libs.utils")
    utilities.batched_nms = None
    sys.modules["libs.utils"] = utilities
    torch.manual_seed(0)
    model: Any = import_module("libs.modeling.meta_archs").TriDet(**SETTINGS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".scale") and "drop_path" in name:
                parameter.fill_(0.5)
            parameter.add_(0.2 * torch.randn_like(parameter))
        for head in (model.cls_head, model.start_head, model.end_head):
            head.cls_head.conv.bias.add_(4)  # scores on both sides of one half
    model.eval()
    features = torch.randn(2, 6, 32)
    videos = [
        {
            "feats": window,
            "segments": SEGMENTS[: 3 - 2 * i],
            "labels": LABELS[: 3 - 2 * i],
            **dict.fromkeys(("video_id", "fps", "duration", "feat_stride", "feat_num_frames"), 1),
        }
        for i, window in enumerate(features)
    ]
    written = {f"module.{name}": value.clone() for name, value in model.state_dict().items()}
    written = {name: value for name, value in written.items() if "point_generator" not in name}
    whole = torch.ones(2, 32, dtype=torch.bool)
    levels = torch.ones(2, 32 + 16 + 8, dtype=torch.bool)
    written |= {"features": features, "mask": whole, "valid": levels}
    model.postprocessing = lambda results: results
    for i, video in enumerate(videos):
        with torch.no_grad():
            (found,) = model([video])
        written |= {f"found.{i}.{name}": found[name] for name in ("segments", "scores", "labels")}
        written |= {f"{name}.{i}": video[name] for name in ("segments", "labels")}
    decode, losses = model.decode_offset, model.losses

    def decode_and_keep(*arguments: Any) -> Any:
        written["offsets"] = decode(*arguments)
        return written["offsets"]

    def losses_and_keep(masks: Any, logits: Any, *arguments: Any) -> Any:
        written["logits"] = torch.cat(logits, dim=1)
        return losses(masks, logits, *arguments)

    model.decode_offset, model.losses = decode_and_keep, losses_and_keep
    model.training = True  # alone: its parts stay without randomness
    terms = model(videos)
    written |= {
        "classification": terms["cls_loss"],
        "regression": terms["reg_loss"],
        "total": terms["final_loss"],
        "normalizer": torch.tensor(model.loss_normalizer),
    }
    save_file({name: value.detach().clone().contiguous() for name, value in written.items()}, path)


if __name__ == "__main__":
    main(sys.argv[1], Path(__file__).parent / "data" / "tridet.safetensors")
