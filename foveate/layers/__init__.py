"""Layers: `nn.Module`s with parameters of their own (gates, predictors, centroids), built on the other rooms."""

from __future__ import annotations

from foveate.layers.dynamic_mask import DMACache, DynamicMaskAttention, dma_attention, dma_bias
from foveate.layers.prefix_top import KeptKeys, topw_prefix_selector

__all__ = [
    "DMACache",
    "DynamicMaskAttention",
    "KeptKeys",
    "dma_attention",
    "dma_bias",
    "topw_prefix_selector",
]
