"""Train a pretrained residual network without storing the activations of its stages.

See README.md in this folder for what the pieces are and how to add a family of blocks.
"""

from re2tal.reversible.branches import Branch, NotReversibleError, branches
from re2tal.reversible.engine import ReversibleError, ReversibleSequential
from re2tal.reversible.report import RewireReport
from re2tal.reversible.rewire import (
    reversible_stages,
    rewire,
    set_coupling,
    set_reversible,
    unwire,
)
from re2tal.reversible.streams import Coupling

__all__ = [
    "Branch",
    "Coupling",
    "NotReversibleError",
    "ReversibleError",
    "ReversibleSequential",
    "RewireReport",
    "branches",
    "reversible_stages",
    "rewire",
    "set_coupling",
    "set_reversible",
    "unwire",
]
