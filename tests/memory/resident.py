"""Run in a fresh process: how much its resident memory grows over a real step.

Prints a JSON object with `predicted` and `measured`, bytes beyond the model and its inputs.
"""

import json
import sys

import psutil
import torch

import re2tal
from re2tal.backbones.swin import SwinConfig
from re2tal.memory import MemoryMeter, predict_peak


def main(way: str, frames: int, size: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Wide enough that activations outweigh what libraries allocate for themselves.
    model = SwinConfig(embed_dim=48, depths=(2, 4), heads=(3, 6), drop_path=0.0).build()
    if way == "ours":
        re2tal.rewire(model, slice_bytes=8 * 2**20)
    small, x = torch.randn(1, 3, 16, 56, 56), torch.randn(1, 3, frames, size, size)
    memory = predict_peak(model, x)
    model(small).sum().backward()  # code is paged in, kernels are made
    model.zero_grad(set_to_none=True)
    before = psutil.Process().memory_info().rss
    with MemoryMeter() as meter:
        model(x).sum().backward()
    kept = memory.parameters + memory.buffers + memory.inputs
    found = {"predicted": memory.peak - kept, "measured": meter.rss_peak - before}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
