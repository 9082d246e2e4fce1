"""Changes to the logits before the softmax. Small frozen objects that every engine can read."""

from foveate.core.scores.bias import Bias
from foveate.core.scores.softcap import SoftCap

Score = Bias | SoftCap

__all__ = ["Bias", "Score", "SoftCap"]
