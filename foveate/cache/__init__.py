"""Cache: which keys and values to keep while a model generates, per layer and head."""

from __future__ import annotations

__all__: list[str] = []
