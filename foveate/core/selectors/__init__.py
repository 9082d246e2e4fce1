"""Selectors: mechanisms that choose the pairs from the content of q and k."""

from foveate.core.selectors.anchor_attention import AnchorAttention, anchor_attention
from foveate.core.selectors.base import Selector
from foveate.core.selectors.boundaries import fixed_boundaries, select_boundaries
from foveate.core.selectors.dhsa import DHSA, chunk_means, dhsa_attention
from foveate.core.selectors.flexprefill import FlexPrefill
from foveate.core.selectors.hip import HiP, HiPDecodeState, hip_attention
from foveate.core.selectors.region_topk import RegionTopK
from foveate.core.selectors.top_blocks import TopBlocks
from foveate.core.selectors.vmoba import VMoBA, vmoba_attention, vmoba_cycle

__all__ = [
    "DHSA",
    "AnchorAttention",
    "FlexPrefill",
    "HiP",
    "HiPDecodeState",
    "RegionTopK",
    "Selector",
    "TopBlocks",
    "VMoBA",
    "anchor_attention",
    "chunk_means",
    "dhsa_attention",
    "fixed_boundaries",
    "hip_attention",
    "select_boundaries",
    "vmoba_attention",
    "vmoba_cycle",
]
