"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.biformer import (
    BiFormer,
    BiFormerBlock,
    BiLevelRoutingAttention,
    InputPositionAttention,
    biformer_base,
    biformer_small,
    biformer_stl,
    biformer_tiny,
    convert_biformer,
)
from foveate.vision.count import multiply_adds
from foveate.vision.sparsifiner import (
    LowRankConnectivity,
    Sparsifiner,
    SparsifinerAttention,
    SparsifinerBlock,
    reconstruct_attention,
    sparsifiner_small,
)
from foveate.vision.windows import RelativePositionBias2d, WindowAttention

__all__ = [
    "Backbone",
    "BiFormer",
    "BiFormerBlock",
    "BiLevelRoutingAttention",
    "InputPositionAttention",
    "LowRankConnectivity",
    "RelativePositionBias2d",
    "Sparsifiner",
    "SparsifinerAttention",
    "SparsifinerBlock",
    "WindowAttention",
    "biformer_base",
    "biformer_small",
    "biformer_stl",
    "biformer_tiny",
    "convert_biformer",
    "multiply_adds",
    "parameters_of",
    "reconstruct_attention",
    "sparsifiner_small",
]
