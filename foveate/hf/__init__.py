"""foveate in transformers models: `apply(model, policy)`, what it returns, and `Cache`."""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("foveate.hf needs transformers >= 5.4: pip install 'foveate[hf]'") from error

from foveate.hf.apply import Handle, apply
from foveate.hf.cache import Cache, Held, LayerHeld
from foveate.hf.head_gates import HeadGates, train_head_gates
from foveate.hf.mixture_of_heads import HeadMixture, apply_mixture_of_heads
from foveate.hf.report import Check, CheckError, LayerReport, Report
from foveate.hf.seer_attention import distill_gates, make_gates, rotary_of
from foveate.hf.selective_temperature import SelectiveHandle, apply_selective_temperature

__all__ = [
    "Cache",
    "Check",
    "CheckError",
    "Handle",
    "HeadGates",
    "HeadMixture",
    "Held",
    "LayerHeld",
    "LayerReport",
    "Report",
    "SelectiveHandle",
    "apply",
    "apply_mixture_of_heads",
    "apply_selective_temperature",
    "distill_gates",
    "make_gates",
    "rotary_of",
    "train_head_gates",
]
