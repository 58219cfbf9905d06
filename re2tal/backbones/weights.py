"""Backbone weights: reading, recognition of the layout by names, checks, conversion, writing.

    file                                          layout
    torchvision's, ours                           (as they are)
    mmaction2's, and the Video Swin authors'      `swin.py`
    OpenTAD's Re2Swin                             `swin.py`
    mmaction2's SlowFast                          `slowfast/published.py`
    PyTorchVideo's SlowFast                       `slowfast/published.py`
    OpenTAD's Re2SlowFast                         `slowfast/published.py`
    VideoMAE of transformers, also a folder       `videomae.py`
    VideoMAE of its authors and of mmaction2      `videomae.py`
    V-JEPA 2 of transformers, also a folder       `vjepa2.py`
    V-JEPA 2 of its authors                       `vjepa2.py`
    ViViT of transformers, also a folder          `vivit.py`
    TimeSformer of transformers, also a folder    `timesformer.py`
    TimeSformer of its authors                    `timesformer.py`
    InternVideo2 of its authors                   `internvideo2.py`
    image transformers of timm                    `frames.py`

Names, shapes and computations follow the sources of these libraries (mmaction2 1.2,
Video-Swin-Transformer at db018fb, PyTorchVideo at f3142bb, OpenTAD at 3dd7b03, VideoMAE at cece388,
InternVideo at 3965eef, V-JEPA 2 at c2963a4, transformers 5.23). The published files themselves were
not available: a file that differs from its library's source is refused, with a list of the
differences.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model_weights

from re2tal.atomic import replacing
from re2tal.backbones.table import Layout, backbones
from re2tal.weights import WeightsMismatchError, WeightsReport, read_tensors

CLASSIFIER = "of the classifier"
_OUTSIDE = "not of the backbone"
_COMPUTED = "computed by the backbone"
_UNUSED = "not used by this backbone"
PREFIX = "torchvision:"
HUB = "hf:"
NAMED = (PREFIX, HUB)
"""Prefixes of names of weights, as opposed to paths."""

# File names of a whole model of transformers.
_WHOLE = ("model.safetensors", "pytorch_model.bin")


def torchvision_weights(name: str) -> dict[str, Tensor]:
    """Return weights of torchvision, downloaded the first time into the cache of `torch.hub`.

    Args:
        name: `torchvision:MODEL/WEIGHTS`, such as `torchvision:swin3d_t/KINETICS400_V1`.

    Raises:
        ValueError: there are no weights of this name (the message lists those that exist), or they
            cannot be downloaded.
    """
    model, _, wanted = name.removeprefix(PREFIX).partition("/")
    try:
        known = get_model_weights(model)
    except ValueError as error:
        raise ValueError(
            f"torchvision has no model {model!r}, which {name} names. Video Swins are called "
            "swin3d_t, swin3d_s and swin3d_b."
        ) from error
    if wanted not in known.__members__:
        listed = ", ".join(f"{PREFIX}{model}/{key}" for key in known.__members__)
        raise ValueError(f"torchvision has no weights {name}, but {listed}.")
    weights = known[wanted]
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError) as error:  # no network, or another file than promised
        raise ValueError(
            f"{name} cannot be downloaded from {weights.url}: {error}. Without a network, copy the "
            f"file to {torch.hub.get_dir()}/checkpoints, or give its path instead of its name."
        ) from error
    return state


def hub_weights(name: str) -> dict[str, Tensor]:
    """Return weights of the Hugging Face Hub, downloaded the first time into its own cache.

    Only the file of tensors is fetched, no code beside it.

    Args:
        name: `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`, such as `hf:MCG-NJU/videomae-base`.

    Raises:
        ValueError: there are no weights of this name, or they cannot be downloaded.
    """
    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"{name} cannot be downloaded without huggingface_hub ({error}): pip install "
            "'re2tal[backbones]', or give the path of the file instead of its name."
        ) from error
    missing: list[Exception] = []
    for file in _WHOLE:
        try:
            found = hf_hub_download(repository, file, revision=revision or None)
        except EntryNotFoundError as error:  # not in the repository, or offline: not in the cache
            missing.append(error)
        except (OSError, ValueError) as error:  # unknown model or invalid name
            missing.append(error)
            break
        else:
            return read_tensors(Path(found))
    raise ValueError(
        f"{name} cannot be downloaded: {missing[0]} Without a network, give the path of a folder "
        f"with {' or '.join(_WHOLE)} instead of its name."
    )


def _of_folder(folder: Path) -> dict[str, Tensor]:
    """Read a folder that transformers' `save_pretrained` wrote, with one file or several."""
    for name in _WHOLE:
        parts = [folder / name] if (folder / name).is_file() else []
        stem, _, end = name.partition(".")
        parts = parts or sorted(folder.glob(f"{stem}-*-of-*.{end}"))
        if parts:
            return {name: value for part in parts for name, value in read_tensors(part).items()}
    raise ValueError(
        f"The weights in {folder} cannot be read: the folder has neither {' nor '.join(_WHOLE)}."
    )


def _read(source: str | Path) -> dict[str, Tensor]:
    if str(source).startswith(PREFIX):
        return torchvision_weights(str(source))
    if str(source).startswith(HUB):
        return hub_weights(str(source))
    path = Path(source)
    return _of_folder(path) if path.is_dir() else read_tensors(path)


_OWN = Layout(
    title="names of this backbone",
    mark=re.compile(r"(?!)"),  # a file without any mark is ours
    rename=lambda name: name,
    classifier=re.compile(r"(?:head|fc)\."),  # in torchvision's files
)


