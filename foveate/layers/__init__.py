"""Layers: `nn.Module`s with parameters of their own (gates, predictors, centroids), built on the other rooms."""

from __future__ import annotations

from foveate.layers.agent import AgentAttention2d
from foveate.layers.attention_variants import (
    AttentionVariant,
    PoolState,
    VariantLM,
    attention_indicators,
    build_layout,
    per_order_taylor,
    prefix_pooling,
)
from foveate.layers.autoint import AutoInt, FieldEmbedding, InteractingLayer, field_affinity
from foveate.layers.base_conv import BaseConv
from foveate.layers.based import BasedLinearAttention, BasedLM, GatedShortConv, based_layout, state_bytes
from foveate.layers.boundary import BoundaryPredictor, boundary_loss, boundary_targets
from foveate.layers.complex_attention import ComplexAttention, complex_rotate, complex_turn, near_branch_cut
from foveate.layers.delta_net import DeltaNet, DeltaNetState
from foveate.layers.dynamic_mask import DMACache, DynamicMaskAttention, dma_attention, dma_bias
from foveate.layers.gated_linear import GatedLinearAttention
from foveate.layers.gaussian_adaptive import (
    FrozenEncoderProbe,
    GaussianAdaptiveAttention,
    GaussianAdaptiveBlock,
    importance_factor,
)
from foveate.layers.hierarchical import HierarchicalSelfAttention
from foveate.layers.inline import InLineAttention2d, PredictedDepthwiseConv
from foveate.layers.kernel_attention import KernelAttention
from foveate.layers.l_query import (
    LQueryBlock,
    MultiQueryRecommender,
    transition_distillation_loss,
    transition_matrix,
    transition_targets,
    windowed_mean_query,
)
from foveate.layers.language_model import GatedMLP, TransformerLM
from foveate.layers.local_linear import LocalLinearAttention
from foveate.layers.low_rank_pool import GRULamaClassifier, LowRankMultiHeadPool
from foveate.layers.mixture_of_heads import (
    MixtureOfHeads,
    chosen_attention,
    moh_total_aux,
    route_heads,
    route_heads_by_query_norm,
)
from foveate.layers.norms import RMSNorm
from foveate.layers.prefix_top import KeptKeys, topw_prefix_selector
from foveate.layers.relative_conv import (
    RelativeConvAttention,
    RelativeConvState,
    relative_attention,
    relative_shift,
)
from foveate.layers.routing import ClusterLayout, RoutingAttention, RoutingSelector, routing_attention
from foveate.layers.seer_attention import (
    BlockGate,
    SeerAttention,
    gate_layout,
    gate_loss,
    load_gates,
    pooled_attention_target,
    save_gates,
)
from foveate.layers.selective_temperature import (
    SelectiveSelfAttention,
    SelectiveTemperature,
    selective_attention,
)
from foveate.layers.self_attention import KeyValueState, SelfAttention
from foveate.layers.short_conv import ShortConv
from foveate.layers.titans import NeuralMemory, NeuralMemoryState, TitansBlock, TitansState
from foveate.layers.trans_normer import SimpleGLU, TNLAttention, TNLState, TransNormerLLM

__all__ = [
    "AgentAttention2d",
    "AttentionVariant",
    "AutoInt",
    "BaseConv",
    "BasedLM",
    "BasedLinearAttention",
    "BlockGate",
    "BoundaryPredictor",
    "ClusterLayout",
    "ComplexAttention",
    "DMACache",
    "DeltaNet",
    "DeltaNetState",
    "DynamicMaskAttention",
    "FieldEmbedding",
    "FrozenEncoderProbe",
    "GRULamaClassifier",
    "GatedLinearAttention",
    "GatedMLP",
    "GatedShortConv",
    "GaussianAdaptiveAttention",
    "GaussianAdaptiveBlock",
    "HierarchicalSelfAttention",
    "InLineAttention2d",
    "InteractingLayer",
    "KeptKeys",
    "KernelAttention",
    "KeyValueState",
    "LQueryBlock",
    "LocalLinearAttention",
    "LowRankMultiHeadPool",
    "MixtureOfHeads",
    "MultiQueryRecommender",
    "NeuralMemory",
    "NeuralMemoryState",
    "PoolState",
    "PredictedDepthwiseConv",
    "RMSNorm",
    "RelativeConvAttention",
    "RelativeConvState",
    "RoutingAttention",
    "RoutingSelector",
    "SeerAttention",
    "SelectiveSelfAttention",
    "SelectiveTemperature",
    "SelfAttention",
    "ShortConv",
    "SimpleGLU",
    "TNLAttention",
    "TNLState",
    "TitansBlock",
    "TitansState",
    "TransNormerLLM",
    "TransformerLM",
    "VariantLM",
    "attention_indicators",
    "based_layout",
    "boundary_loss",
    "boundary_targets",
    "build_layout",
    "chosen_attention",
    "complex_rotate",
    "complex_turn",
    "dma_attention",
    "dma_bias",
    "field_affinity",
    "gate_layout",
    "gate_loss",
    "importance_factor",
    "load_gates",
    "moh_total_aux",
    "near_branch_cut",
    "per_order_taylor",
    "pooled_attention_target",
    "prefix_pooling",
    "relative_attention",
    "relative_shift",
    "route_heads",
    "route_heads_by_query_norm",
    "routing_attention",
    "save_gates",
    "selective_attention",
    "state_bytes",
    "topw_prefix_selector",
    "transition_distillation_loss",
    "transition_matrix",
    "transition_targets",
    "windowed_mean_query",
]
