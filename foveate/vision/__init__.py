"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.count import multiply_adds
from foveate.vision.halonet import (
    HaloAttention,
    HaloBlock,
    HaloNet,
    HaloStage,
    halonet26t,
    halonet50ts,
    halonet_from_timm,
    halonet_h0,
    halonet_h1,
    halonet_h2,
    halonet_h3,
    halonet_h4,
    halonet_h5,
    halonet_h6,
    halonet_h7,
    sehalonet33ts,
)
from foveate.vision.medvit import (
    FasterKAN,
    GlobalBlock,
    LocalBlock,
    MedViTV2,
    NeighborhoodAttention2d,
    PooledKeyAttention,
    medvit_v2_base,
    medvit_v2_large,
    medvit_v2_small,
    medvit_v2_tiny,
)
from foveate.vision.tic import SelfAttentionConv2d, shifts, stencil_attention
from foveate.vision.windows import RelativePositionBias2d, WindowAttention

__all__ = [
    "Backbone",
    "FasterKAN",
    "GlobalBlock",
    "HaloAttention",
    "HaloBlock",
    "HaloNet",
    "HaloStage",
    "LocalBlock",
    "MedViTV2",
    "NeighborhoodAttention2d",
    "PooledKeyAttention",
    "RelativePositionBias2d",
    "SelfAttentionConv2d",
    "WindowAttention",
    "halonet26t",
    "halonet50ts",
    "halonet_from_timm",
    "halonet_h0",
    "halonet_h1",
    "halonet_h2",
    "halonet_h3",
    "halonet_h4",
    "halonet_h5",
    "halonet_h6",
    "halonet_h7",
    "medvit_v2_base",
    "medvit_v2_large",
    "medvit_v2_small",
    "medvit_v2_tiny",
    "multiply_adds",
    "parameters_of",
    "sehalonet33ts",
    "shifts",
    "stencil_attention",
]
