"""A factor on the logits of each query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.scores.base import Shape, floating


@dataclass(frozen=True, eq=False)
class Temperature:
    """s_ij -> s_ij t_i: each query sharpens (t > 1) or flattens (t < 1) its own weights.

    Length-dependent factors such as log n (Overcoming a Theoretical Limitation of Self-Attention, 2022; the
    temperature tuning of Llama 4, 2025) and learned ones per head have this form. A logit that a `Bias` before it
    made -inf stays -inf, whatever the factor.

    Args:
        tensor: floating point, broadcastable to (B, H, N); at most 3 dimensions.

    >>> import torch
    >>> Temperature(torch.tensor([1.0, 3.0])).apply(torch.ones(1, 1, 2, 2))[0, 0].tolist()
    [[1.0, 1.0], [3.0, 3.0]]
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        floating("Temperature", "tensor", self.tensor)
        if self.tensor.ndim > 3:
            raise ValueError(
                f"Temperature.tensor must have at most 3 dimensions, got shape {tuple(self.tensor.shape)}"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"tensor": self.tensor}

    def apply(self, logits: Tensor) -> Tensor:
        forbidden = torch.isneginf(logits)  # 0 * inf would reach the factor's gradient
        changed = torch.where(forbidden, 0.0, logits) * self.tensor.to(logits.dtype).unsqueeze(-1)
        return torch.where(forbidden, logits, changed)

    def check(self, shape: Shape) -> None:
        """Raise ValueError unless the tensor broadcasts to (B, H, N)."""
        mine = (1,) * (3 - self.tensor.ndim) + tuple(self.tensor.shape)
        if any(a not in (1, b) for a, b in zip(mine, shape[:3], strict=True)):
            raise ValueError(
                f"Temperature.tensor of shape {tuple(self.tensor.shape)} does not broadcast to {shape[:3]}"
            )
