"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.count import multiply_adds
from foveate.vision.explain import WindowReach, explain_window
from foveate.vision.polyphase import (
    Anchored,
    PolyTwins,
    PolyTwinsBlock,
    SubsampledAttention,
    polyphase_anchor,
    polytwins_base,
    shift_consistency,
    shifted_predictions,
)
from foveate.vision.resnet import (
    ResidualBlock,
    ResNet,
    resnet18,
    resnet50,
)
from foveate.vision.scale_attention import (
    DuoFormer,
    ScalePatchAttention,
    ScaleTokens,
    duoformer,
)
from foveate.vision.shifted_ensemble import (
    ShiftedWindowEnsemble,
    ViTLayer,
    WindowedLayers,
    WindowedViT,
    roll_similarity,
    window_bias,
    windowed_vit,
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
    "Anchored",
    "Backbone",
    "DuoFormer",
    "PatchMerging",
    "PolyTwins",
    "PolyTwinsBlock",
    "RelativePositionBias2d",
    "ResNet",
    "ResidualBlock",
    "ScalePatchAttention",
    "ScaleTokens",
    "ShiftedWindowAttention",
    "ShiftedWindowEnsemble",
    "SubsampledAttention",
    "Swin",
    "SwinBlock",
    "SwinVSA",
    "VSABlock",
    "VariedSizeWindowAttention",
    "ViTLayer",
    "WindowAttention",
    "WindowReach",
    "WindowedLayers",
    "WindowedViT",
    "duoformer",
    "explain_window",
    "multiply_adds",
    "parameters_of",
    "polyphase_anchor",
    "polytwins_base",
    "resnet18",
    "resnet50",
    "roll_similarity",
    "shift_consistency",
    "shifted_predictions",
    "swin_base",
    "swin_from_timm",
    "swin_from_transformers",
    "swin_large",
    "swin_small",
    "swin_tiny",
    "swin_vsa_small",
    "swin_vsa_tiny",
    "window_bias",
    "windowed_vit",
]
