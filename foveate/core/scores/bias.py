"""Additive bias on the logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.core.scores.base import Shape, floating


@dataclass(frozen=True, eq=False)
class Bias:
    """s -> s + tensor.

    Args:
        tensor: floating point, broadcastable to (B, H, N, M); added to the scaled logits. -inf forbids a pair.
            It is the caller's allocation: nothing here expands it.

    >>> import torch
    >>> Bias(torch.ones(1, 1, 2, 2)).apply(torch.zeros(1, 1, 2, 2)).sum()
    tensor(4.)
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        floating("Bias", "tensor", self.tensor)
        if self.tensor.ndim > 4:
            raise ValueError(
                f"Bias.tensor must have at most 4 dimensions, got shape {tuple(self.tensor.shape)}"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"tensor": self.tensor}

    def apply(self, logits: Tensor) -> Tensor:
        return logits + self.tensor.to(logits.dtype)

    def check(self, shape: Shape) -> None:
        """Raise ValueError unless the tensor broadcasts to `shape` = (B, H, N, M)."""
        mine = (1,) * (4 - self.tensor.ndim) + tuple(self.tensor.shape)
        if any(a not in (1, b) for a, b in zip(mine, shape, strict=True)):
            raise ValueError(f"Bias.tensor of shape {tuple(self.tensor.shape)} does not broadcast to {shape}")
