"""Random tokens: the control that every policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.policy import Policy
from foveate.cache.view import View


@dataclass(frozen=True)
class RandomKeep(Policy):
    """Scores that depend on seed, layer, row, head and position only, so that a token's luck does not change.

    >>> RandomKeep(seed=3)
    RandomKeep(seed=3)
    """

    name: ClassVar[str] = "random"
    schedule: ClassVar[str | int] = 1
    needs_keys: ClassVar[bool] = False
    seed: int = 0

    def score(self, view: View) -> Tensor:
        batch, heads, _ = view.positions.shape
        device = view.positions.device
        row = torch.arange(batch, device=device)[:, None, None]
        head = torch.arange(heads, device=device)[None, :, None]
        x = view.positions
        for part in (head, row, torch.tensor(view.layer), torch.tensor(self.seed)):
            x = _mix(x + 0x9E3779B9 * (part.to(device) + 1))
        return x.double() / (1 << 32)


def _mix(x: Tensor) -> Tensor:
    """A well-mixed 32-bit hash of 32-bit numbers."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)
