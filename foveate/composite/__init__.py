"""Composite: mechanisms made of several attention calls whose results are merged."""

from __future__ import annotations

__all__: list[str] = []
