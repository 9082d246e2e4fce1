"""Linear: a state instead of a cache: the chunked scan, feature maps, memories that learn while reading."""

from __future__ import annotations

from foveate.linear.local_linear import global_ridge, local_linear_attention

__all__ = [
    "global_ridge",
    "local_linear_attention",
]
