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
from foveate.layers.base_conv import BaseConv
from foveate.layers.based import BasedLinearAttention, BasedLM, GatedShortConv, based_layout, state_bytes
from foveate.layers.boundary import BoundaryPredictor, boundary_loss, boundary_targets
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
from foveate.layers.language_model import GatedMLP, TransformerLM
from foveate.layers.local_linear import LocalLinearAttention
from foveate.layers.norms import RMSNorm
from foveate.layers.prefix_top import KeptKeys, topw_prefix_selector
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
from foveate.layers.self_attention import KeyValueState, SelfAttention
from foveate.layers.short_conv import ShortConv
from foveate.layers.titans import NeuralMemory, NeuralMemoryState, TitansBlock, TitansState
from foveate.layers.trans_normer import SimpleGLU, TNLAttention, TNLState, TransNormerLLM

__all__ = [
    "AgentAttention2d",
    "AttentionVariant",
    "BaseConv",
    "BasedLM",
    "BasedLinearAttention",
    "BlockGate",
    "BoundaryPredictor",
    "ClusterLayout",
    "DMACache",
    "DeltaNet",
    "DeltaNetState",
    "DynamicMaskAttention",
    "FrozenEncoderProbe",
    "GatedLinearAttention",
    "GatedMLP",
    "GatedShortConv",
    "GaussianAdaptiveAttention",
    "GaussianAdaptiveBlock",
    "HierarchicalSelfAttention",
    "InLineAttention2d",
    "KeptKeys",
    "KernelAttention",
    "KeyValueState",
    "LocalLinearAttention",
    "NeuralMemory",
    "NeuralMemoryState",
    "PoolState",
    "PredictedDepthwiseConv",
    "RMSNorm",
    "RoutingAttention",
    "RoutingSelector",
    "SeerAttention",
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
    "dma_attention",
    "dma_bias",
    "gate_layout",
    "gate_loss",
    "importance_factor",
    "load_gates",
    "per_order_taylor",
    "pooled_attention_target",
    "prefix_pooling",
    "routing_attention",
    "save_gates",
    "state_bytes",
    "topw_prefix_selector",
]
