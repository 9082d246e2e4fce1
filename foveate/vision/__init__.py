"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.count import multiply_adds
from foveate.vision.smt import (
    SMT,
    ConvMlp,
    ConvValueAttention,
    ScaleAwareModulation,
    SMTBlock,
    smt_base,
    smt_large,
    smt_small,
    smt_tiny,
)
from foveate.vision.windows import RelativePositionBias2d, WindowAttention

__all__ = [
    "SMT",
    "Backbone",
    "ConvMlp",
    "ConvValueAttention",
    "RelativePositionBias2d",
    "SMTBlock",
    "ScaleAwareModulation",
    "WindowAttention",
    "multiply_adds",
    "parameters_of",
    "smt_base",
    "smt_large",
    "smt_small",
    "smt_tiny",
]
