"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.count import multiply_adds
from foveate.vision.maxvit import (
    BlockAttention,
    GridAttention,
    MaxViT,
    MaxViTBlock,
    MBConv,
    maxvit_base,
    maxvit_from_timm,
    maxvit_large,
    maxvit_small,
    maxvit_tiny,
    maxvit_xlarge,
)
from foveate.vision.windows import RelativePositionBias2d, WindowAttention

__all__ = [
    "Backbone",
    "BlockAttention",
    "GridAttention",
    "MBConv",
    "MaxViT",
    "MaxViTBlock",
    "RelativePositionBias2d",
    "WindowAttention",
    "maxvit_base",
    "maxvit_from_timm",
    "maxvit_large",
    "maxvit_small",
    "maxvit_tiny",
    "maxvit_xlarge",
    "multiply_adds",
    "parameters_of",
]
