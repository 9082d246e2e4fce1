"""foveate in transformers models: `apply(model, policy)` and what it returns."""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("foveate.hf needs transformers >= 5.4: pip install 'foveate[hf]'") from error

from foveate.hf.apply import Handle, apply
from foveate.hf.report import Check, CheckError, LayerReport, Report
from foveate.hf.seer_attention import distill_gates, make_gates, rotary_of

__all__ = [
    "Check",
    "CheckError",
    "Handle",
    "LayerReport",
    "Report",
    "apply",
    "distill_gates",
    "make_gates",
    "rotary_of",
]
