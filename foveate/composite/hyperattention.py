"""HyperAttention: heavy pairs gathered by a hash and computed exactly, all others estimated from sampled keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from foveate.composite.halves import blend, causal_by_halves, partial, piece_count
from foveate.core.layout import TILE, BlockLayout, pack_bits, tiles
from foveate.core.merge import State
from foveate.core.patterns.documents import Documents
from foveate.core.scores.bias import Bias

MOST_PROJECTIONS = 24
SAMPLINGS = ("uniform", "value_norm")
CODE_ORDERS = ("gray_rank", "release")


@dataclass(frozen=True)
class HyperAttention:
    """Approximate softmax attention in near-linear time.

    With b = block, m = samples, M keys, and everything per head:

    1. Hash. code(x) = rank of the sign bits [x R > 0] in the reflected Gray sequence, R (D, n_proj) normal, the same
       for all heads, queries and keys. Sort queries and keys by code (stable).
    2. Exact part. Sorted keys in blocks of b; sorted query i goes with block t(i) = floor(i M / N) // b:
           (o1, l1) = attention(q_i, K_t, V_t)
    3. Estimate. m keys uniformly with replacement, those of block t masked:
           (o2, l2) = attention(q_i, K_m, V_m),   l2 <- l2 + log(M / m)
       Numerator and denominator are each unbiased for what lies outside of block t.
    4. o, l = merge of both; undo the sort.

    Causal: the sequence is halved again and again, and this estimates what the second half reads in the first
    (`causal_by_halves`). Keys and values after a token never reach it; later queries of its piece may, because they
    share its sort: as a language model's attention it is for whole prompts, not for decoding.

    Cost: N (b + m) pairs, for causal attention half of it per level, and no tensor of N x N.

    Args:
        block: keys per exact block; 0 leaves the exact part out. Multiples of 64 make full tiles.
        samples: sampled keys m; 0 leaves the estimate out.
        n_proj: bits of the hash, 0 to 24; 0 leaves the order of tokens as it is.
        min_seq_len: this many queries or fewer are computed exactly, without a mask; under a causal mask pieces
            of min_seq_len to 2 min_seq_len - 1 tokens are.
        is_causal: causal form; needs as many queries as keys.
        sampling: "uniform", or "value_norm": with probability p_j proportional to |v_j|^2 and weight 1 / (m p_j). Keys
            without a value are then never drawn, so that the denominator misses them.
        code_order: "gray_rank", in which buckets next to each other differ in one bit, or "release", the order of
            the paper's code, in which they need not for n_proj >= 3.
        seed: of R and of the samples. Samples differ between heads and pieces, and are the same for every batch row.

    Called with q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), H a multiple of Hkv: out (B, H, N, Dv) in the
    dtype of q; with return_lse also lse (B, H, N) in float32 (float64 for float64). Gradients pass through all that is
    computed; the choice of keys has none. float64 runs on the dense reference engine.

    Raises:
        ValueError: settings out of range, shapes that do not fit, a causal call with N != M.

    Source: HyperAttention: Long-context Attention in Near-Linear Time (2023). Differs from the released code: Gray
    rank instead of Gray encoding; blocks of any lengths, ragged ones masked where the release pads with zero keys that
    weigh exp(0); grouped heads; samples shared by batch rows; weights by value norm.

    >>> import torch
    >>> q = k = v = torch.randn(1, 2, 1000, 16, generator=torch.Generator().manual_seed(0))
    >>> hyper = HyperAttention(block=64, samples=64, min_seq_len=128, is_causal=True)
    >>> hyper(q, k, v).shape
    torch.Size([1, 2, 1000, 16])
    """

    block: int = 256
    samples: int = 256
    n_proj: int = 7
    min_seq_len: int = 4096
    is_causal: bool = False
    sampling: str = "uniform"
    code_order: str = "gray_rank"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("block", None), ("samples", None), ("n_proj", MOST_PROJECTIONS),
                           ("min_seq_len", None), ("seed", None)):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value < 0 or (most is not None and value > most):
                accepted = "an int >= 0" if most is None else f"an int from 0 to {most}"
                raise ValueError(f"HyperAttention.{name} must be {accepted}, got {value!r}")
        if not self.block and not self.samples:
            raise ValueError("HyperAttention.block and samples are both 0; accepted: at most one of them")
        if not isinstance(self.is_causal, bool):
            raise ValueError(f"HyperAttention.is_causal must be a bool, got {self.is_causal!r}")
        for name, accepted in (("sampling", SAMPLINGS), ("code_order", CODE_ORDERS)):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"HyperAttention.{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}"
                )

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: Literal[True]
    ) -> State: ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False
    ) -> Tensor | State:
        """out (B, H, N, Dv), and lse (B, H, N) with return_lse; `scale` as in `attention`."""
        check(q, k, v)
        g = torch.Generator().manual_seed(self.seed)
        projections = torch.randn(q.shape[3], self.n_proj, generator=g).to(q.device)

        def estimate(q: Tensor, k: Tensor, v: Tensor) -> State:
            return self._estimate(q, k, v, projections, g, scale)

        if self.is_causal:
            out, lse = causal_by_halves(q, k, v, estimate, leaf=max(1, self.min_seq_len), scale=scale)
        elif q.shape[2] <= self.min_seq_len:
            out, lse = partial(q, k, v, scale=scale)
        else:
            out, lse = estimate(q, k, v)
        return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)

    def pairs(self, n: int) -> int:
        """Pairs of a query and a key whose score a head computes for n tokens, samples that are masked included.

        >>> HyperAttention(min_seq_len=0).pairs(32_768), HyperAttention(is_causal=True).pairs(32_768)
        (16777216, 92291072)
        """
        if not self.is_causal:
            return n * n if n <= self.min_seq_len else self._pairs(n)
        pieces = piece_count(n, max(1, self.min_seq_len))
        size, far = n // pieces, 0
        even = size * pieces
        exact = pieces * size * (size + 1) // 2 + (n * (n + 1) - even * (even + 1)) // 2
        while pieces > 1:
            pieces //= 2
            far, size = far + pieces * self._pairs(size), 2 * size
        return exact + far

    def _pairs(self, n: int) -> int:
        """Pairs of an estimate with n queries and n keys."""
        if not self.block:
            return n * self.samples
        whole, rest = divmod(n, self.block)
        return whole * self.block**2 + rest**2 + (n * self.samples if n > self.block else 0)

    def _estimate(
        self, q: Tensor, k: Tensor, v: Tensor, projections: Tensor, g: torch.Generator, scale: float | None
    ) -> State:
        m, heads = k.shape[2], q.shape[1]
        q_order, k_order = (
            torch.sort(hash_codes(x, projections, self.code_order), stable=True).indices for x in (q, k)
        )
        positions = log_weights = None
        if self.samples and self.sampling == "uniform":
            positions = torch.randint(m, (1, heads, self.samples), generator=g).sort().values.to(q.device)
            log_weights = math.log(m / self.samples)
        elif self.samples:
            draws = (
                torch.rand(1, heads, self.samples, generator=g, dtype=torch.float64)
                .sort()
                .values.to(q.device)
            )
            positions, log_weights = by_value_norm(rows(v, k_order), draws)
        return sorted_attention(q, k, v, q_order, k_order, self.block, positions, log_weights, scale)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless these are the queries, keys and values of one call with grouped heads."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.ndim != 4 or 0 in t.shape:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), none 0; got {got}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q (B, H, N, D) and k (B, Hkv, M, D) must share B and D, with heads H a multiple of Hkv; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k and v must share batch, heads and length; got {tuple(k.shape)} and {tuple(v.shape)}"
        )


# ------------------------------------------------------------------------------------------------ hash and order
@torch.no_grad()
def hash_codes(x: Tensor, projections: Tensor, order: str = "gray_rank") -> Tensor:
    """(..., D) -> int32 (...): the bucket's place in the sort, from the signs of x R, R (D, r).

    >>> import torch
    >>> hash_codes(torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]), torch.eye(2)).tolist()
    [1, 2, 3]
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    bits = torch.matmul(x.to(wide), projections.to(wide)) > 0  # (..., r)
    powers = 2.0 ** torch.arange(bits.shape[-1], device=x.device)
    bins = torch.mv(bits.flatten(0, -2).float(), powers).to(torch.int32).view(bits.shape[:-1])
    return gray_rank(bins) if order == "gray_rank" else bins ^ (bins >> 1)


