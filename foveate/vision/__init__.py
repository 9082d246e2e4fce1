"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.count import multiply_adds
from foveate.vision.davit import (
    ChannelGroupAttention,
    DaViT,
    DualAttentionLayer,
    davit_base,
    davit_base_fl,
    davit_giant,
    davit_huge,
    davit_huge_fl,
    davit_large,
    davit_small,
    davit_state,
    davit_tiny,
)
from foveate.vision.gcvit import (
    GCViT,
    GlobalQueryGenerator,
    GlobalWindowAttention,
    gcvit_base,
    gcvit_large,
    gcvit_small,
    gcvit_state,
    gcvit_tiny,
    gcvit_xtiny,
    gcvit_xxtiny,
)
from foveate.vision.shvit import (
    SHViT,
    SingleHeadPartialAttention,
    shvit_s1,
    shvit_s2,
    shvit_s3,
    shvit_s4,
    shvit_state,
)
from foveate.vision.windows import RelativePositionBias2d, WindowAttention

__all__ = [
    "Backbone",
    "ChannelGroupAttention",
    "DaViT",
    "DualAttentionLayer",
    "GCViT",
    "GlobalQueryGenerator",
    "GlobalWindowAttention",
    "RelativePositionBias2d",
    "SHViT",
    "SingleHeadPartialAttention",
    "WindowAttention",
    "davit_base",
    "davit_base_fl",
    "davit_giant",
    "davit_huge",
    "davit_huge_fl",
    "davit_large",
    "davit_small",
    "davit_state",
    "davit_tiny",
    "gcvit_base",
    "gcvit_large",
    "gcvit_small",
    "gcvit_state",
    "gcvit_tiny",
    "gcvit_xtiny",
    "gcvit_xxtiny",
    "multiply_adds",
    "parameters_of",
    "shvit_s1",
    "shvit_s2",
    "shvit_s3",
    "shvit_s4",
    "shvit_state",
]
