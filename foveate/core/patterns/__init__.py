"""Static patterns: one file per kind of geometry."""

from foveate.core.patterns.band import Causal, Dilated, Full, SlidingWindow, Strided
from foveate.core.patterns.base import (
    EMPTY,
    FULL,
    PARTIAL,
    And,
    Extent,
    Not,
    Or,
    Pattern,
    PerHead,
    as_pattern,
    per_head,
)
from foveate.core.patterns.blocks import Blocked
from foveate.core.patterns.columns import GlobalTokens, KeyPadding, PrefixLM, Sinks
from foveate.core.patterns.control import Random
from foveate.core.patterns.documents import Documents, Packed, Regions, SharedQuestion
from foveate.core.patterns.grids import Axial, Grid, Windows
from foveate.core.patterns.masks import Mask, MaskMod
from foveate.core.patterns.neighborhood import Neighborhood
from foveate.core.patterns.orders import Order, hilbert, morton, row_major, tile_major
from foveate.core.patterns.power import PowerOfTwo, power_attention, reachability
from foveate.core.patterns.query_context import QueryContextWindows
from foveate.core.patterns.shards import Shards

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "And",
    "Axial",
    "Blocked",
    "Causal",
    "Dilated",
    "Documents",
    "Extent",
    "Full",
    "GlobalTokens",
    "Grid",
    "KeyPadding",
    "Mask",
    "MaskMod",
    "Neighborhood",
    "Not",
    "Or",
    "Order",
    "Packed",
    "Pattern",
    "PerHead",
    "PowerOfTwo",
    "PrefixLM",
    "QueryContextWindows",
    "Random",
    "Regions",
    "Shards",
    "SharedQuestion",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "Windows",
    "as_pattern",
    "hilbert",
    "morton",
    "per_head",
    "power_attention",
    "reachability",
    "row_major",
    "tile_major",
]
