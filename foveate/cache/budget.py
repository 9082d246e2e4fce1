"""How many tokens may stay, and how heads and layers share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCOPES = ("head", "layer", "model")


@dataclass(frozen=True)
class Budget:
    """A number of tokens for each KV head, on average.

    Args:
        amount: tokens (int >= 1), or the fraction (float in (0, 1]) of the tokens seen so far.
        per: "head": every KV head keeps as many; "layer": the heads of a layer share their sum; "model": all heads
            of all layers share it. Sharing goes by score: the best tokens stay, whichever head holds them.
        sinks: the first real tokens of each row, kept by every head.
        recent: the last tokens of each row, kept by every head.
        floor: with "layer" and "model", the share of an even budget that no head goes below (its best tokens).

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    amount: int | float
    per: str = "head"
    sinks: int = 4
    recent: int = 32
    floor: float = 0.2

    def __post_init__(self) -> None:
        if isinstance(self.amount, bool) or not isinstance(self.amount, (int, float)):
            raise TypeError(f"budget must be tokens (int) or a fraction (float), got {self.amount!r}")
        if isinstance(self.amount, int) and self.amount < 1:
            raise ValueError(f"budget in tokens must be >= 1, got {self.amount}")
        if isinstance(self.amount, float) and not 0.0 < self.amount <= 1.0:
            raise ValueError(
                f"budget as a fraction must lie in (0, 1], got {self.amount}; tokens are given as an int"
            )
        if self.per not in SCOPES:
            raise ValueError(f"per must be one of {', '.join(SCOPES)}; got {self.per!r}")
        for name in ("sinks", "recent"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if isinstance(self.amount, int) and self.amount < self.sinks + self.recent:
            raise ValueError(
                f"budget = {self.amount} tokens is less than sinks + recent = {self.sinks} + {self.recent}, which "
                "are always kept"
            )
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor}")

    @property
    def fraction(self) -> bool:
        return isinstance(self.amount, float)

    def tokens(self, seen: Tensor) -> Tensor:
        """Tokens for one head of each row, given the real tokens seen (B,); never less than sinks + recent."""
        if not self.fraction:
            return torch.full_like(seen, int(self.amount)).minimum(seen)
        least = torch.full_like(seen, self.sinks + self.recent)
        return torch.ceil(seen * float(self.amount)).to(seen.dtype).maximum(least).minimum(seen)

    def protect(self, positions: Tensor, valid: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """(sinks, recent): bool like ``positions`` (B, Hkv, S), the tokens that are always kept.

        Args:
            first, last: (B,) positions of the first and of the last real token of each row.
        """
        one = (slice(None), None, None)
        sink = valid & (positions < first[one] + self.sinks)
        recent = valid & (positions > last[one] - self.recent)
        return sink, recent


def share(scores: Tensor, keep: Tensor, valid: Tensor, total: Tensor, floor: Tensor) -> Tensor:
    """Which tokens stay when heads share ``total`` tokens.

    Args:
        scores: (B, R, S), higher = keep; R heads (of one layer or of all).
        keep: bool (B, R, S): always kept. valid: bool (B, R, S): real tokens.
        total: (B,) tokens of a row for all R heads together. floor: (B,) tokens each head gets at least.

    Returns:
        bool (B, R, S). Ties go to the earlier head and slot.

    >>> scores = torch.tensor([[[3.0, 2.0, 1.0], [9.0, 8.0, 7.0]]])
    >>> true = torch.ones(1, 2, 3, dtype=torch.bool)
    >>> share(scores, ~true, true, torch.tensor([4]), torch.tensor([1])).sum(2).tolist()
    [[1, 3]]
    """
    batch, heads, width = scores.shape
    rank_in_head = _rank(_graded(scores, keep, valid))  # (B, R, S): 0 = best of its head
    sure = keep | (valid & (rank_in_head < floor[:, None, None]))
    rank = _rank(_graded(scores, sure, valid).reshape(batch, 1, heads * width)).view(batch, heads, width)
    return valid & (sure | (rank < total[:, None, None]))


def top(scores: Tensor, keep: Tensor, valid: Tensor, tokens: Tensor) -> Tensor:
    """Bool (B, Hkv, S): the ``tokens`` (B,) or (B, Hkv) best of each head, those in ``keep`` first."""
    limit = tokens[:, None, None] if tokens.ndim == 1 else tokens[:, :, None]
    return valid & (keep | (_rank(_graded(scores, keep, valid)) < limit))


def _graded(scores: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """Scores with what is kept anyhow above all and what is not real below all; NaN counts as worst."""
    scores = scores.double().nan_to_num(nan=-1e300, posinf=1e300, neginf=-1e300)
    return scores.masked_fill(keep, torch.inf).masked_fill(~valid, -torch.inf)


def _rank(scores: Tensor) -> Tensor:
    """Place of each entry along the last axis, 0 = largest; ties in order."""
    order = scores.argsort(stable=True, dim=-1, descending=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
