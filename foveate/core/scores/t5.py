"""T5's bias: learned per bucket of distances, fine near the query and logarithmic far from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.scores.base import Relative, Shape, distance_codes, floating, heads_fit, widened


@dataclass(frozen=True, eq=False)
class T5Bias(Relative):
    """s_ij -> s_ij + weight[bucket(position_j - position_i), h], the last query aligned with the last key.

    Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (2020). Half of a side's buckets
    hold one distance each, the other half grow logarithmically up to `max_distance`; what lies beyond shares the last.

    Args:
        weight: floating point (buckets, H), the parameter `relative_attention_bias.weight` of transformers' T5.
        bidirectional: as in an encoder: half of the buckets for keys ahead. False, as in a decoder: keys ahead share
            the bucket of distance 0.
        max_distance: from which distance on all share the last bucket; more than the exact buckets of a side.

    >>> import torch
    >>> weight = torch.arange(8.0).unsqueeze(1)
    >>> T5Bias(weight, bidirectional=False).apply(torch.zeros(1, 1, 1, 9))[0, 0].tolist()
    [[4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 2.0, 1.0, 0.0]]
    """

    weight: Tensor
    bidirectional: bool
    max_distance: int = 128

    def __post_init__(self) -> None:
        floating("T5Bias", "weight", self.weight)
        least = 4 if self.bidirectional else 2
        if self.weight.ndim != 2 or self.weight.shape[0] < least:
            raise ValueError(
                f"T5Bias.weight must have shape (buckets >= {least}, heads), got {tuple(self.weight.shape)}"
            )
        exact = self.weight.shape[0] // least
        if not isinstance(self.max_distance, int) or self.max_distance <= exact:
            raise ValueError(
                f"T5Bias.max_distance must be an int > {exact}, the buckets of one distance each; got "
                f"{self.max_distance!r}"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def check(self, shape: Shape) -> None:
        """Raise ValueError unless the weight is for the heads of `shape` = (B, H, N, M)."""
        heads_fit("T5Bias", "weight", self.weight.shape[1], shape)

    def codes(self, n, m, device=None):
        distances, q_code, k_code = distance_codes(n, m, device)
        return widened(self.weight).index_select(0, self.buckets(-distances)).t(), q_code, k_code

    def buckets(self, relative: Tensor) -> Tensor:
        """The bucket of each relative position key - query, int64; in float32, as T5 computes it."""
        count, first = self.weight.shape[0], torch.zeros_like(relative)
        if self.bidirectional:
            count //= 2
            first = torch.where(relative > 0, count, first)
            far = relative.abs()
        else:
            far = (-relative).clamp(min=0)
        exact = count // 2
        growth = torch.log(far.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        logarithmic = (exact + (growth * (count - exact)).long()).clamp(max=count - 1)
        return first + torch.where(far < exact, far, logarithmic)
