"""Layers: `nn.Module`s with parameters of their own (gates, predictors, centroids), built on the other rooms."""

from __future__ import annotations

__all__: list[str] = []
