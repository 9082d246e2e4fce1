"""Means, differences and shares with 95 % intervals, and the verdict that follows from one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foveate.catalogue.record import FAILS, HOLDS, OPEN, Figure

# two-sided 95 % quantiles of Student's t for 1 .. 30 degrees of freedom
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def interval(name: str, values: Sequence[float], unit: str = "") -> Figure:
    """Mean of independent values (seeds) with Student's 95 % interval; a single value has none.

    >>> print(interval("loss", [1.0, 2.0, 3.0]))
    2 (-0.484 to 4.48)
    """
    n = len(values)
    if n == 0:
        raise ValueError(f"interval({name!r}): no values; accepted: at least one")
    mean = math.fsum(values) / n
    if n == 1:
        return Figure(name, mean, unit=unit)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = (T95[n - 2] if n - 2 < len(T95) else 1.96) * spread
    return Figure(name, mean, mean - half, mean + half, n, unit)


def difference(name: str, a: Sequence[float], b: Sequence[float], unit: str = "") -> Figure:
    """Mean of a - b, paired (the same seeds in the same order), with its interval.

    >>> print(difference("gain", [3.0, 4.0, 5.0], [1.0, 2.0, 3.0]))
    2 (2 to 2)
    """
    if len(a) != len(b):
        raise ValueError(f"difference({name!r}): {len(a)} and {len(b)} values; accepted: pairs")
    return interval(name, [x - y for x, y in zip(a, b, strict=True)], unit)


def proportion(name: str, hits: int, n: int) -> Figure:
    """A share of n trials with Wilson's 95 % interval.

    >>> print(proportion("found", 9, 10))
    0.9 (0.596 to 0.982)
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"proportion({name!r}): {hits} of {n}; accepted: 0 <= hits <= n, n >= 1")
    z, p = 1.96, hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Figure(name, p, max(0.0, middle - half), min(1.0, middle + half), n)


def slope(name: str, x: Sequence[float], y: Sequence[float]) -> Figure:
    """Exponent a of y ~ x**a: the least-squares line through the logarithms, with its interval.

    >>> round(slope("growth", [1, 2, 4, 8], [3, 6, 12, 24]).value, 6)
    1.0
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"slope({name!r}): {len(x)} points; accepted: at least 3")
    u, v = [math.log(a) for a in x], [math.log(a) for a in y]
    n, mu, mv = len(u), math.fsum(u) / len(u), math.fsum(v) / len(v)
    suu = math.fsum((a - mu) ** 2 for a in u)
    a = math.fsum((p - mu) * (q - mv) for p, q in zip(u, v, strict=True)) / suu
    rest = math.fsum((q - mv - a * (p - mu)) ** 2 for p, q in zip(u, v, strict=True))
    half = T95[n - 3] * math.sqrt(rest / (n - 2) / suu)
    return Figure(name, a, a - half, a + half, n)


def judge(figure: Figure, above: float) -> str:
    """`HOLDS` when the whole interval lies above the threshold, `FAILS` when all of it lies below, else `OPEN`.

    A figure without an interval (one seed) is judged by its value.

    >>> judge(Figure("gain", 0.2, 0.1, 0.3), above=0.0), judge(Figure("gain", 0.2, -0.1, 0.5), above=0.0)
    ('holds', 'not reproduced at this scale')
    """
    low = figure.value if figure.low is None else figure.low
    high = figure.value if figure.high is None else figure.high
    return HOLDS if low > above else FAILS if high < above else OPEN


def all_of(*verdicts: str) -> str:
    """One verdict from several conditions that must all be met: any `FAILS` fails, else any `OPEN` leaves it open.

    >>> all_of(HOLDS, OPEN), all_of(OPEN, FAILS, HOLDS), all_of(HOLDS, HOLDS)
    ('not reproduced at this scale', 'does not hold', 'holds')
    """
    if not verdicts:
        raise ValueError("all_of: no verdicts; accepted: at least one")
    return next((v for v in (FAILS, OPEN) if v in verdicts), HOLDS)


def spearman(name: str, x: Sequence[float], y: Sequence[float]) -> Figure:
    """Spearman's rank correlation of pairs; equal values share the mean of their ranks. No interval.

    >>> spearman("rank", [1, 2, 3, 4], [1, 8, 27, 64]).value, round(spearman("rank", [1, 1, 2], [1, 2, 3]).value, 3)
    (1.0, 0.866)
    """
    if len(x) != len(y) or min(len(set(x)), len(set(y))) < 2:
        raise ValueError(
            f"spearman({name!r}): {len(x)} and {len(y)} values; accepted: pairs, not all values equal"
        )
    u, v = _ranks(x), _ranks(y)
    middle = (len(x) - 1) / 2
    products = [math.fsum((a - middle) * (b - middle) for a, b in zip(*pair, strict=True))
                for pair in ((u, v), (u, u), (v, v))]  # fmt: skip
    return Figure(name, products[0] / math.sqrt(products[1] * products[2]), n=len(x))


def _ranks(values: Sequence[float]) -> list[float]:
    """0 for the smallest; equal values get the mean of their ranks."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
