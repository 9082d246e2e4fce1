"""CCA: finished groups of tokens fold into core tokens, read in one softmax with an exact window nearby."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from foveate.core.attention import attention
from foveate.core.layout import TILE
from foveate.core.merge import merge
from foveate.core.patterns.base import Pattern, integer, verdict
from foveate.core.rotary import Rope, Rotary


@dataclass(frozen=True, repr=False)
class CoreTokens(Pattern):
    """Which core tokens a query sees: those whose group ended at least `local` tokens ago.

        query at position t (from 1) sees the first floor((t - s) / g) of them, none where t < s

    Args:
        group: g, tokens of a group, >= 1.
        local: s, tokens that stay exact, >= 1.
        first: tokens before query 0.

    >>> CoreTokens(2, 3).layout(7, 2).to_dense()[0, 0].int().tolist()
    [[0, 0], [0, 0], [0, 0], [0, 0], [1, 0], [1, 0], [1, 1]]
    """

    group: int
    local: int
    first: int = 0

    def __post_init__(self) -> None:
        _sizes(self, "CoreTokens", first=0)

    def contains(self, ext, b, h, q, k):
        return k < (q + self.first + 1 - self.local) // self.group

    def classify(self, ext, b, h, q0, q1, k0, k1):
        least, most = ((q + self.first + 1 - self.local) // self.group for q in (q0, q1 - 1))
        return verdict(k0 >= most, k1 <= least)

    def signature(self, ext, b, h, qt, kt):
        x = TILE * qt + self.first + 1 - self.local
        return x % self.group, x // self.group - TILE * kt


@dataclass(frozen=True, repr=False)
class CoreWindow(Pattern):
    """Which keys a query still sees as they are: those behind its last visible group, up to itself (bottom-right).

        query at position t (from 1) sees the keys g floor((t - s) / g) + 1 .. t, all of them where t < s

    between s and s + g - 1 keys. What `CoreTokens` leaves out, without a gap.

    Args:
        group, local: g and s of `CoreTokens`.
        start: tokens before key 0.

    >>> CoreWindow(2, 3).layout(7).to_dense()[0, 0, 4:].int().tolist()
    [[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]
    """

    group: int
    local: int
    start: int = 0

    def __post_init__(self) -> None:
        _sizes(self, "CoreWindow", start=0)

    def contains(self, ext, b, h, q, k):
        return (k >= self._low(ext, q)) & (k <= q + ext.offset)

    def _low(self, ext: Any, q: np.ndarray) -> np.ndarray:
        return (q + ext.offset + self.start + 1 - self.local) // self.group * self.group - self.start

    def classify(self, ext, b, h, q0, q1, k0, k1):
        empty = (k0 > q1 - 1 + ext.offset) | (k1 <= self._low(ext, q0))
        return verdict(empty, (k1 - 1 <= q0 + ext.offset) & (k0 >= self._low(ext, q1 - 1)))

    def signature(self, ext, b, h, qt, kt):
        return (TILE * qt + ext.offset + self.start + 1 - self.local) % self.group, qt - kt


def _sizes(pattern: Any, owner: str, **others: int) -> None:
    for name, least in {"group": 1, "local": 1, **others}.items():
        object.__setattr__(pattern, name, integer(owner, name, getattr(pattern, name), least))


def pool_core(
    q_eval: Tensor,
    k_pre: Tensor,
    v: Tensor,
    group: int,
    *,
    k_scored: Tensor | None = None,
    scale: float | None = None,
    pool: str = "evaluator",
) -> tuple[Tensor, Tensor, Tensor]:
    """Core keys and values of whole groups.

        a_m = mean over the query heads of a key head of softmax_j(scale q_m . k_j),  j over the g tokens of group m
        k_core_m = sum_j a_mj k_j,   v_core_m = sum_j a_mj v_j

    Args:
        q_eval: (B, H, M, D), the query of the last token of each group, rotated as the scored keys are.
        k_pre: (B, Hkv, M g, D), the keys that are averaged; v: (B, Hkv, M g, Dv).
        group: g.
        k_scored: the keys that make the weights, where they are others than k_pre: the rotated ones.
        scale: factor on the logits; default D ** -0.5.
        pool: "evaluator" as above, or "mean": a = 1 / g, the plain average.

    Returns:
        k_core (B, Hkv, M, D), v_core (B, Hkv, M, Dv) in the dtypes of k_pre and v, and the weights (B, Hkv, M, g) in
        float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, a group that does not divide the keys, an unknown pool.

    Source: Core Context Aware Attention for Long Context Language Modeling (2024). Weights of grouped heads are
    averaged, which the paper does not say.

    >>> q, k = torch.randn(1, 4, 2, 8), torch.ones(1, 2, 6, 8)
    >>> core, _, weights = pool_core(q, k, k, 3)
    >>> core.shape, weights.shape, bool((core - 1).abs().max() < 1e-6)
    (torch.Size([1, 2, 2, 8]), torch.Size([1, 2, 2, 3]), True)
    """
    group = integer("pool_core", "group", group, 1)
    _pooling("pool_core", pool)
    scored = k_pre if k_scored is None else k_scored
    batch, heads, m, dim = _shape("q_eval", q_eval)
    kv_heads = _shape("k_pre", k_pre)[1]
    if (
        heads % kv_heads
        or _shape("v", v)[:3] != (batch, kv_heads, m * group)
        or tuple(k_pre.shape) != (batch, kv_heads, m * group, dim)
        or scored.shape != k_pre.shape
    ):
        raise ValueError(
            f"pool_core: q_eval (B, H, M, D) and {group} keys and values per evaluator, H a multiple of Hkv, are "
            f"accepted; got q_eval {tuple(q_eval.shape)}, k_pre {tuple(k_pre.shape)}, v {tuple(v.shape)}"
            + ("" if k_scored is None else f", k_scored {tuple(k_scored.shape)}")
        )
    wide = torch.float64 if q_eval.dtype == torch.float64 else torch.float32
    groups = lambda x: x.to(wide).unflatten(2, (m, group))  # noqa: E731  (B, Hkv, M, g, D)
    if pool == "mean":
        weights = torch.full((batch, kv_heads, m, group), 1 / group, dtype=wide, device=v.device)
    else:
        queries = q_eval.to(wide).unflatten(1, (kv_heads, -1)).transpose(2, 3)  # (B, Hkv, M, G, D)
        logits = queries @ groups(scored).mT * (dim**-0.5 if scale is None else scale)  # (B, Hkv, M, G, g)
        weights = torch.softmax(logits, -1).mean(3)
    k_core, v_core = ((weights.unsqueeze(3) @ groups(x)).squeeze(3).to(x.dtype) for x in (k_pre, v))
    return k_core, v_core, weights


def cca_attention(
    q: Tensor,
    k_pre: Tensor,
    v: Tensor,
    *,
    group: int = 16,
    local: int = 1024,
    rope: Rope | None = None,
    position_ids: Tensor | None = None,
    pool_rope: str = "pre",
    pool: str = "evaluator",
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Causal attention to core tokens of the finished groups and to an exact window, in one softmax.

    Positions t from 1, groups of g tokens, group m ending at its evaluator m g. With n(t) = max(0, floor((t - s) / g)),

        out_t = softmax(scale q_t [k_core_1 .. k_core_n(t), k_(n(t) g + 1) .. k_t]) [v_core_1 .., v_(n(t) g + 1) ..]

    and core keys and values as in `pool_core`: every past token is read once, in its core token or as it is. Computed
    in two calls whose results are merged by their log-sum-exp, which is the one softmax. Pairs per query:
    n(t) + s .. s + g - 1, so N / (2 g) + s on average, of N / 2 in dense attention.

    Args:
        q: (B, H, N, D); k_pre: (B, Hkv, N, D), both before rotation; v: (B, Hkv, N, Dv). H is a multiple of Hkv.
        group: g, tokens per core token. 1 is dense causal attention.
        local: s, tokens that are always read as they are, >= 1; local >= N is dense causal attention.
        rope: rotates queries and keys: (x, positions) -> x, as `foveate.core.rotary.Rotary`; None for no positions.
        position_ids: int (N,) or (B, N); default 0 .. N - 1. Groups are made of the tokens in their order.
        pool_rope: "pre" averages keys before rotation and rotates the core key to its evaluator's position; "post"
            averages rotated keys.
        pool: "evaluator", or "mean": the plain average, for comparison.
        scale, engine: as in `attention`.

    Returns:
        (B, H, N, Dv) in q's dtype. Gradients of q, k_pre and v, through the pooling too.

    Raises:
        ValueError, TypeError: what does not fit, by name. Fewer queries than keys need a `CCACache`: the queries of
            earlier tokens make the core tokens.

    Source: Core Context Aware Attention for Long Context Language Modeling (2024). A trained model swapped to it as
    it is loses quality: its queries and keys are meant to be trained on. Differs: how core keys are rotated and how
    grouped heads are pooled are not in the paper.

    >>> q, k, v = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    >>> cca_attention(q, k, v, group=4, local=16, rope=Rotary()).shape
    torch.Size([1, 4, 100, 16])
    """
    cache = CCACache(group, local, rope=rope, pool_rope=pool_rope, pool=pool, scale=scale, engine=engine)
    return cache.step(q, k_pre, v, position_ids)


class CCACache:
    """Keys and values of `cca_attention` while tokens arrive: core tokens and the window, no more.

        cache = CCACache(group, local, rope=rope)
        out = cache.step(q, k_pre, v)  # any number of tokens at a time, equal to the parallel form

    A core token is made when its group ends and kept aside until it becomes visible; then the window lets its tokens
    go. Between two calls there are at most floor(t / g) + s + g - 1 pairs of a key and a value after t tokens. Where
    keys are pooled before rotation, at most g - 1 unrotated keys of the open group are kept besides.

    Tensors are replaced, never written to: a shallow `copy()` is an independent cache.

    Args:
        group, local, rope, pool_rope, pool, scale, engine: as in `cca_attention`.

    Source: Core Context Aware Attention for Long Context Language Modeling (2024).

    >>> cache = CCACache(4, 8)
    >>> for _ in range(30):
    ...     x = torch.randn(1, 2, 1, 16)
    ...     out = cache.step(x, x, x)
    >>> cache.length, cache.pairs, out.shape
    (30, 17, torch.Size([1, 2, 1, 16]))
    """

    def __init__(
        self,
        group: int = 16,
        local: int = 1024,
        *,
        rope: Rope | None = None,
        pool_rope: str = "pre",
        pool: str = "evaluator",
        scale: float | None = None,
        engine: str = "auto",
    ) -> None:
        self.group = integer("CCA", "group", group, 1)
        self.local = integer("CCA", "local", local, 1)
        if rope is not None and not callable(rope):
            raise TypeError(
                f"CCA: rope must be a function of (x, positions) or None, got {type(rope).__name__}"
            )
        if pool_rope not in ("pre", "post"):
            raise ValueError(f"CCA: pool_rope must be one of pre, post, got {pool_rope!r}")
        _pooling("CCA", pool)
        self.rope, self.pool_rope, self.pool, self.scale, self.engine = rope, pool_rope, pool, scale, engine
        self.length = 0  # t, tokens so far
        self.start = 0  # of them, those before the window
        self.core: tuple[Tensor, Tensor] | None = None  # (B, Hkv, floor(t / g), D) each, rotated
        self.window: tuple[Tensor, Tensor] | None = None  # (B, Hkv, t - start, D) each, rotated
        self.open: Tensor | None = None  # (B, Hkv, t mod g, D) unrotated

    def copy(self) -> CCACache:
        """A cache that goes on from here by itself."""
        return copy.copy(self)

    def visible(self, t: int) -> int:
        """Core tokens that token t (from 1) reads: max(0, floor((t - s) / g))."""
        return max(0, (t - self.local) // self.group)

    @property
    def pairs(self) -> int:
        """Pairs of a key and a value held, per batch row and key head."""
        return sum(held[0].shape[2] for held in (self.core, self.window) if held is not None)

    @property
    def nbytes(self) -> int:
        """Bytes held: pairs, and the unrotated keys of the open group."""
        held = [*(self.core or ()), *(self.window or ())] + ([] if self.open is None else [self.open])
        return sum(t.numel() * t.element_size() for t in held)

    def append(self, q: Tensor, k_pre: Tensor, v: Tensor, position_ids: Tensor | None = None) -> None:
        """Take tokens in without asking for their outputs; arguments as in `step`."""
        self._take(q, k_pre, v, position_ids)
        self._forget(self.visible(self.length))

    def step(self, q: Tensor, k_pre: Tensor, v: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Take the next n tokens in and return their outputs.

        Args:
            q: (B, H, n, D); k_pre: (B, Hkv, n, D), both before rotation; v: (B, Hkv, n, Dv).
            position_ids: int (n,) or (B, n); default t .. t + n - 1.
        """
        n, before = q.shape[2], self.length
        queries = self._take(q, k_pre, v, position_ids)
        self._forget(self.visible(before + 1))
        window = cast("tuple[Tensor, Tensor]", self.window)
        read = {"scale": self.scale, "engine": self.engine, "return_lse": True}
        near = CoreWindow(self.group, self.local, self.start) if n > 1 else None
        states = [attention(queries, *window, near, **read)]
        if (cores := self.visible(self.length)) and self.core is not None:
            far = CoreTokens(self.group, self.local, before) if n > 1 else None
            states.append(attention(queries, *(x[:, :, :cores] for x in self.core), far, **read))  # pyright: ignore[reportCallIssue]
        self._forget(self.visible(self.length))
        return merge(states)[0] if len(states) > 1 else states[0][0]  # pyright: ignore[reportArgumentType]

    def _take(self, q: Tensor, k_pre: Tensor, v: Tensor, position_ids: Tensor | None) -> Tensor:
        """Window and core tokens with the new ones; the rotated queries."""
        self._check(q, k_pre, v, position_ids)
        n, g, before = q.shape[2], self.group, self.length
        if position_ids is None:
            position_ids = torch.arange(before, before + n, device=q.device)
        k = k_pre
        if self.rope is not None:
            q, k = self.rope(q, position_ids), self.rope(k_pre, position_ids)
        self.window = _joined(self.window, (k, v))
        self.length = before + n
        first, last = before // g, self.length // g  # groups that end among the new tokens
        averaged = None
        if self.rope is not None and self.pool_rope == "pre":
            averaged = k_pre if self.open is None else torch.cat([self.open, k_pre], 2)
            self.open = averaged[:, :, (last - first) * g :].clone()
            averaged = averaged[:, :, : (last - first) * g]
        if last > first:
            ends = slice((first + 1) * g - 1 - before, None, g)  # the evaluators among the new tokens
            keys, values = (x[:, :, first * g - self.start : last * g - self.start] for x in self.window)
            k_core, v_core, _ = pool_core(
                q[:, :, ends],
                keys if averaged is None else averaged,
                values,
                g,
                k_scored=keys,
                scale=self.scale,
                pool=self.pool,
            )
            if averaged is not None:
                k_core = cast(Rope, self.rope)(k_core, position_ids[..., ends])
            self.core = _joined(self.core, (k_core, v_core))
        return q

    def _forget(self, cores: int) -> None:
        """Let the tokens of the first `cores` groups go."""
        assert self.window is not None
        gone = cores * self.group - self.start
        if gone > 0:
            self.window = (
                self.window[0][:, :, gone:].clone(),
                self.window[1][:, :, gone:].clone(),
            )  # frees the rest
            self.start += gone

    def _check(self, q: Tensor, k_pre: Tensor, v: Tensor, position_ids: Tensor | None) -> None:
        batch, heads, n, dim = _shape("q", q)
        kv_heads = _shape("k_pre", k_pre)[1]
        if tuple(k_pre.shape) != (batch, kv_heads, n, dim) or _shape("v", v)[:3] != (batch, kv_heads, n):
            raise ValueError(
                "CCA: q (B, H, N, D), k_pre (B, Hkv, N, D) and v (B, Hkv, N, Dv) of the same tokens are accepted; got "
                f"{tuple(q.shape)}, {tuple(k_pre.shape)} and {tuple(v.shape)}"
            )
        if heads % kv_heads:
            raise ValueError(f"CCA: {heads} query heads must be a multiple of the {kv_heads} key heads")
        if position_ids is not None and tuple(position_ids.shape) not in ((n,), (batch, n)):
            raise ValueError(
                f"CCA: position_ids must have shape ({n},) or ({batch}, {n}), got {tuple(position_ids.shape)}"
            )
        if self.window is not None:
            held = tuple(self.window[0].shape)
            if (batch, kv_heads, dim) != (held[0], held[1], held[3]):
                raise ValueError(
                    f"CCA: the cache holds keys {held}; k_pre must agree but for the tokens, got {tuple(k_pre.shape)}"
                )


class CCAAttention(nn.Module):
    """Multi-head self-attention of a causal model by `cca_attention`; the parameters of ordinary attention, no more.

    Args:
        dim: width of the tokens, a multiple of heads.
        heads, kv_heads: query heads, and key heads that they share (default: as many).
        group, local, pool_rope, pool: as in `cca_attention`.
        rope: rotates queries and keys; None for no positions.
        bias: whether the four projections have biases.

    Source: Core Context Aware Attention for Long Context Language Modeling (2024).

    >>> layer = CCAAttention(32, heads=4, kv_heads=2, group=4, local=8)
    >>> layer(torch.randn(1, 50, 32)).shape
    torch.Size([1, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        group: int = 16,
        local: int = 1024,
        rope: Rope | None = Rotary(),  # noqa: B008  (frozen)
        pool_rope: str = "pre",
        pool: str = "evaluator",
        bias: bool = False,
    ) -> None:
        super().__init__()
        heads = integer("CCAAttention", "heads", heads, 1)
        kv_heads = integer("CCAAttention", "kv_heads", heads if kv_heads is None else kv_heads, 1)
        if integer("CCAAttention", "dim", dim, 1) % heads or heads % kv_heads:
            raise ValueError(
                f"CCAAttention: dim must be a multiple of heads and heads of kv_heads, got {dim}, {heads}, {kv_heads}"
            )
        self.heads, self.kv_heads, width = heads, kv_heads, dim // heads
        self.options = {"group": group, "local": local, "rope": rope, "pool_rope": pool_rope, "pool": pool}
        CCACache(**self.options)  # checks them
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(dim, kv_heads * width, bias=bias)
        self.v = nn.Linear(dim, kv_heads * width, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def initial_state(self, x: Tensor) -> CCACache:
        """The cache before the first token."""
        return CCACache(**self.options)

    def forward(self, x: Tensor, position_ids: Tensor | None = None, *, state: CCACache | None = None) -> Any:
        """x (B, N, dim) -> (B, N, dim); with a state, (out, the state after these tokens)."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        parts = zip((self.q, self.k, self.v), heads, strict=True)
        q, k, v = (project(x).unflatten(-1, (h, -1)).transpose(1, 2) for project, h in parts)
        cache = self.initial_state(x) if state is None else state.copy()
        out = self.out(cache.step(q, k, v, position_ids).transpose(1, 2).flatten(2))
        return out if state is None else (out, cache)


def _joined(held: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return new if held is None else (torch.cat([held[0], new[0]], 2), torch.cat([held[1], new[1]], 2))


def _shape(name: str, t: Tensor) -> tuple[int, ...]:
    if not isinstance(t, Tensor) or t.ndim != 4:
        got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), got {got}")
    return tuple(t.shape)


def _pooling(owner: str, pool: str) -> None:
    if pool not in ("evaluator", "mean"):
        raise ValueError(f"{owner}: pool must be one of evaluator, mean, got {pool!r}")
