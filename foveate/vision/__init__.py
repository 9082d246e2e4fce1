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
from foveate.vision.catanet import (
    CATANet,
    OverlapPatchAttention,
    OverlapPatchBlock,
    SortedClusters,
    TokenAggregationAttention,
    TokenAggregationBlock,
    TokenCentres,
    catanet_x2,
    catanet_x3,
    catanet_x4,
)
from foveate.vision.count import multiply_adds
from foveate.vision.explain import WindowReach, explain_window
from foveate.vision.sparsifiner import (
    LowRankConnectivity,
    Sparsifiner,
    SparsifinerAttention,
    SparsifinerBlock,
    reconstruct_attention,
    sparsifiner_small,
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
from foveate.vision.windows import RelativePositionBias2d, WindowAttention

__all__ = [
    "Backbone",
    "BiFormer",
    "BiFormerBlock",
    "BiLevelRoutingAttention",
    "CATANet",
    "InputPositionAttention",
    "LowRankConnectivity",
    "OverlapPatchAttention",
    "OverlapPatchBlock",
    "PatchMerging",
    "RelativePositionBias2d",
    "ShiftedWindowAttention",
    "SortedClusters",
    "Sparsifiner",
    "SparsifinerAttention",
    "SparsifinerBlock",
    "Swin",
    "SwinBlock",
    "SwinVSA",
    "TokenAggregationAttention",
    "TokenAggregationBlock",
    "TokenCentres",
    "VSABlock",
    "VariedSizeWindowAttention",
    "WindowAttention",
    "WindowReach",
    "biformer_base",
    "biformer_small",
    "biformer_stl",
    "biformer_tiny",
    "catanet_x2",
    "catanet_x3",
    "catanet_x4",
    "convert_biformer",
    "explain_window",
    "multiply_adds",
    "parameters_of",
    "reconstruct_attention",
    "sparsifiner_small",
    "swin_base",
    "swin_from_timm",
    "swin_from_transformers",
    "swin_large",
    "swin_small",
    "swin_tiny",
    "swin_vsa_small",
    "swin_vsa_tiny",
]