def load_backbone_weights(backbone: nn.Module, source: str | Path) -> WeightsReport:
    """Load weights into a backbone, rewired or not: rewiring keeps all names.

    Args:
        backbone: module that receives the weights.
        source: file as for `read_tensors`; a folder that transformers' `save_pretrained` wrote; or
            the name of weights of torchvision or the Hugging Face Hub, such as
            `torchvision:swin3d_t/KINETICS400_V1` and `hf:MCG-NJU/videomae-base`. Our names,
            torchvision's and those of every layout in the table of backbones are recognised.

    Raises:
        ValueError: the source cannot be read, or weights are missing, unknown or of another shape:
            then a `WeightsMismatchError` lists all of them, and nothing is loaded.
    """
    published: Mapping[str, Tensor] = _read(source)
    try:
        layout, prefix = _recognise(tuple(published))
        published = _split(published, layout, prefix)
    except ValueError as error:
        raise ValueError(f"The weights in {source} cannot be used: {error}.") from error
    shown = "" if layout is _OWN else f" (recognised as: {layout.title})"
    state, report = _converted(
        published, layout, prefix, backbone, what=f"The weights in {source}{shown}"
    )
    backbone.load_state_dict(state)
    return report


def save_backbone_weights(
    backbone: nn.Module, path: str | Path, metadata: Mapping[str, str]
) -> None:
    """Write a backbone's weights as safetensors, under another name until the file is complete.

    Args:
        backbone: module whose weights are written.
        path: path of the file; an existing file is replaced.
        metadata: facts stored with the weights, such as the command and its results.
    """
    state = {name: v.detach().cpu().contiguous() for name, v in backbone.state_dict().items()}
    with replacing(path) as partial:
        save_file(state, partial, metadata=dict(metadata))


def _recognise(names: Sequence[str]) -> tuple[Layout, str]:
    """Find the layout of a file from the names of its weights, and the prefix of these names."""
    layouts = dict.fromkeys(layout for entry in backbones().values() for layout in entry.layouts)
    known = set(names)
    found = [
        (layout, match[1])
        for layout in layouts
        for name in names
        if (match := layout.mark.fullmatch(name))
        and (layout.beside is None or match[1] + layout.beside in known)
    ]
    # at one prefix, a layout with a second name takes precedence over one without
    closer = {prefix for layout, prefix in found if layout.beside is not None}
    found = [(layout, at) for layout, at in found if layout.beside is not None or at not in closer]
    if len(found) > 1:
        listed = ", ".join(f"{layout.title} at {prefix!r}" for layout, prefix in found)
        raise ValueError(f"it holds several backbones: {listed}. Keep the weights of one")
    return found[0] if found else (_OWN, "")


def _split(published: Mapping[str, Tensor], layout: Layout, prefix: str) -> Mapping[str, Tensor]:
    """Split each fused weight into three, under names with an index."""
    if layout.fused is None:
        return published
    parts: dict[str, Tensor] = {}
    for name, value in published.items():
        if name.startswith(prefix) and layout.fused.fullmatch(name.removeprefix(prefix)):
            if len(value) % 3:
                raise ValueError(f"{name} has {len(value)} rows, which is not a multiple of three")
            parts |= {f"{name}[{index}]": part for index, part in enumerate(value.chunk(3))}
        else:
            parts[name] = value
    return parts


def _converted(
    published: Mapping[str, Tensor], layout: Layout, prefix: str, backbone: nn.Module, what: str
) -> tuple[dict[str, Tensor], WeightsReport]:
    """Return the backbone's weights and buffers by our names, and the report."""
    placed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    problems: list[str] = []
    own = backbone.state_dict()
    for name in published:
        inner = name.removeprefix(prefix)
        outside = layout.outside is not None and layout.outside.fullmatch(inner)
        if outside or not name.startswith(prefix):
            left_out[name] = _OUTSIDE
        elif layout.classifier is not None and layout.classifier.match(inner) and inner not in own:
            left_out[name] = CLASSIFIER
        elif layout.computed is not None and layout.computed.fullmatch(inner):
            left_out[name] = _COMPUTED
        elif ours := layout.rename(inner):
            if ours not in own and layout.optional is not None and layout.optional.fullmatch(ours):
                left_out[name] = _UNUSED
            else:
                placed[name] = ours
        else:
            problems.append(f"{name} is unknown")
    kept = sorted(n for n in own.keys() - placed.values() if n.endswith(layout.may_lack))
    problems += _mismatches(own, placed, published, kept)
    given = {ours: published[name] for name, ours in placed.items()}
    given |= {name.removeprefix(prefix): published[name] for name in left_out}
    if objection := layout.objection(backbone, given):
        problems.insert(0, objection)
    if problems:
        raise WeightsMismatchError(what, backbone, problems)
    state = {ours: published[theirs] for theirs, ours in placed.items()}
    state |= {name: own[name] for name in kept}
    return state, WeightsReport(
        layout=layout.title,
        placed=placed,
        left_out=left_out,
        kept=kept,
        note=layout.note,
        mean=layout.mean,
        std=layout.std,
    )


def _mismatches(
    own: Mapping[str, Tensor],
    placed: Mapping[str, str],
    published: Mapping[str, Tensor],
    kept: Sequence[str],
) -> Iterator[str]:
    times = Counter(placed.values())
    theirs = {ours: name for name, ours in placed.items()}
    for ours in sorted((own.keys() | theirs.keys()) - set(kept)):
        if ours not in theirs:
            yield f"{ours} is missing"
            continue
        name = theirs[ours]
        called = name if name == ours else f"{name} (here {ours})"
        if ours not in own:
            yield f"{called} is unknown"
        elif times[ours] > 1:
            yield f"{called} is there {times[ours]} times, under different names"
        elif own[ours].shape != published[name].shape:
            shapes = tuple(published[name].shape), tuple(own[ours].shape)
            yield f"{called} has shape {shapes[0]} instead of {shapes[1]}"
