"""Compress: attention to summaries of tokens (pooled, landmark, core, hierarchical) beside the tokens nearby."""

from __future__ import annotations

from foveate.compress.combiner import combiner_attention
from foveate.compress.regions import region_summaries

__all__ = ["combiner_attention", "region_summaries"]
