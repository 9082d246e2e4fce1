"""What the scores share: their checks, and biases that depend on where query and key stand to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]  # (B, H, N, M)


class Relative:
    """Base of biases that depend on the relative position of query and key: s -> s + table[h, code_i - code_j].

    Subclasses write `codes`. An engine reads the bias from the table; it is never N x M there.
    """

    def codes(
        self, n: int, m: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(table, q_code, k_code) with bias[b, h, i, j] = table[h, q_code[i] - k_code[j]].

        Returns:
            table (Ht, L): Ht 1 (all heads) or H, differentiable back to the parameter; float32 or float64, so that its
            gradients add up in that whatever the parameter's dtype.
            q_code int32 (n,), k_code int32 (m,): every difference lies in [0, L). Where positions are one-dimensional
            both rise by one from element to element, so that a row of a tile reads the table contiguously.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define codes()")

    def apply(self, logits: Tensor) -> Tensor:
        """The dense definition, for logits (..., H, N, M)."""
        n, m = logits.shape[-2:]
        table, q_code, k_code = self.codes(n, m, logits.device)
        at = q_code.long().unsqueeze(1) - k_code.long()  # (N, M)
        return logits + table.to(logits.dtype)[:, at]


def floating(owner: str, name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a floating point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{owner}.{name} must be a floating point tensor, got {got}")


def widened(parameter: Tensor) -> Tensor:
    """The parameter in at least float32."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def heads_fit(owner: str, name: str, held: int, shape: Shape) -> None:
    """Raise ValueError unless `held` is 1 or the number of heads."""
    if held not in (1, shape[1]):
        raise ValueError(f"{owner}.{name} is for {held} heads; q has {shape[1]} (1 broadcasts)")


def distance_codes(n: int, m: int, device: torch.device | str | None) -> tuple[Tensor, Tensor, Tensor]:
    """(distances (n + m - 1,), q_code, k_code): distances[q_code[i] - k_code[j]] = (i + m - n) - j.

    >>> d, q, k = distance_codes(2, 3, None)
    >>> d[(q[:, None] - k).long()].tolist()
    [[1, 0, -1], [2, 1, 0]]
    """
    distances = torch.arange(1 - n, m, device=device)
    q_code = torch.arange(m - 1, n + m - 1, device=device, dtype=torch.int32)
    return distances, q_code, torch.arange(m, device=device, dtype=torch.int32)
