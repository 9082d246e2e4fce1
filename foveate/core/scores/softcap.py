"""Soft-capped logits (Gemma 2: Improving Open Language Models at a Practical Size, 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from foveate.core.scores.base import Shape


@dataclass(frozen=True)
class SoftCap:
    """s -> cap * tanh(s / cap): logits stay within (-cap, cap).

    Applied to the scaled logits, before masking, as in the paper.

    Args:
        cap: positive bound on the magnitude of a logit.

    >>> import torch
    >>> SoftCap(30.0).apply(torch.tensor([0.0, 1e6]))
    tensor([ 0., 30.])
    """

    cap: float

    def __post_init__(self) -> None:
        if not (isinstance(self.cap, (int, float)) and math.isfinite(self.cap) and self.cap > 0):
            raise ValueError(f"SoftCap.cap must be a positive finite number, got {self.cap!r}")

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def check(self, shape: Shape) -> None:
        """Fits every shape."""

    def apply(self, logits: Tensor) -> Tensor:
        return (logits / self.cap).tanh() * self.cap
