"""Dropout by a counter: whether a weight is kept depends on the seed and on which weight it is, and on nothing else.

So forward and backward, any engine, any tiling and any number of threads agree without storing a mask. The generator is
Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011):

    words = philox(counter = (key // 4, query, b * H + h, 0), key = (seed mod 2^32, seed div 2^32))
    the pair (b, h, query, key) is kept  <=>  words[key % 4] >= threshold(p)

Kept weights are multiplied by 1 / (1 - p).
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85  # golden ratio, sqrt(3) - 1
_ROUNDS = 10


def threshold(p: float) -> int:
    """Words below this drop their weight: min(round(p 2^32), 2^32 - 1).

    >>> threshold(0.5) == 1 << 31
    True
    """
    return min(round(p * 4294967296.0), _WORD)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of 32 bits from a counter of four and a key of two, all int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(_ROUNDS):
        if step:
            k0, k1 = (k0 + _STEPS[0]) & _WORD, (k1 + _STEPS[1]) & _WORD
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits; the sign bit is one of them
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
    return c0, c1, c2, c3


def keep_mask(
    seed: int | Tensor,
    p: float,
    batch: int,
    heads: int,
    n: int,
    m: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which weights dropout keeps, bool (batch, heads, n, m). Dense: for the reference engine and for tests.

    Args:
        seed: int, or an int64 tensor of one element, of which all 64 bits count.
        p: probability of dropping a weight, in [0, 1).

    >>> kept = keep_mask(7, 0.25, 2, 3, 40, 50)
    >>> abs(kept.double().mean().item() - 0.75) < 0.02
    True
    >>> torch.equal(keep_mask(7, 0.25, 2, 3, 5, 6), kept[:, :, :5, :6])
    True
    """
    if isinstance(seed, Tensor):
        seed = seed.reshape(()).to(device)
    else:
        seed = torch.tensor(seed, dtype=torch.int64, device=device)
    key = seed & _WORD, (seed >> 32) & _WORD
    planes = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1) & _WORD
    queries = torch.arange(n, device=device).view(n, 1)
    fours = torch.arange(-(-m // 4), device=device)
    words = torch.stack(
        philox((fours, queries, planes, torch.zeros_like(fours)), key), -1
    )  # (B, H, N, M / 4, 4)
    return words.flatten(-2)[..., :m] >= threshold(p)
