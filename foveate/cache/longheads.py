"""LongHeads: each head reads its own few chunks of a long text as one short sequence, without training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.core.attention import attention
from foveate.core.block_choice import _segments  # pyright: ignore[reportPrivateUsage]
from foveate.core.layout import TILE
from foveate.core.merge import State, merge
from foveate.core.patterns.band import Causal
from foveate.core.patterns.base import integer
from foveate.core.rotary import Rope

GATHERED = 1 << 22  # elements of gathered queries that are held at once


@dataclass(frozen=True)
class LongHeadsPolicy:
    """How much of a long text each head reads at once.

    Args:
        chunk: w, keys per chunk.
        attn_length: A, keys that a query reads at most, a multiple of `chunk`; no more than the length that the model
            was trained at. P = A / w chunks.
        begin: first query that chooses, a multiple of `chunk`, at most `attn_length`; the queries before it attend to
            everything. None: attn_length.
        forced_recent: chunks that every query reads besides the first: its own and those just before it.
        offload: the cache keeps keys and values in main memory; only what is read goes to the query's device.

    >>> LongHeadsPolicy().chunks
    16
    """

    chunk: int = 256
    attn_length: int = 4096
    begin: int | None = None
    forced_recent: int = 2
    offload: bool = False

    def __post_init__(self) -> None:
        for name, least in (("chunk", 1), ("attn_length", 1), ("forced_recent", 1)):
            object.__setattr__(self, name, integer("LongHeadsPolicy", name, getattr(self, name), least))
        begin = self.attn_length if self.begin is None else self.begin
        object.__setattr__(self, "begin", integer("LongHeadsPolicy", "begin", begin, 0, self.attn_length))
        for name in ("attn_length", "begin"):
            if getattr(self, name) % self.chunk:
                raise ValueError(
                    f"LongHeadsPolicy: {name} must be a multiple of chunk = {self.chunk}, got {getattr(self, name)}"
                )
        if self.chunks < self.forced_recent + 1:
            raise ValueError(
                f"LongHeadsPolicy: attn_length must hold the first chunk and forced_recent = {self.forced_recent} more "
                f"of {self.chunk}, got {self.attn_length}"
            )
        if not isinstance(self.offload, bool):
            raise TypeError(f"LongHeadsPolicy: offload must be True or False, got {self.offload!r}")

    @property
    def chunks(self) -> int:
        """P."""
        return self.attn_length // self.chunk

    @property
    def start(self) -> int:
        """`begin`, as an int."""
        assert self.begin is not None
        return self.begin


def chunk_representation(
    q_pre: Tensor, k_pre: Tensor, v: Tensor, chunk: int, rope: Rope, *, scale: float | None = None
) -> Tensor:
    """A key for each complete chunk and query head, in the chunk's own positions.

        o_c = mean_i softmax(Q_c K_c^T / sqrt(D))_i V_c        attention within the chunk, not causal
        r_c = softmax(o_c K_c^T / sqrt(D)) K_c

    with Q_c, K_c rotated by the positions 0 ... w - 1, so where a chunk stands does not matter.

    Args:
        q_pre: (B, H, N, D) and k_pre: (B, Hkv, N, D), not rotated; v: (B, Hkv, N, D), of the same width.
        chunk: w.
        rope: (x, positions) -> rotated x, see `foveate.core.rotary.Rotary`.
        scale: factor on both logits; default D ** -0.5.

    Returns:
        (B, H, floor(N / w), D)

    >>> from foveate.core.rotary import Rotary
    >>> q, k, v = torch.randn(1, 4, 70, 8), torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 8)
    >>> chunk_representation(q, k, v, 32, Rotary()).shape
    torch.Size([1, 4, 2, 8])
    """
    _check(q_pre, k_pre, v)
    w, n = integer("chunk_representation", "chunk", chunk, 1), q_pre.shape[2]
    batch, heads, _, dim = q_pre.shape
    count, groups = n // w, heads // k_pre.shape[1]
    if not count:
        return q_pre.new_zeros(batch, heads, 0, dim)
    q, k, v = (_chunks(t[:, :, : count * w], w) for t in (q_pre, k_pre, v))  # (B C, heads, w, D)
    q, k = _rotated(rope, q), _rotated(rope, k)
    inside = attention(q, k, v, scale=scale)
    assert isinstance(inside, Tensor)
    mean = inside.mean(2).unflatten(1, (-1, groups))  # (B C, Hkv, G, D), the G query heads as rows
    found = attention(mean, k, k, scale=scale)
    assert isinstance(found, Tensor)
    return found.flatten(1, 2).unflatten(0, (batch, count)).transpose(1, 2)


def select_chunks(
    q_pre: Tensor, representations: Tensor, own: Tensor, policy: LongHeadsPolicy, kv_heads: int
) -> Tensor:
    """The chunks that each query reads: int64 (B, Hkv, n, P), ascending; -1 in front where there are fewer than P.

        score(t, c) = max over the query heads of a key head of q_t . r_c        neither rotated

    Chunk 0, the query's own and those before it (`forced_recent`) are always read; the largest scores fill up.

    Args:
        q_pre: (B, H, n, D); representations: (B, H, C, D).
        own: int64 (n,), the chunk that holds each query.
    """
    last = own - policy.forced_recent + 1  # the first of the recent chunks
    count = representations.shape[2]
    wide = torch.float64 if q_pre.dtype == torch.float64 else torch.float32
    scores = (
        (q_pre.to(wide) @ representations.to(wide).mT).unflatten(1, (kv_heads, -1)).amax(2)
    )  # (B, Hkv, n, C)
    c = torch.arange(count, device=q_pre.device)
    scores = scores.masked_fill((c == 0) | (c >= last[:, None]), -torch.inf)
    best = scores.topk(min(policy.chunks - 1 - policy.forced_recent, count), -1)
    chosen = best.indices.masked_fill(best.values == -torch.inf, -1)
    recent = own[:, None] + torch.arange(1 - policy.forced_recent, 1, device=q_pre.device)  # (n, recent)
    recent = torch.where(recent >= 1, recent, -1)
    first = torch.zeros_like(recent[:, :1])
    forced = torch.cat([first, recent], 1).expand(*chosen.shape[:2], -1, -1)
    found = torch.cat([forced, chosen], -1).sort(-1).values
    return torch.nn.functional.pad(found, (policy.chunks - found.shape[-1], 0), value=-1)


def longheads_attention(
    q_pre: Tensor,
    k_pre: Tensor,
    v: Tensor,
    policy: LongHeadsPolicy,
    rope: Rope,
    *,
    representations: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Causal attention of a long prompt in which every head reads at most `attn_length` keys, placed side by side.

    Queries before `begin` attend to everything. Query t in chunk C = floor(t / w) reads the chunks of `select_chunks`,
    renumbered in their order: key j of the s-th chosen chunk stands at s w + j, the query where its own chunk stands,
    at (S - 1) w + (t mod w) of S chosen chunks. So no distance reaches attn_length, and heads that choose different
    chunks together cover the whole text. The softmax over what is read is exact.

    A rotation by a difference of positions is all that a pair sees, so keys are rotated once, within their chunks, and
    each query once for every chunk that it reads; the queries that chose a chunk are gathered.

    Args:
        q_pre: (B, H, N, D), k_pre: (B, Hkv, N, D), before rotation; v: (B, Hkv, N, D).
        rope: (x, positions) -> rotated x; what a pair sees may depend on the difference of positions only.
        representations: (B, H, floor(N / w), D) in place of `chunk_representation`'s.
        scale, engine: as in `attention`.

    Returns:
        (B, H, N, D). First derivatives through the attention, not through the choice.

    Raises:
        ValueError: shapes that do not fit.

    Cost: N min(N, A) pairs and N^2 / w scores per head, plus N w pairs for the representations.

    Source: LongHeads: Multi-Head Attention is Secretly a Long Context Processor (2024). Differs from the released
    code: a query reads its own key also in the prefill; grouped heads, which choose together; queries before there
    are P chunks, so begin may be small; a token that completes a chunk is treated like any other.

    >>> from foveate.core.rotary import Rotary
    >>> q, k, v = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    >>> policy = LongHeadsPolicy(chunk=16, attn_length=64)
    >>> longheads_attention(q, k, v, policy, Rotary()).shape
    torch.Size([1, 4, 300, 16])
    """
    _check(q_pre, k_pre, v)
    n, w, start = q_pre.shape[2], policy.chunk, policy.start
    parts: list[Tensor] = []
    if start:
        place = torch.arange(min(start, n), device=q_pre.device)
        q, k = (rope(t[:, :, :start], place) for t in (q_pre, k_pre))
        plain = attention(q, k, v[:, :, :start], is_causal=True, scale=scale, engine=engine)
        assert isinstance(plain, Tensor)
        parts.append(plain)
    if n > start:
        if representations is None:
            with torch.no_grad():
                representations = chunk_representation(q_pre, k_pre, v, w, rope, scale=scale)
        own = torch.arange(start, n, device=q_pre.device) // w
        step = max(1, GATHERED // (q_pre.shape[0] * q_pre.shape[1] * policy.chunks * q_pre.shape[3]) // w) * w
        with torch.no_grad():
            picked = [
                select_chunks(q_pre[:, :, start + at : start + at + step], representations, own[at : at + step], policy,
                              k_pre.shape[1])
                for at in range(0, n - start, step)
            ]  # fmt: skip
        keys, values = (torch.nn.functional.pad(t, (0, 0, 0, -n % w)) for t in (k_pre, v))
        keys = _rotated(rope, keys.unflatten(2, (-1, w)))  # (B, Hkv, C, w, D)
        values = values.unflatten(2, (-1, w))
        for number, chosen in enumerate(picked):
            first = start + number * step
            some = q_pre[:, :, first : first + step]
            parts.append(_read(some, keys, values, chosen, first, policy, rope, scale, engine))
    return torch.cat(parts, 2)


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    first: int,
    policy: LongHeadsPolicy,
    rope: Rope,
    scale: float | None,
    engine: str,
) -> Tensor:
    """Queries (B, H, n, D) from position `first` = i w on, over chunks (B, Hkv, n, P) of k, v (.., C, w, D)."""
    batch, heads, n, _ = q.shape
    kv_heads, count, w = k.shape[1:4]
    inside = torch.arange(first, first + n, device=q.device) % w
    # 1. the query's own chunk, causal: rows of a batch, one per chunk
    own = slice(first // w, (first + n - 1) // w + 1)
    padded = torch.nn.functional.pad(q, (0, 0, 0, -n % w))
    mine = _rotated(rope, padded.unflatten(2, (-1, w))).transpose(1, 2).flatten(0, 1)  # (B chunks, H, w, D)
    here, values = (t[:, :, own].transpose(1, 2).flatten(0, 1) for t in (k, v))
    found = attention(mine, here, values, Causal(), scale=scale, return_lse=True, engine=engine)
    near = [t.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :n] for t in found]
    # 2. the others: all pairs of a query and a chunk, sorted by chunk
    others = chosen[..., :-1]  # the last is the query's own
    slots = others.shape[-1]
    if not slots:
        return near[0]
    back = torch.arange(slots, 0, -1, device=q.device)  # chunks between the chosen one and the own, plus 1
    turned = rope(
        q.unsqueeze(3).expand(-1, -1, -1, slots, -1).flatten(2, 3),
        (back * w + inside[:, None]).flatten(),
    ).flatten(0, 2)  # (B H n slots, D)
    place = torch.arange(batch * kv_heads, device=q.device).view(batch, kv_heads, 1, 1) * count + others
    place = place.masked_fill(others < 0, -1).repeat_interleave(heads // kv_heads, 1).flatten()
    pairs = (place >= 0).nonzero().squeeze(1)
    pairs = pairs[place[pairs].argsort(stable=True)]
    counts = torch.bincount(place[pairs], minlength=batch * kv_heads * count)
    tiles = (counts + TILE - 1) // TILE  # a tile of queries reads one chunk
    shift = tiles.cumsum(0) * TILE - tiles * TILE - (counts.cumsum(0) - counts)
    at = torch.arange(len(pairs), device=q.device) + torch.repeat_interleave(shift, counts)
    source = torch.zeros(int(tiles.sum()) * TILE, dtype=torch.int64, device=q.device)
    source = source.index_put((at,), pairs)
    shape = (batch, heads, n, slots)
    out = q.new_zeros(len(place), v.shape[-1])
    lse = q.new_full((len(place),), -torch.inf, dtype=near[1].dtype)
    if len(pairs):
        sizes = np.full(len(counts), w)
        layout = _segments(
            tiles.cpu().numpy(), np.arange(len(counts)) * w, sizes, len(source), len(counts) * w
        )
        far = attention(
            turned[source][None, None], k.flatten(0, 3)[None, None], v.flatten(0, 3)[None, None],
            layout.to(q.device), scale=scale, return_lse=True, engine=engine,
        )  # fmt: skip
        assert isinstance(far, tuple)
        out = out.index_copy(0, pairs, far[0][0, 0, at])
        lse = lse.index_copy(0, pairs, far[1][0, 0, at])
    states: list[State] = [(near[0], near[1])]
    states += zip(out.view(*shape, -1).unbind(3), lse.view(shape).unbind(3), strict=True)
    return merge(states)[0]


class LongHeadsCache:
    """Keys and values of one layer as they grow, un-rotated; what a new query reads, and where.

    Queries are kept until their chunk is complete, for its representation.

    Args:
        policy: see `LongHeadsPolicy`.
        rope: (x, positions) -> rotated x.
        scale: as in `attention`.

    >>> from foveate.core.rotary import Rotary
    >>> cache = LongHeadsCache(LongHeadsPolicy(chunk=16, attn_length=64), Rotary())
    >>> cache.append(*(torch.randn(1, 2, 200, 8) for _ in range(3)))
    >>> ids = cache.select(torch.randn(1, 2, 1, 8))  # for the last token
    >>> keys, values, position = cache.gather(ids)
    >>> ids.shape, keys.shape, position
    (torch.Size([1, 2, 4]), torch.Size([1, 2, 56, 8]), 55)
    """

    def __init__(self, policy: LongHeadsPolicy, rope: Rope, *, scale: float | None = None) -> None:
        self.policy, self.rope, self.scale = policy, rope, scale
        self._keys: Tensor | None = None  # (B, Hkv, room, D); `length` of them are used
        self._values: Tensor | None = None
        self._waiting: Tensor | None = None  # (B, H, length mod w, D)
        self._found: Tensor | None = None  # (B, H, C, D)
        self.length = 0

    @torch.no_grad()
    def append(self, q_pre: Tensor, k_pre: Tensor, v: Tensor) -> None:
        """Add tokens: q_pre (B, H, n, D), k_pre and v (B, Hkv, n, D), before rotation."""
        _check(q_pre, k_pre, v)
        w, n = self.policy.chunk, q_pre.shape[2]
        where = torch.device("cpu") if self.policy.offload else k_pre.device
        self._keys, self._values = (
            _grown(held, new.to(where), self.length) for held, new in ((self._keys, k_pre), (self._values, v))
        )
        waiting = q_pre if self._waiting is None else torch.cat([self._waiting, q_pre], 2)
        begun = self.length // w * w
        self.length += n
        whole = waiting.shape[2] // w * w
        parts = [] if self._found is None else [self._found]
        part = slice(begun, begun + whole)
        made = chunk_representation(
            waiting[:, :, :whole],
            self._keys[:, :, part].to(q_pre.device),
            self._values[:, :, part].to(q_pre.device),
            w,
            self.rope,
            scale=self.scale,
        )
        self._found = torch.cat([*parts, made], 2)
        self._waiting = waiting[:, :, whole:].clone()

    @property
    def representations(self) -> Tensor:
        """(B, H, complete chunks, D)"""
        if self._found is None:
            raise ValueError("LongHeadsCache holds no tokens; append some first")
        return self._found

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens and representations held (not of room for more)."""
        held = [self._waiting, self._found]
        held += [None if t is None else t[:, :, : self.length] for t in (self._keys, self._values)]
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def select(self, q_pre: Tensor) -> Tensor:
        """int64 (B, Hkv, S): the chunks that the last token, with query q_pre (B, H, 1, D), reads; ascending.

        All chunks up to its own where it stands before `begin`.
        """
        found, keys = self.representations, self._keys
        assert keys is not None
        if q_pre.ndim != 4 or q_pre.shape[2] != 1 or q_pre.shape[:2] != found.shape[:2]:
            raise ValueError(
                f"q_pre must be the last token's query {(*found.shape[:2], 1, found.shape[3])}, "
                f"got {tuple(q_pre.shape)}"
            )
        own, kv_heads = (self.length - 1) // self.policy.chunk, keys.shape[1]
        if self.length <= self.policy.start or own < self.policy.chunks:
            return torch.arange(own + 1, device=q_pre.device).expand(q_pre.shape[0], kv_heads, -1)
        place = torch.tensor([own], device=q_pre.device)
        return select_chunks(q_pre, found, place, self.policy, kv_heads)[:, :, 0]

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor, int]:
        """What chunks (B, Hkv, S) hold, side by side, the last token's chunk last.

        Returns:
            keys (B, Hkv, L, D) rotated by their new positions 0 ... L - 1, values (B, Hkv, L, D), and the position of
            the last token, L - 1.
        """
        keys, values = self._keys, self._values
        if keys is None or values is None:
            raise ValueError("LongHeadsCache holds no tokens; append some first")
        w = self.policy.chunk
        length = (ids.shape[-1] - 1) * w + (self.length - 1) % w + 1
        place = (
            (ids[..., None] * w + torch.arange(w, device=ids.device))
            .flatten(2)[:, :, :length]
            .to(keys.device)
        )
        place = place.unsqueeze(-1)
        k, v = (t.gather(2, place.expand(-1, -1, -1, t.shape[3])).to(ids.device) for t in (keys, values))
        return self.rope(k, torch.arange(length, device=ids.device)), v, length - 1

    def attend(self, q_pre: Tensor, *, engine: str = "auto") -> Tensor:
        """Attention of the last token, (B, H, 1, D): what `longheads_attention` gives for it."""
        keys, values, position = self.gather(self.select(q_pre))
        q = self.rope(q_pre, torch.tensor([position], device=q_pre.device))
        out = attention(q, keys, values, scale=self.scale, engine=engine)
        assert isinstance(out, Tensor)
        return out


def _grown(held: Tensor | None, new: Tensor, length: int) -> Tensor:
    """`new` written behind the first `length` tokens, in a larger tensor where there is no room."""
    need = length + new.shape[2]
    if held is None or held.shape[2] < need:
        room = new.new_empty(
            *new.shape[:2], need if held is None else max(need, 2 * held.shape[2]), new.shape[3]
        )
        if held is not None:
            room[:, :, :length] = held[:, :, :length]
        held = room
    held[:, :, length:need] = new
    return held


def _chunks(x: Tensor, w: int) -> Tensor:
    """(B, heads, C w, D) -> (B C, heads, w, D)"""
    return x.unflatten(2, (-1, w)).transpose(1, 2).flatten(0, 1)


def _rotated(rope: Rope, x: Tensor) -> Tensor:
    """x (..., w, D) rotated by the positions 0 ... w - 1."""
    flat = x.flatten(0, -3)[None]  # (1, rows, w, D)
    return rope(flat, torch.arange(x.shape[-2], device=x.device))[0].view(x.shape)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q_pre", q), ("k_pre", k), ("v", v)):
        if not isinstance(t, Tensor) or t.ndim != 4:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), got {got}")
    if (
        k.shape != v.shape
        or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:])
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            "q_pre must be (B, H, N, D), k_pre and v (B, Hkv, N, D), with H a multiple of Hkv; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
