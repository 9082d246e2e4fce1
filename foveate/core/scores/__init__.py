"""Changes to the logits before they become weights. Small frozen objects that every engine can read.

Each has `apply(logits)`, its definition on dense logits (B, H, N, M); `check(shape)`, which raises ValueError unless it
fits; and `tensors`, what may carry a gradient. `Relative` ones also have `codes(n, m)`, from which an engine reads the
bias without an N x M tensor.
"""

from foveate.core.scores.alibi import ALiBi, alibi_slopes
from foveate.core.scores.base import Relative
from foveate.core.scores.bias import Bias
from foveate.core.scores.relative import RelativeBias
from foveate.core.scores.softcap import SoftCap
from foveate.core.scores.t5 import T5Bias
from foveate.core.scores.temperature import Temperature

Score = SoftCap | Bias | Temperature | RelativeBias | ALiBi | T5Bias

__all__ = [
    "ALiBi",
    "Bias",
    "Relative",
    "RelativeBias",
    "Score",
    "SoftCap",
    "T5Bias",
    "Temperature",
    "alibi_slopes",
]
