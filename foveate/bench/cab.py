"""CAB: which of the four uses of attention an operator supports, one score per use, and where it breaks even."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor


class AttentionPattern(Enum):
    """The four uses: causal or not, self or cross.

    Causal cross: row i of the result may depend on the queries up to i alone, and on the whole memory. Softmax does so
    by itself; what pools queries does not.

    >>> AttentionPattern.CC.causal, AttentionPattern.CC.cross, AttentionPattern["NS"].value
    (True, True, 'noncausal self')
    """

    NS = "noncausal self"
    CS = "causal self"
    NC = "noncausal cross"
    CC = "causal cross"

    @property
    def causal(self) -> bool:
        return self in (AttentionPattern.CS, AttentionPattern.CC)

    @property
    def cross(self) -> bool:
        return self in (AttentionPattern.NC, AttentionPattern.CC)


Operator = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, H, N, D), k, v (B, H, M, D) -> (B, H, N, D)
Factory = Callable[[AttentionPattern], "Operator | None"]  # None: not defined for this use
TOLERANCE = 1e-4


# ------------------------------------------------------------------------------------------------ the validator
def supported_patterns(
    factory: Factory, *, dim: int = 64, heads: int = 4, n: int = 50, m: int = 100
) -> dict[AttentionPattern, bool]:
    """Which uses an operator really supports, whatever it declares.

    Args:
        factory: a use -> the operator for it, or None where there is none. An operator that has
            `initial_state(q, k, v)` is called as `op(q, k, v, state=s) -> (out, s)` too, one token at a time.
        dim, heads: width of all heads together, and their number.
        n, m: tokens, and tokens of the memory in the cross uses.

    Returns:
        for each use, whether `refusal` finds nothing.

    Source: CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (2022).

    >>> softmax = torch.nn.functional.scaled_dot_product_attention
    >>> [p.name for p, fine in supported_patterns(lambda pattern: softmax).items() if fine]
    ['NS', 'NC', 'CC']
    """
    if heads < 1 or dim % heads or n < 2 or m < 1:
        raise ValueError(
            "supported_patterns: dim must be a multiple of heads, n >= 2, m >= 1; "
            f"got dim={dim}, heads={heads}, n={n}, m={m}"
        )
    found = {}
    for pattern in AttentionPattern:
        op = factory(pattern)
        found[pattern] = op is not None and refusal(op, pattern, dim=dim, heads=heads, n=n, m=m) is None
    return found


@torch.no_grad()
def refusal(
    op: Operator, pattern: AttentionPattern, *, dim: int = 64, heads: int = 4, n: int = 50, m: int = 100
) -> str | None:
    """Why an operator does not support a use; None where it does.

    It must take the shapes (a ValueError or NotImplementedError of its own is a refusal) and give finite results. In
    the causal uses row i, for i in the second half, must be what it is without the later queries (and, in self
    attention, keys), and what decoding token by token gives: the absolute differences of a row sum to less than 1e-4,
    or 1e-4 of the row where that is larger.
    """
    g = torch.Generator().manual_seed(0)
    tokens = m if pattern.cross else n
    q, k, v = (
        torch.randn(1, heads, size, dim // heads, generator=g, dtype=torch.float64)
        for size in (n, tokens, tokens)
    )
    try:
        out = op(q, k, v)
    except (ValueError, NotImplementedError) as error:
        return f"refuses {n} queries and {tokens} keys: {error}"
    if out.shape != q.shape or not bool(out.isfinite().all()):
        return f"returns {tuple(out.shape)} where {tuple(q.shape)} is due, or numbers that are not finite"
    if not pattern.causal:
        return None
    for i in range(n // 2, n):
        keys = (k, v) if pattern.cross else (k[:, :, : i + 1], v[:, :, : i + 1])
        try:
            alone = op(q[:, :, : i + 1], *keys)
        except (ValueError, NotImplementedError) as error:
            return f"refuses {i + 1} queries and {keys[0].shape[2]} keys: {error}"
        if not _same(alone[:, :, i], out[:, :, i]):
            return f"row {i} changes with what comes after it"
    if hasattr(op, "initial_state") and not pattern.cross:
        state = op.initial_state(q, k, v)  # pyright: ignore[reportFunctionMemberAccess]
        for i in range(n):
            row, state = op(*(t[:, :, i : i + 1] for t in (q, k, v)), state=state)  # pyright: ignore
            if not _same(row[:, :, 0], out[:, :, i]):
                return f"row {i} differs when decoded token by token"
    return None


def _same(got: Tensor, want: Tensor) -> bool:
    return float((got - want).abs().sum()) < TOLERANCE * max(1.0, float(want.abs().sum()))


# ------------------------------------------------------------------------------------------------- one score per use
@dataclass(frozen=True)
class Metric:
    """A metric, whether lower is better, and the mean and spread by which it is normalised."""

    name: str
    lower: bool
    mu: float
    sigma: float

    def z(self, value: float) -> float:
        """Normalised so that 0 is the mean, and one spread better is 1.

        >>> Metric("ppl", True, 20.0, 4.0).z(16.0)
        1.0
        """
        return (self.mu - value if self.lower else value - self.mu) / self.sigma


@dataclass(frozen=True)
class Task:
    """A task and its metrics, which count equally within it."""

    name: str
    metrics: tuple[Metric, ...]


Protocol = Mapping[AttentionPattern, Sequence[Task]]


def _task(name: str, *metrics: tuple[str, float, float]) -> Task:
    """Metrics as (name, mu, sigma); a leading minus: lower is better."""
    return Task(name, tuple(Metric(n.lstrip("-"), n[0] == "-", mu, sigma) for n, mu, sigma in metrics))


CAB_TASKS: Protocol = {
    AttentionPattern.NS: (
        _task(
            "TTS",
            ("-MCD, FastSpeech 2", 3.4245, 0.06832),
            ("-MSD, FastSpeech 2", 1.97429, 0.0361768),
            ("-MCD, Transformer-TTS", 4.06947, 0.09422),
            ("-MSD, Transformer-TTS", 2.19021, 0.03866),
        ),
        _task(
            "Sum",
            ("ROUGE-1", 34.88667, 1.39697),
            ("ROUGE-2", 6.79333, 1.41078),
            ("ROUGE-L", 31.96889, 1.31499),
        ),
        _task("SR", ("PSNR", 23.208, 0.27499), ("SSIM", 0.6758, 0.01557)),
        _task("MLM", ("-perplexity", 36.292, 62.30827)),
    ),
    AttentionPattern.CS: (
        _task("TTS", ("-MCD", 4.08325, 0.04529), ("-MSD", 2.20085, 0.01372)),
        _task(
            "Sum", ("ROUGE-1", 32.9575, 1.92754), ("ROUGE-2", 6.0925, 0.41007), ("ROUGE-L", 30.2575, 1.61951)
        ),
        _task("LM", ("-perplexity", 22.26, 8.29944)),
    ),
    AttentionPattern.NC: (
        _task("PCC", ("-CD-l1", 7.7025, 0.64789), ("-CD-l2", 0.24775, 0.03366), ("F-score", 0.7625, 0.03906)),
        _task(
            "LSTF",
            ("-MSE, ETT", 1.18933, 0.05615),
            ("-MAE, ETT", 0.80625, 0.02193),
            ("-MSE, ECL", 0.47575, 0.01057),
            ("-MAE, ECL", 0.511, 0.00601),
            ("-MSE, Weather", 0.62025, 0.18948),
            ("-MAE, Weather", 0.58075, 0.10312),
        ),
    ),
    AttentionPattern.CC: (
        _task("TTS", ("-MCD", 5.5037, 1.29239), ("-MSD", 2.6278, 0.42726)),
        _task("Sum", ("ROUGE-1", 31.35, 3.77103), ("ROUGE-2", 5.26, 1.26028), ("ROUGE-L", 28.8, 3.28638)),
    ),
}
"""The tasks and metrics of each use, in the order of the released scripts, with their constants."""


def compositional_index(
    scores: Mapping[AttentionPattern, Sequence[float]], protocol: Protocol = CAB_TASKS
) -> dict[AttentionPattern, float]:
    """One score per use: the mean over its tasks of the mean over a task's metrics of their normalised values.

        z = +-(x - mu) / sigma,   I_P = mean over tasks of mean over metrics of z      (minus: lower is better)

    Args:
        scores: for each use that the method supports, the values of all its metrics, in the order of the protocol.
        protocol: tasks and metrics of each use.

    Raises:
        ValueError: another number of values than metrics, or a use without tasks.

    >>> means = [m.mu for task in CAB_TASKS[AttentionPattern.CC] for m in task.metrics]
    >>> compositional_index({AttentionPattern.CC: means})[AttentionPattern.CC]
    0.0
    """
    found = {}
    for pattern, values in scores.items():
        tasks = protocol.get(pattern, ())
        expected = sum(len(task.metrics) for task in tasks)
        if len(values) != expected or not expected:
            raise ValueError(
                f"compositional_index: {len(values)} values for {pattern.name}; accepted: {expected}, one for each of "
                + ", ".join(f"{task.name} {m.name}" for task in tasks for m in task.metrics)
            )
        rest, means = iter(values), []
        for task in tasks:
            means.append(math.fsum(m.z(next(rest)) for m in task.metrics) / len(task.metrics))
        found[pattern] = math.fsum(means) / len(means)
    return found


# --------------------------------------------------------------------------------------------- where it breaks even
def efficiency_length(
    lengths: Sequence[float],
    vanilla: Sequence[float],
    candidate: Sequence[float],
    *,
    skip_first: bool = False,
) -> float:
    """The length from which a method costs less than plain attention, from costs measured at some lengths.

        vanilla ~ a N^2 + b N + c,   candidate ~ d N + g,   the larger root of a N^2 + (b - d) N + (c - g) = 0

    Both fits are least squares. The result is 0 where the line lies below the quadratic at every N >= 0.

    Args:
        lengths: N, at least 3 different ones; vanilla, candidate: time, bytes or multiply-adds at each.
        skip_first: leave the first length out of the candidate's fit, as is done for times.

    Raises:
        ValueError: too few points, or a quadratic that does not bend upwards (a <= 0): no length can be told.

    >>> n = [256, 512, 1024, 2048]
    >>> round(efficiency_length(n, [x * x for x in n], [600 * x for x in n]), 6)
    600.0
    """
    x, y, z = (np.asarray(values, dtype=np.float64) for values in (lengths, vanilla, candidate))
    if x.ndim != 1 or x.shape != y.shape or x.shape != z.shape or len(np.unique(x)) < 3 + skip_first:
        raise ValueError(
            f"efficiency_length: costs at one list of at least {3 + skip_first} lengths; got {len(x)} lengths, "
            f"{len(y)} and {len(z)} costs"
        )
    unit = x.max()  # lengths of about 1 keep the fit well conditioned
    a, b, c = np.polyfit(x / unit, y, 2)
    d, g = np.polyfit(x[skip_first:] / unit, z[skip_first:], 1)
    if a <= 1e-9 * abs(y).max():
        raise ValueError(f"efficiency_length: the vanilla costs do not bend upwards (a = {a / unit**2:.3g})")
    inside = (b - d) ** 2 - 4 * a * (c - g)
    if inside < 0:
        return 0.0
    return max(0.0, float((d - b + math.sqrt(inside)) / (2 * a)) * float(unit))
