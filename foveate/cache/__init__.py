"""Cache: which keys and values to keep while a model generates, per layer and head."""

from __future__ import annotations

from foveate.cache.budget import Budget
from foveate.cache.layer import Geometry, LayerCache, Pool
from foveate.cache.longheads import (
    LongHeadsCache,
    LongHeadsPolicy,
    chunk_representation,
    longheads_attention,
    select_chunks,
)
from foveate.cache.moa import (
    MoAPlan,
    SpanRule,
    attention_influence,
    group_influence,
    predicted_loss,
    search_spans,
    span_rules,
)
from foveate.cache.policies.duo_attention import DuoAttention, duo_attention, duo_pattern, head_table
from foveate.cache.policies.h2o import H2O
from foveate.cache.policies.moa import MoA
from foveate.cache.policies.oracle import OracleTopK
from foveate.cache.policies.random import RandomKeep
from foveate.cache.policies.recycled import Recycled, recycled_mask
from foveate.cache.policies.snapkv import SnapKV
from foveate.cache.policies.streaming import Streaming
from foveate.cache.policies.task_kv import TaskKV, semantic_distances
from foveate.cache.policy import POLICIES, Kept, Policy, Reader, load, make
from foveate.cache.store import RaggedStore
from foveate.cache.view import View

__all__ = [
    "H2O",
    "POLICIES",
    "Budget",
    "DuoAttention",
    "Geometry",
    "Kept",
    "LayerCache",
    "LongHeadsCache",
    "LongHeadsPolicy",
    "MoA",
    "MoAPlan",
    "OracleTopK",
    "Policy",
    "Pool",
    "RaggedStore",
    "RandomKeep",
    "Reader",
    "Recycled",
    "SnapKV",
    "SpanRule",
    "Streaming",
    "TaskKV",
    "View",
    "attention_influence",
    "chunk_representation",
    "duo_attention",
    "duo_pattern",
    "group_influence",
    "head_table",
    "load",
    "longheads_attention",
    "make",
    "predicted_loss",
    "recycled_mask",
    "search_spans",
    "select_chunks",
    "semantic_distances",
    "span_rules",
]
