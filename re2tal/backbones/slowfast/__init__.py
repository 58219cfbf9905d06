"""SlowFast (Feichtenhofer et al., ICCV 2019, arXiv 1812.03982), without mmaction2.

Importing it tells `re2tal.rewire` how its blocks split into branches.
"""

import re2tal.reversible.families.slowfast  # noqa: F401
from re2tal.backbones.slowfast.network import (
    SlowFastBackbone,
    SlowFastConfig,
    slowfast_50,
    slowfast_101,
    slowfast_toy,
)
from re2tal.backbones.slowfast.weights import convert_weights, published_weights

__all__ = [
    "SlowFastBackbone",
    "SlowFastConfig",
    "convert_weights",
    "published_weights",
    "slowfast_50",
    "slowfast_101",
    "slowfast_toy",
]