def gray_rank(bins: Tensor) -> Tensor:
    """i such that i xor (i >> 1) is the number: the xor of all its right shifts.

    >>> import torch
    >>> gray_rank(torch.tensor([0, 1, 3, 2, 6, 7, 5, 4])).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    for shift in (1, 2, 4, 8, 16):
        bins = bins ^ (bins >> shift)
    return bins


def rows(x: Tensor, at: Tensor) -> Tensor:
    """x (B, h, n, d) at positions (B or 1, h, s) -> (B, h, s, d)."""
    b, h, n, d = x.shape
    start = torch.arange(b * h, device=x.device).view(b, h, 1) * n
    return x.reshape(-1, d).index_select(0, (at + start).flatten()).view(b, h, -1, d)


# ------------------------------------------------------------------------------------------------------- sampling
def by_value_norm(v: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Keys drawn with p_j = |v_j|^2 / sum |v|^2, and the logarithms of their weights 1 / (m p_j).

    Args:
        v: (B, Hkv, M, Dv); draws: (1, H, m) in [0, 1), the places in the cumulative sum.

    Returns:
        positions int64 (B, H, m) and log weights (B, H, m), through which gradients reach v. A head whose values are
        all 0 draws uniformly.
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    heads, m = draws.shape[1:]
    top = v.detach().abs().amax((2, 3), keepdim=True).to(wide)
    mass = (v.to(wide) / torch.where(top > 0, top, 1)).square().sum(-1)  # (B, Hkv, M), without overflow
    mass = torch.where(top.squeeze(-1) > 0, mass, torch.ones_like(mass))
    p = mass / mass.sum(-1, keepdim=True)
    sums = p.detach().double().cumsum(-1)
    place = draws.view(1, v.shape[1], -1) * sums[..., -1:]  # (B, Hkv, H / Hkv * m)
    at = torch.searchsorted(sums, place, right=True).clamp_max(v.shape[2] - 1)
    return at.view(-1, heads, m), -(m * p.gather(2, at)).log().view(-1, heads, m)


# ------------------------------------------------------------------------------------------------------ attention
def sorted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    block: int,
    positions: Tensor | None,
    log_weights: Tensor | float | None,
    scale: float | None = None,
) -> State:
    """Steps 2 to 4 in given orders with given samples.

    Args:
        q_order: (B, H, N); k_order: (B, Hkv, M): permutations.
        block: keys per exact block, or 0 for none.
        positions: (B or 1, H, m), the samples as places in the sorted keys of the head, or None.
        log_weights: what each sample's logit gets, a number or (B, H, m).

    Returns:
        (out, lse), out in float32 (float64 for float64).
    """
    n, m = q.shape[2], k.shape[2]
    q_sorted, k_sorted, v_sorted = rows(q, q_order), rows(k, k_order), rows(v, k_order)
    k_blocks = np.arange(m) // (block or m)
    q_blocks = np.arange(n) * m // n // (block or m)
    states: list[State] = []
    if block:
        who = Documents(q_blocks, k_blocks) if m > block else None
        states.append(partial(q_sorted, k_sorted, v_sorted, who=who, scale=scale))
    if positions is not None and m > block:
        shared = positions.reshape(len(positions), k.shape[1], -1)  # a group's samples read one key head
        k_drawn, v_drawn = (rows(t, shared).view(*q.shape[:2], -1, t.shape[3]) for t in (k_sorted, v_sorted))
        who = without_own_block(q_blocks, positions // block) if block else None
        score = Bias(log_weights.unsqueeze(2)) if isinstance(log_weights, Tensor) else None
        out, lse = partial(q_sorted, k_drawn, v_drawn, who=who, score=score, scale=scale)
        states.append((out, lse + log_weights if isinstance(log_weights, float) else lse))
    out, lse = states[0]
    out = out.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    if len(states) == 2:
        out, lse = blend((out, lse), states[1])
    back = torch.empty_like(q_order).scatter_(2, q_order, torch.arange(n, device=q.device).expand_as(q_order))
    return rows(out, back), lse.gather(2, back)


def without_own_block(q_blocks: np.ndarray, drawn: Tensor) -> BlockLayout:
    """The layout in which query i may see sample j iff their blocks differ.

    Args:
        q_blocks: (N,), block of each query; drawn: (batch, heads, m), block of each sample.
    """
    batch, heads, m = drawn.shape
    n, nq, mt = len(q_blocks), tiles(len(q_blocks)), tiles(m)
    block_of = np.pad(q_blocks, (0, nq * TILE - n), mode="edge").reshape(nq, TILE)
    samples = np.pad(drawn.cpu().numpy().reshape(-1, m), ((0, 0), (0, mt * TILE - m)), constant_values=-1)
    samples = samples.reshape(-1, 1, mt, TILE)
    first, last = block_of[:, :1, None], block_of[:, -1:, None]  # blocks rise with the sorted query
    meets = ((samples >= first) & (samples <= last)).any(-1)  # (batch * heads, nq, mt)
    which = np.full(meets.shape, -1)
    which[meets] = np.arange(meets.sum())
    head, i, j = np.nonzero(meets)
    words = pack_bits(block_of[i][:, :, None] != samples[head, 0, j][:, None, :])  # (tiles, 64)
    lists = batch * heads * nq
    return BlockLayout.from_tiles(
        n, m, np.repeat(np.arange(lists), mt), np.tile(np.arange(mt), lists), words, batch=batch, heads=heads,
        which=which.reshape(-1),
    ).to(drawn.device)  # fmt: skip
