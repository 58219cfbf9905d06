"""Train a pretrained residual network without storing the activations of its stages.

The README.md in this folder describes the files, and how to add a family of blocks.
"""

from re2tal.reversible.branches import (
    Branch,
    ChangesShapeError,
    NotReversibleError,
    branches,
    recomputed,
    returned,
)
from re2tal.reversible.containers import ReversibleModuleList, ReversibleSequential
from re2tal.reversible.controls import (
    CouplingSchedule,
    check,
    reconstruction_errors,
    reversible_stages,
    set_coupling,
    set_reversible,
    set_slice_bytes,
    stage_modes,
)
from re2tal.reversible.convolutions import correct_gradients
from re2tal.reversible.coupling import AtLeast, Coupling
from re2tal.reversible.layouts import BySample, ByToken
from re2tal.reversible.replay import ReversibleError
from re2tal.reversible.rewire import RewireReport, rewire, unwire
from re2tal.reversible.tensors import part_of, rebuildable, spent

__all__ = [
    "AtLeast",
    "Branch",
    "BySample",
    "ByToken",
    "ChangesShapeError",
    "Coupling",
    "CouplingSchedule",
    "NotReversibleError",
    "ReversibleError",
    "ReversibleModuleList",
    "ReversibleSequential",
    "RewireReport",
    "branches",
    "check",
    "part_of",
    "rebuildable",
    "recomputed",
    "reconstruction_errors",
    "returned",
    "reversible_stages",
    "rewire",
    "set_coupling",
    "set_reversible",
    "set_slice_bytes",
    "spent",
    "stage_modes",
    "unwire",
]

correct_gradients()
