"""Compress: attention to summaries of tokens (pooled, landmark, core, hierarchical) beside the tokens nearby."""

from __future__ import annotations

from foveate.compress.hierarchical import Hierarchy, hierarchical_attention, sibling_positions

__all__ = ["Hierarchy", "hierarchical_attention", "sibling_positions"]
