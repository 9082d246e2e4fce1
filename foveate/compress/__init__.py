"""Compress: attention to summaries of tokens (pooled, landmark, core, hierarchical), mostly beside the tokens nearby."""

from __future__ import annotations

from foveate.compress.cca import CCAAttention, CCACache, cca_attention, pool_core

__all__ = ["CCAAttention", "CCACache", "cca_attention", "pool_core"]
