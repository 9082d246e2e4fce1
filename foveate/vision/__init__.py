"""Window, local and hierarchical attention for images, and the backbones built on it."""

from __future__ import annotations

from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.convit import (
    GPSA,
    ConViT,
    ConViTBlock,
    attention_distance,
    convit_base,
    convit_small,
    convit_tiny,
    gated_positional_attention,
    locality_gates,
    positional_factors,
)
from foveate.vision.count import multiply_adds
from foveate.vision.spectformer import (
    SpectFormer,
    SpectFormerH,
    SpectralBlock,
    SpectralGate,
    spectformer_base,
    spectformer_h_base,
    spectformer_h_large,
    spectformer_h_small,
    spectformer_small,
    spectformer_tiny,
    spectformer_xsmall,
)
from foveate.vision.tnt import (
    TNT,
    TNTBlock,
    WordAttention,
    WordEmbed,
    tnt_base,
    tnt_small,
    tnt_tiny,
)
from foveate.vision.windows import RelativePositionBias2d, WindowAttention

__all__ = [
    "GPSA",
    "TNT",
    "Backbone",
    "ConViT",
    "ConViTBlock",
    "RelativePositionBias2d",
    "SpectFormer",
    "SpectFormerH",
    "SpectralBlock",
    "SpectralGate",
    "TNTBlock",
    "WindowAttention",
    "WordAttention",
    "WordEmbed",
    "attention_distance",
    "convit_base",
    "convit_small",
    "convit_tiny",
    "gated_positional_attention",
    "locality_gates",
    "multiply_adds",
    "parameters_of",
    "positional_factors",
    "spectformer_base",
    "spectformer_h_base",
    "spectformer_h_large",
    "spectformer_h_small",
    "spectformer_small",
    "spectformer_tiny",
    "spectformer_xsmall",
    "tnt_base",
    "tnt_small",
    "tnt_tiny",
]
