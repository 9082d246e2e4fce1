"""SnapKV: what the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from foveate.cache.policy import Policy
from foveate.cache.view import View


@dataclass(frozen=True)
class SnapKV(Policy):
    """Scores a key by the attention that the last ``window`` queries pay to it and to its neighbours.

        score_j = pool over |j' - j| <= kernel / 2 of  mean over group and last queries i of softmax_j'(q_i . k_j')

    SnapKV: LLM Knows What You are Looking for Before Generation (2024). Differs: the mean over the query heads of a
    group (the paper has one KV head per query head), so that grouped heads are not expanded; neighbours are those
    in the store, which after an eviction need not be adjacent in the text.

    Args:
        window: last queries that vote.
        kernel: odd width of the pooling along positions.
        pooling: "max" or "mean".

    >>> SnapKV(window=16).window
    16
    """

    name: ClassVar[str] = "snapkv"
    window: int = 32  # pyright: ignore[reportIncompatibleMethodOverride]
    kernel: int = 7
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be >= 1, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and >= 1, got {self.kernel}")
        if self.pooling not in ("max", "mean"):
            raise ValueError(f"pooling must be 'max' or 'mean', got {self.pooling!r}")

    def score(self, view: View) -> Tensor:
        votes = view.weights(self.window).mean((2, 3))  # (B, Hkv, S)
        order = view.positions.masked_fill(~view.valid, view.positions.max() + 1).argsort(
            -1
        )  # slots are not sorted
        line = votes.gather(2, order)
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        line = pool(line, self.kernel, stride=1, padding=self.kernel // 2)
        return votes.scatter(2, order, line)
