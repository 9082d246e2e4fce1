"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.count import multiply_adds
from foveate.vision.l2vit import (
    L2ViT,
    LGABlock,
    LocalConcentration,
    LWABlock,
    ReluLinearAttention,
    l2vit_base,
    l2vit_small,
    l2vit_tiny,
)
from foveate.vision.lamamba import (
    LaMambaBlock,
    LaMambaUNet,
    PatchExpand,
    SelectiveScan2D,
    ShiftedTiles,
    lamamba_unet,
    snake_orders,
)
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
    "L2ViT",
    "LGABlock",
    "LWABlock",
    "LaMambaBlock",
    "LaMambaUNet",
    "LocalConcentration",
    "PatchExpand",
    "RelativePositionBias2d",
    "ReluLinearAttention",
    "SMTBlock",
    "ScaleAwareModulation",
    "SelectiveScan2D",
    "ShiftedTiles",
    "WindowAttention",
    "l2vit_base",
    "l2vit_small",
    "l2vit_tiny",
    "lamamba_unet",
    "multiply_adds",
    "parameters_of",
    "smt_base",
    "smt_large",
    "smt_small",
    "smt_tiny",
    "snake_orders",
]
