"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.count import multiply_adds
from foveate.vision.explain import WindowReach, explain_window
from foveate.vision.swin import (
    PatchMerging,
    ShiftedWindowAttention,
    Swin,
    SwinBlock,
    swin_base,
    swin_from_timm,
    swin_from_transformers,
    swin_large,
    swin_small,
    swin_tiny,
)
from foveate.vision.vsa import SwinVSA, VariedSizeWindowAttention, VSABlock, swin_vsa_small, swin_vsa_tiny
from foveate.vision.windows import RelativePositionBias2d, WindowAttention

__all__ = [
    "Backbone",
    "PatchMerging",
    "RelativePositionBias2d",
    "ShiftedWindowAttention",
    "Swin",
    "SwinBlock",
    "SwinVSA",
    "VSABlock",
    "VariedSizeWindowAttention",
    "WindowAttention",
    "WindowReach",
    "explain_window",
    "multiply_adds",
    "parameters_of",
    "swin_base",
    "swin_from_timm",
    "swin_from_transformers",
    "swin_large",
    "swin_small",
    "swin_tiny",
    "swin_vsa_small",
    "swin_vsa_tiny",
]
