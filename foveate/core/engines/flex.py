"""FlexAttention (placeholder module until the engine lands in this file)."""

from __future__ import annotations

from foveate.core.request import AttentionRequest

name = "flex"


def why_not(request: AttentionRequest) -> str | None:
    return "not built yet"
