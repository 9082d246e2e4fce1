"""Compress: attention to summaries of tokens (pooled, landmark, core, hierarchical) beside the tokens nearby."""

from __future__ import annotations

from foveate.compress.agent import AgentBias, agent_attention, pool_agents
from foveate.compress.agent_sd import TokenMatching, agent_sd_attention, match_tokens
from foveate.compress.cca import CCAAttention, CCACache, cca_attention, pool_core
from foveate.compress.combiner import combiner_attention
from foveate.compress.hierarchical import Hierarchy, hierarchical_attention, sibling_positions
from foveate.compress.landmark import (
    LandmarkBlocks,
    LandmarkCache,
    insert_landmarks,
    landmark_attention,
    landmark_grouped_softmax,
)
from foveate.compress.regions import region_summaries

__all__ = [
    "AgentBias",
    "CCAAttention",
    "CCACache",
    "Hierarchy",
    "LandmarkBlocks",
    "LandmarkCache",
    "TokenMatching",
    "agent_attention",
    "agent_sd_attention",
    "cca_attention",
    "combiner_attention",
    "hierarchical_attention",
    "insert_landmarks",
    "landmark_attention",
    "landmark_grouped_softmax",
    "match_tokens",
    "pool_agents",
    "pool_core",
    "region_summaries",
    "sibling_positions",
]
