"""Controls of equal density: the plain sets of pairs that a clever one must beat."""

from __future__ import annotations

import math

from foveate.core.patterns import Causal, Pattern, Random, SlidingWindow


def causal_share(pattern: Pattern, n: int) -> float:
    """Pairs of a causal pattern over those of `Causal()` at n tokens, averaged over its heads.

    >>> causal_share(Causal() & SlidingWindow(1), 9)
    0.2
    """
    layout = pattern.layout(n)
    return layout.area / (layout.batch * layout.heads * n * (n + 1) / 2)


def equal_window(share: float, n: int) -> Pattern:
    """The causal sliding window with the least width that has at least this share of the causal pairs.

    A window w has w n - w (w - 1) / 2 pairs.

    >>> equal_window(0.5, 9)
    (Causal() & SlidingWindow(3))
    """
    _check("equal_window", share, n)
    pairs = share * n * (n + 1) / 2
    window = math.ceil(n + 0.5 - math.sqrt(max((n + 0.5) ** 2 - 2 * pairs, 0.0)) - 1e-9)
    return Causal() & SlidingWindow(max(1, min(n, window)))


def equal_random(share: float, n: int, *, block: int, heads: int = 1, seed: int = 0) -> Pattern:
    """Causal blocks at random, others in every head, with this share of the causal pairs on average.

    Blocks on the diagonal are always kept; shares below theirs give them alone.
    """
    _check("equal_random", share, n)
    whole, rest = divmod(n, block)
    own = whole * block * (block + 1) / 2 + rest * (rest + 1) / 2
    total = n * (n + 1) / 2
    density = (share * total - own) / (total - own) if total > own else 0.0
    return Causal() & Random(min(1.0, max(0.0, density)), block=block, seed=seed, heads=heads)


def _check(owner: str, share: float, n: int) -> None:
    if not 0 < share <= 1 or n < 1:
        raise ValueError(f"{owner}: share {share} of {n} tokens; accepted: 0 < share <= 1, n >= 1")
