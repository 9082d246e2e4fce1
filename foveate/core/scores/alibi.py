"""ALiBi: a penalty that grows linearly with distance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.scores.base import Relative, Shape, distance_codes, floating, widened


@dataclass(frozen=True, eq=False)
class ALiBi(Relative):
    """s_ij -> s_ij - slope_h |position_i - position_j|, the last query aligned with the last key (bottom-right).

    Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation (2022). The paper is
    causal; without causality the distance counts on both sides. Slopes may be learned.

    Args:
        slopes: floating point (H,); `alibi_slopes(H)` gives the published ones.

    >>> import torch
    >>> ALiBi(torch.tensor([0.5])).apply(torch.zeros(1, 1, 2, 3))[0, 0].tolist()
    [[-0.5, 0.0, -0.5], [-1.0, -0.5, 0.0]]
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        floating("ALiBi", "slopes", self.slopes)
        if self.slopes.ndim != 1:
            raise ValueError(f"ALiBi.slopes must have shape (heads,), got {tuple(self.slopes.shape)}")

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"slopes": self.slopes}

    def check(self, shape: Shape) -> None:
        """Raise ValueError unless there is one slope per head of `shape` = (B, H, N, M)."""
        if tuple(self.slopes.shape) != (shape[1],):
            raise ValueError(
                f"ALiBi.slopes must have shape ({shape[1]},), one per head; got {tuple(self.slopes.shape)}"
            )

    def codes(self, n, m, device=None):
        distances, q_code, k_code = distance_codes(n, m, device)
        slopes = widened(self.slopes)
        return -slopes.unsqueeze(1) * distances.abs().to(slopes.dtype), q_code, k_code


def alibi_slopes(heads: int) -> Tensor:
    """The published slopes, float32 (heads,).

    2^(-8/H), 2^(-16/H), ... for H a power of two; otherwise those of the power below, then every other one of the
    power above.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"alibi_slopes: heads must be an int >= 1, got {heads!r}")

    def of_power(count: int) -> list[float]:
        return [2.0 ** (-8.0 * number / count) for number in range(1, count + 1)]

    below = 1 << (heads.bit_length() - 1)
    return torch.tensor((of_power(below) + of_power(2 * below)[::2])[:heads])
