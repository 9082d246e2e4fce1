"""How logits become weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """p_ij = exp(s_ij) / sum_j' exp(s_ij'); learned sinks add exp(sink_h) to the sum."""


@dataclass(frozen=True)
class SoftmaxPlusOne:
    """p_ij = exp(s_ij) / (1 + sum_j' exp(s_ij')): a query may look at nothing.

    The same as a sink logit of 0 in every head; learned sinks count besides. Attention Is Off By One (Miller, 2023).
    """


@dataclass(frozen=True)
class Sigmoid:
    """p_ij = 1 / (1 + exp(-(s_ij + bias))): each pair for itself, nothing is shared out.

    Theory, Analysis, and Best Practices for Sigmoid Self-Attention (Ramapuram et al., 2024), who suggest bias = -log n
    for n keys. Takes no sinks and has no log-sum-exp.

    Args:
        bias: finite number, added to every logit after the scores.
    """

    bias: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.bias, (int, float)) or not math.isfinite(self.bias):
            raise ValueError(f"Sigmoid.bias must be a finite number, got {self.bias!r}")


@dataclass(frozen=True)
class ReLU:
    """p_ij = max(s_ij, 0), unnormalised. Takes no sinks and has no log-sum-exp.

    Replacing softmax with ReLU in Vision Transformers (Wortsman et al., 2023) divides by the number of keys besides;
    so does `scale / M` here, as max is homogeneous (scores that are not, such as a soft-cap, set apart).
    """


Normalizer = Softmax | SoftmaxPlusOne | Sigmoid | ReLU
NAMES = {"softmax": Softmax, "softmax_plus_one": SoftmaxPlusOne, "sigmoid": Sigmoid, "relu": ReLU}


def as_normalizer(value: Normalizer | str) -> Normalizer:
    """An instance from an instance or from a name.

    >>> as_normalizer("sigmoid")
    Sigmoid(bias=0.0)
    """
    if isinstance(value, (Softmax, SoftmaxPlusOne, Sigmoid, ReLU)):
        return value
    if isinstance(value, str) and value in NAMES:
        return NAMES[value]()
    raise (ValueError if isinstance(value, str) else TypeError)(
        "normalizer must be one of "
        f"{', '.join(map(repr, NAMES))} or a Softmax, SoftmaxPlusOne, Sigmoid or ReLU; got {value!r}"
    )


def all_sinks(normalizer: Normalizer, sinks: Tensor | None, like: Tensor) -> Tensor | None:
    """The sink logit of each head, (H,), with what the normaliser adds, at least float32; None = no sink.

    Differentiable. With it `SoftmaxPlusOne` is a softmax with sinks, so no engine needs to know it.

    Args:
        like: (B, H, N, D); gives the number of heads, the device, and the dtype where `sinks` gives none.
    """
    if not isinstance(normalizer, SoftmaxPlusOne):
        return sinks
    if sinks is None:
        return like.new_zeros(like.shape[1], dtype=torch.promote_types(like.dtype, torch.float32))
    sinks = sinks.to(torch.promote_types(sinks.dtype, torch.float32))
    return torch.logaddexp(sinks, torch.zeros_like(sinks))
