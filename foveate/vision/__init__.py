"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.count import multiply_adds
from foveate.vision.explain import WindowReach, explain_window
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
    "PatchMerging",
    "RelativePositionBias2d",
    "ReluLinearAttention",
    "SMTBlock",
    "ScaleAwareModulation",
    "SelectiveScan2D",
    "ShiftedWindowAttention",
    "Swin",
    "SwinBlock",
    "SwinVSA",
    "VSABlock",
    "VariedSizeWindowAttention",
    "WindowAttention",
    "WindowReach",
    "explain_window",
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
    "swin_base",
    "swin_from_timm",
    "swin_from_transformers",
    "swin_large",
    "swin_small",
    "swin_tiny",
    "swin_vsa_small",
    "swin_vsa_tiny",
]
