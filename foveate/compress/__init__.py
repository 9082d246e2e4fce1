"""Compress: attention to summaries of tokens (pooled, landmark, core, hierarchical) beside the tokens nearby."""

from __future__ import annotations

__all__: list[str] = []
