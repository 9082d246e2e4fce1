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
from foveate.core.patterns.columns import GlobalTokens, KeyPadding, PrefixLM, Sinks

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "And",
    "Causal",
    "Dilated",
    "Extent",
    "Full",
    "GlobalTokens",
    "KeyPadding",
    "Not",
    "Or",
    "Pattern",
    "PerHead",
    "PrefixLM",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "as_pattern",
    "per_head",
]
