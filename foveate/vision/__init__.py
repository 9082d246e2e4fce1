"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.count import multiply_adds
from foveate.vision.windows import RelativePositionBias2d, WindowAttention

__all__ = [
    "Backbone",
    "RelativePositionBias2d",
    "WindowAttention",
    "multiply_adds",
    "parameters_of",
]
