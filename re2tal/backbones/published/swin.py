"""Video Swins of mmaction2, of the paper's authors, and OpenTAD's Re2Swin.

torchvision's network is theirs, so weights are renamed and nothing else. That was read in the
sources: patch merging concatenates its four neighbours in the same order, the rows of the relative
position table and of `qkv` have the same one, and norms have the same epsilon.

OpenTAD's blocks have two functions, F (attention) and G (the MLP), whose sums run over two
streams, ``y1 = x1 + F(x2); y2 = x2 + G(y1)``: the same as ours when rewired.
"""

import re

from re2tal.backbones.published.layout import Layout

_POSITIONS = "relative_position_index"
# torchvision's MLP is a sequence: linear, GELU, dropout, linear, dropout.
_LAYERS = {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}

_STEM = re.compile(r"patch_embed\.(?:proj|norm)\.(?:weight|bias)")
_NORM = re.compile(r"norm3?\.(weight|bias)")  # 3: mmaction2's, of its fourth stage
_MERGING = re.compile(r"layers\.(\d+)\.downsample\.(norm|reduction)\.(weight|bias)")
_PLAIN = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.((?:norm1|attn|norm2|mlp)\..+)")
_COUPLED = re.compile(
    r"layers\.(\d+)\.blocks\.(\d+)\.inv_block\.(?:Fm\.((?:norm1|attn)\..+)|Gm\.((?:norm2|mlp)\..+))"
)


def _around(name: str) -> str | None:
    """Our name of a weight that is in no block."""
    if _STEM.fullmatch(name):
        return name
    if match := _NORM.fullmatch(name):
        return f"norm.{match[1]}"
    if match := _MERGING.fullmatch(name):
        # stages and the mergings between them take turns
        return f"features.{2 * int(match[1]) + 1}.{match[2]}.{match[3]}"
    return None


def _in_block(stage: str, block: str, part: str) -> str:
    layer, _, leaf = part.rpartition(".")
    return f"features.{2 * int(stage)}.{block}.{_LAYERS.get(layer, layer)}.{leaf}"


def _plain(name: str) -> str | None:
    match = _PLAIN.fullmatch(name)
    return _in_block(match[1], match[2], match[3]) if match else _around(name)


def _coupled(name: str) -> str | None:
    match = _COUPLED.fullmatch(name)
    return _in_block(match[1], match[2], match[3] or match[4]) if match else _around(name)


VIDEO_SWIN = Layout(
    title="Video Swin of mmaction2 or of its authors",
    mark=re.compile(r"(|.*\.)layers\.0\.blocks\.0\.attn\.qkv\.weight"),
    rename=_plain,
    may_lack=(_POSITIONS,),
)

OPENTAD_SWIN = Layout(
    title="OpenTAD's Re2Swin",
    mark=re.compile(r"(|.*\.)layers\.0\.blocks\.0\.inv_block\.Fm\.attn\.qkv\.weight"),
    rename=_coupled,
    may_lack=(_POSITIONS,),
    note="They were finetuned in the rewired network: rewire the backbone.",
)
