"""Selectors: mechanisms that choose the pairs from the content of q and k."""

from foveate.core.selectors.anchor_attention import AnchorAttention, anchor_attention
from foveate.core.selectors.base import Selector
from foveate.core.selectors.flexprefill import FlexPrefill

__all__ = ["AnchorAttention", "FlexPrefill", "Selector", "anchor_attention"]
