"""Selectors: mechanisms that choose the pairs from the content of q and k."""

from foveate.core.selectors.anchor_attention import AnchorAttention, anchor_attention
from foveate.core.selectors.base import Selector
from foveate.core.selectors.flexprefill import FlexPrefill
from foveate.core.selectors.hip import HiP, HiPDecodeState, hip_attention
from foveate.core.selectors.top_blocks import TopBlocks
from foveate.core.selectors.vmoba import VMoBA, vmoba_attention, vmoba_cycle

__all__ = [
    "AnchorAttention",
    "FlexPrefill",
    "HiP",
    "HiPDecodeState",
    "Selector",
    "TopBlocks",
    "VMoBA",
    "anchor_attention",
    "hip_attention",
    "vmoba_attention",
    "vmoba_cycle",
]
