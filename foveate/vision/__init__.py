"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.count import multiply_adds
from foveate.vision.crossformer import (
    CrossFormer,
    CrossFormerBlock,
    CrossScaleEmbed,
    DynamicPositionBias,
    LSDAttention,
    crossformer_base,
    crossformer_from_official,
    crossformer_large,
    crossformer_pp_small,
    crossformer_small,
    crossformer_tiny,
)
from foveate.vision.explain import WindowReach, explain_window
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
from foveate.vision.vwa import VaryingWindowAttention, VWFormerDecoder, context_places
from foveate.vision.windows import RelativePositionBias2d, WindowAttention

__all__ = [
    "Backbone",
    "BlockAttention",
    "CrossFormer",
    "CrossFormerBlock",
    "CrossScaleEmbed",
    "DynamicPositionBias",
    "GridAttention",
    "LSDAttention",
    "MBConv",
    "MaxViT",
    "MaxViTBlock",
    "PatchMerging",
    "RelativePositionBias2d",
    "ShiftedWindowAttention",
    "Swin",
    "SwinBlock",
    "SwinVSA",
    "VSABlock",
    "VWFormerDecoder",
    "VariedSizeWindowAttention",
    "VaryingWindowAttention",
    "WindowAttention",
    "WindowReach",
    "context_places",
    "crossformer_base",
    "crossformer_from_official",
    "crossformer_large",
    "crossformer_pp_small",
    "crossformer_small",
    "crossformer_tiny",
    "explain_window",
    "maxvit_base",
    "maxvit_from_timm",
    "maxvit_large",
    "maxvit_small",
    "maxvit_tiny",
    "maxvit_xlarge",
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
