"""foveate in transformers models: `apply(model, policy)`, what it returns, and `Cache`."""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("foveate.hf needs transformers >= 5.4: pip install 'foveate[hf]'") from error

from foveate.hf.apply import Handle, apply
from foveate.hf.cache import Cache, Held, LayerHeld
from foveate.hf.complex_heads import ComplexHeads, convert_rope_model
from foveate.hf.context_extension import (
    ABF,
    NTK,
    ContextExtension,
    ContextHandle,
    EntropyABF,
    EntropyByLength,
    PositionInterpolation,
    YaRN,
    apply_context_extension,
    entropy_by_length,
    log_length_scale,
    rotary_rates,
    row_entropy,
)
from foveate.hf.head_gates import HeadGates, train_head_gates
from foveate.hf.mixture_of_heads import HeadMixture, apply_mixture_of_heads
from foveate.hf.report import Check, CheckError, LayerReport, Report
from foveate.hf.seer_attention import distill_gates, make_gates, rotary_of
from foveate.hf.selective_temperature import SelectiveHandle, apply_selective_temperature

__all__ = [
    "ABF",
    "NTK",
    "Cache",
    "Check",
    "CheckError",
    "ComplexHeads",
    "ContextExtension",
    "ContextHandle",
    "EntropyABF",
    "EntropyByLength",
    "Handle",
    "HeadGates",
    "HeadMixture",
    "Held",
    "LayerHeld",
    "LayerReport",
    "PositionInterpolation",
    "Report",
    "SelectiveHandle",
    "YaRN",
    "apply",
    "apply_context_extension",
    "apply_mixture_of_heads",
    "apply_selective_temperature",
    "convert_rope_model",
    "distill_gates",
    "entropy_by_length",
    "log_length_scale",
    "make_gates",
    "rotary_of",
    "rotary_rates",
    "row_entropy",
    "train_head_gates",
]
