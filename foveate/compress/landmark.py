"""Landmark attention: the last token of a block is its gate, so that whole blocks are chosen by one key each."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from foveate.core.attention import attention
from foveate.core.block_choice import ROWS, choice_attention
from foveate.core.merge import merge
from foveate.core.patterns import Causal, Documents
from foveate.core.patterns.base import integer
from foveate.core.rotary import Rope

GATES = 1 << 22  # gates held at once, unless one query has more
AGGREGATES = ("token", "max_over_tokens")
POSITIONS = ("true", "stingy")


def insert_landmarks(ids: Tensor, landmark_id: int, every: int) -> Tensor:
    """Token ids with a landmark after every `every` of them; a last block that is not full has none.

    Args:
        ids: (B, N) or (N,); landmark_id: the id to insert; every: l, ordinary tokens of a block, >= 1.

    Returns:
        (B, N + floor(N / l)). The landmarks are `ids == landmark_id`; a loss leaves out where they are the target.

    >>> insert_landmarks(torch.tensor([5, 6, 7, 8, 9]), 0, 2).tolist()
    [5, 6, 0, 7, 8, 0, 9]
    """
    every = integer("insert_landmarks", "every", every, 1)
    if not isinstance(ids, Tensor) or ids.ndim not in (1, 2):
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"insert_landmarks: ids must be a tensor (batch, tokens) or (tokens,), got {got}")
    whole = ids.shape[-1] // every * every
    blocks = ids[..., :whole].unflatten(-1, (-1, every))
    closed = torch.cat([blocks, torch.full_like(blocks[..., :1], landmark_id)], -1).flatten(-2)
    return torch.cat([closed, ids[..., whole:]], -1)


def landmark_grouped_softmax(logits: Tensor, is_landmark: Tensor, causal_offset: int = 0) -> Tensor:
    """The weights of landmark attention from all logits: the dense definition, for reference.

    A landmark closes its block. For query i, C the ordinary tokens of its own block up to itself, R the landmarks of
    earlier blocks, z the logits:

        u = softmax over C and R together of z,    w_j = softmax over the ordinary tokens of j's block of z_j
        weight of j = u_j in C,   u_r w_j in the block of a landmark r in R,   0 for every landmark

    Rows sum to 1. A block without ordinary tokens has no gate.

    Args:
        logits: (B, H, Nq, Nk), scaled, finite; is_landmark: bool (B, Nk) or (Nk,).
        causal_offset: query i stands at key i + causal_offset; Nk - Nq aligns the last ones.

    Returns:
        (B, H, Nq, Nk) in the dtype of the logits; 0 for a query that stands before all keys.

    Source: Landmark Attention: Random-Access Infinite Context Length for Transformers (2023).

    >>> weights = landmark_grouped_softmax(torch.zeros(1, 1, 4, 4), torch.tensor([False, False, True, False]))
    >>> weights[0, 0, 3].tolist()  # its own token and the gate of two tokens
    [0.25, 0.25, 0.0, 0.5]
    """
    if not isinstance(logits, Tensor) or logits.ndim != 4:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits must be a tensor (batch, heads, queries, keys), got {got}")
    batch, _, n, m = logits.shape
    landmark = _mask("landmark_grouped_softmax", is_landmark, batch, m).to(logits.device)
    offset = integer("landmark_grouped_softmax", "causal_offset", causal_offset, None, m - n)
    block = landmark.cumsum(1) - landmark.long()  # (B, M)
    place = torch.arange(n, device=logits.device) + offset  # of the queries
    own = torch.where(place >= 0, block[:, place.clamp_min(0)], -1).unsqueeze(2)  # (B, N, 1)
    seen = torch.arange(m, device=logits.device) <= place[:, None]  # (N, M)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(wide)
    count = int(block.max()) + 1
    tokens = torch.zeros(batch, count, dtype=torch.long, device=z.device).scatter_add(
        1, block, (~landmark).long()
    )
    here = (block[:, None] == own) & seen & ~landmark[:, None]  # C, (B, N, M)
    gate = (block[:, None] < own) & landmark[:, None] & (tokens.gather(1, block) > 0)[:, None]  # R
    u = _masked_softmax(z, (here | gate)[:, None])
    index = block[:, None, None].expand_as(z)
    ordinary = z.masked_fill(landmark[:, None, None], -torch.inf)
    top = z.new_full((*z.shape[:3], count), -torch.inf).scatter_reduce(3, index, ordinary.detach(), "amax")
    top = top.masked_fill(top.isneginf(), 0.0)
    e = (ordinary - top.gather(3, index)).exp()
    total = z.new_zeros(top.shape).scatter_add(3, index, e)
    w = e / total.masked_fill(total == 0, 1.0).gather(3, index)
    gates = z.new_zeros(top.shape).scatter_add(3, index, u * gate[:, None])  # u_r at every block
    return torch.where(here[:, None], u, gates.gather(3, index) * w).to(logits.dtype)


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    *,
    top_k: int | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Causal attention in which a landmark is the gate of the block that it closes.

        out_i = (sum_{j in C} exp(z_ij) v_j + sum_{r in R} exp(z_ir) o_ir) / (sum_C exp(z_ij) + sum_R exp(z_ir))

    with C and R as in `landmark_grouped_softmax` and o_ir the attention of query i over the ordinary tokens of block r
    alone: a merge of partial results in which the log-sum-exp of a block is replaced by its landmark's logit. With
    top_k, R are the blocks of the largest gates only, and the others are not read.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv), N <= M, the last query aligned with the last key. H is a
            multiple of Hkv. Rotated already, where positions are.
        is_landmark: bool (B, M) or (M,). Blocks may have any lengths.
        top_k: blocks that a query reads besides its own, for each key head the same for all its query heads: those of
            the largest max over heads of softmax over the earlier landmarks. None reads all, 0 only its own block.
        scale, engine: as in `attention`.

    Returns:
        (B, H, N, Dv) in q's dtype; 0 for a landmark that closes an empty block and has none before it. Gradients of q,
        k and v, through the gates too; the choice of blocks has none.

    Cost per query: its own block, one logit per earlier landmark, and top_k blocks (all without top_k).

    Raises:
        ValueError, TypeError: what does not fit, by name.

    Source: Landmark Attention: Random-Access Infinite Context Length for Transformers (2023). Grouped heads are not in
    the paper; neither are blocks of different lengths.

    >>> q, k, v = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    >>> landmark = torch.arange(40) % 8 == 7
    >>> landmark_attention(q, k, v, landmark, top_k=2).shape
    torch.Size([1, 4, 40, 16])
    """
    batch, _, n, m = _check(q, k, v)
    if n > m:
        raise ValueError(f"landmark_attention: at most as many queries as keys are accepted, got {n} and {m}")
    landmark = _mask("landmark_attention", is_landmark, batch, m)
    if top_k is not None:
        top_k = integer("landmark_attention", "top_k", top_k, 0)
    rows, of = landmark.unique(dim=0, return_inverse=True)
    if len(rows) == 1:
        return _states(q, k, v, rows[0], top_k, scale, engine)[0]
    out = [
        _states(q[b : b + 1], k[b : b + 1], v[b : b + 1], rows[of[b]], top_k, scale, engine)[0]
        for b in range(batch)
    ]
    return torch.cat(out)


def _states(
    q: Tensor, k: Tensor, v: Tensor, landmark: Tensor, top_k: int | None, scale: float | None, engine: str
) -> tuple[Tensor, Tensor]:
    """(out, lse) for one set of landmarks, bool (M,); the lse has the gates of the blocks in it."""
    n, m, heads, kv_heads = q.shape[2], k.shape[2], q.shape[1], k.shape[1]
    landmark = landmark.cpu()
    block = landmark.cumsum(0) - landmark.long()  # (M,)
    mine = block[m - n :]  # of the queries
    own = Causal() & Documents(mine, block.masked_fill(landmark, -1))
    state: Any = attention(q, k, v, own, scale=scale, return_lse=True, engine=engine)
    tokens = torch.bincount(block[~landmark], minlength=int(block.max()) + 1)
    ends = landmark.nonzero()[:, 0]
    ends = ends[tokens[block[ends]] > 0]  # the gates: landmarks of blocks with something in them
    if top_k == 0 or not len(ends) or int(block[ends[0]]) >= int(mine[-1]):
        return state
    ordinary = (~landmark & torch.isin(block, block[ends])).nonzero()[:, 0]
    gated = torch.searchsorted(block[ends], block[ordinary]).to(
        q.device
    )  # block of a key, among those with gates
    keys, values = (x.index_select(2, ordinary.to(q.device)) for x in (k, v))
    gate_keys = k.index_select(2, ends.to(q.device))
    earlier = (block[ends] < mine[:, None]).to(q.device)  # (N, R)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = q.shape[3] ** -0.5 if scale is None else scale
    first = int(earlier.any(1).long().argmax())  # queries before this one have no earlier block
    per_query = q.shape[0] * heads * len(ends)
    step = max(1, min(GATES // per_query, ROWS // (len(ends) if top_k is None else min(top_k, len(ends)))))
    outs, lses = [state[0][:, :, :first]], [state[1][:, :, :first]]
    for at in range(first, n, step):
        part = slice(at, min(at + step, n))
        queries = q[:, :, part]
        z = _grouped_logits(queries.to(wide), gate_keys.to(wide)) * factor  # (B, H, n, R)
        choice = earlier[part].expand(z.shape)
        if top_k is not None and top_k < len(ends):
            score = z.detach().masked_fill(~choice, -torch.inf)
            score = score if heads == kv_heads else _best(score, kv_heads)  # (B, Hkv, n, R)
            kept = score.topk(top_k, 3).indices.repeat_interleave(heads // kv_heads, 1)  # (B, H, n, k)
            choice = choice & torch.zeros_like(choice).scatter(3, kept, True)
            lse = _logsumexp(z.gather(3, kept), choice.gather(3, kept))
        else:
            lse = _logsumexp(z, choice)
        past = choice_attention(queries, keys, values, choice, gated, gates=z, scale=scale, engine=engine)
        out, lse = merge([(state[0][:, :, part], state[1][:, :, part]), (past, lse)])
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


@dataclass(frozen=True)
class LandmarkBlocks:
    """`landmark_attention` with a landmark after every `every` tokens: an operator of q, k and v, with a state.

    Args:
        every: l, ordinary tokens of a block; token (l + 1) m - 1 is the landmark of block m.
        top_k, scale, engine: as in `landmark_attention`.

    >>> q, k, v = (torch.randn(1, 2, 21, 8) for _ in range(3))
    >>> attend = LandmarkBlocks(4, top_k=1)
    >>> out, cache = attend(q, k, v, state=attend.initial_state(q, k, v))
    >>> out.shape, cache.length
    (torch.Size([1, 2, 21, 8]), 21)
    """

    every: int
    top_k: int | None = None
    scale: float | None = None
    engine: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", integer("LandmarkBlocks", "every", self.every, 1))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", integer("LandmarkBlocks", "top_k", self.top_k, 0))

    def initial_state(self, q: Tensor, k: Tensor, v: Tensor) -> LandmarkCache:
        """The cache before the first token; keys stay as they are given."""
        return LandmarkCache(self.every, scale=self.scale, engine=self.engine)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, state: LandmarkCache | None = None) -> Any:
        """The output; with a state the tokens go on after it, and (out, next state) comes back."""
        if state is not None:
            after = state.copy()
            return after.step(q, k, v, top_k=self.top_k), after
        _check(q, k, v)
        landmark = torch.arange(1, k.shape[2] + 1) % (self.every + 1) == 0
        return landmark_attention(q, k, v, landmark, top_k=self.top_k, scale=self.scale, engine=self.engine)


class LandmarkCache:
    """Keys, before rotation, and values of whole blocks, of which a query fetches a few by their landmarks.

        cache = LandmarkCache(every=63, rope=rope)
        out = cache.step(q, k_pre, v, top_k=4)  # the tokens of a chunk, then one token at a time

    A step attends, in one grouped softmax, to the tokens that are not yet in a whole block, to all of its own chunk,
    and to the top_k blocks that each query fetches from the cache. Fetched blocks are placed by `positions`:

        "true"    where they were.
        "stingy"  in k + 1 slots of one block each that end where the open block begins. Landmarks are scored with the
                  k latest blocks in slots 1 .. k, which is where they were, and all older ones in slot 0. The fetched
                  blocks, oldest first, then take slots 0, 1, ..., k - 1, each of the k latest one slot later. So no
                  distance exceeds k + 1 blocks and a chunk, however long the text.

    Args:
        every: l, ordinary tokens of a block; the next one is its landmark.
        rope: rotates queries and keys: (x, positions) -> x, as `foveate.core.rotary.Rotary`; None for no positions.
        positions: "stingy" or "true". With top_k=None blocks stay where they were.
        scale, engine: as in `landmark_attention`.

    Everything is kept, so memory grows with the text, and what a query reads by one landmark per block. Tensors are
    replaced, never written to: a shallow `copy()` is an independent cache. Batch rows have their landmarks at the same
    places.

    Source: Landmark Attention: Random-Access Infinite Context Length for Transformers (2023). The paper keeps blocks
    on the CPU while the model runs on a GPU; here they stay where they are.

    >>> cache = LandmarkCache(every=3)
    >>> x = torch.randn(1, 2, 10, 8)
    >>> cache.append(x, x)
    >>> k, v, positions = cache.retrieve(torch.randn(1, 4, 1, 8), top_k=1)
    >>> cache.blocks, k.shape, positions.shape
    (2, torch.Size([1, 2, 1, 4, 8]), torch.Size([1, 2, 1, 4]))
    """

    def __init__(
        self,
        every: int,
        *,
        rope: Rope | None = None,
        positions: str = "stingy",
        scale: float | None = None,
        engine: str = "auto",
    ) -> None:
        self.every = integer("LandmarkCache", "every", every, 1)
        if rope is not None and not callable(rope):
            raise TypeError(
                f"LandmarkCache: rope must be a function of (x, positions) or None, got {type(rope).__name__}"
            )
        if positions not in POSITIONS:
            raise ValueError(
                f"LandmarkCache: positions must be one of {', '.join(POSITIONS)}, got {positions!r}"
            )
        self.rope, self.positions, self.scale, self.engine = rope, positions, scale, engine
        self.whole: tuple[Tensor, Tensor] | None = (
            None  # of whole blocks: (B, Hkv, n, D), unrotated, (B, Hkv, n, Dv)
        )
        self.open: tuple[Tensor, Tensor] | None = None  # of the open block

    def copy(self) -> LandmarkCache:
        """A cache that goes on from here by itself."""
        return copy.copy(self)

    @property
    def length(self) -> int:
        """Tokens so far, landmarks counted."""
        return sum(held[0].shape[2] for held in (self.whole, self.open) if held is not None)

    @property
    def blocks(self) -> int:
        """Whole blocks, which can be fetched."""
        return self.length // (self.every + 1)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (*(self.whole or ()), *(self.open or ())))

    def append(self, k_pre: Tensor, v: Tensor, is_landmark: Tensor | None = None) -> None:
        """Take tokens in; arguments as in `step`."""
        self._landmarks(k_pre, is_landmark)
        new = (k_pre, v)
        if self.open is not None:
            held, came = self.open[0].shape, k_pre.shape
            if (came[0], came[1], came[3]) != (held[0], held[1], held[3]):
                raise ValueError(
                    f"LandmarkCache: it holds keys {tuple(held)}; k_pre must agree but for the tokens, got "
                    f"{tuple(came)}"
                )
            new = _joined(self.open, new)
        closed = new[0].shape[2] // (self.every + 1) * (self.every + 1)
        self.open = (new[0][:, :, closed:].clone(), new[1][:, :, closed:].clone())  # lets the rest go
        if closed:
            done = (new[0][:, :, :closed], new[1][:, :, :closed])
            self.whole = done if self.whole is None else _joined(self.whole, done)

    def retrieve(self, q: Tensor, top_k: int, aggregate: str = "token") -> tuple[Tensor, Tensor, Tensor]:
        """Fetch the blocks whose landmarks the queries like best, oldest first.

        Args:
            q: (B, H, n, D), rotated at their true positions.
            top_k: k, at most as many as there are blocks are fetched, at least 1.
            aggregate: "token": for each query by itself, per key head the largest max over its query heads of the
                softmax over all landmarks. "max_over_tokens": once for all n, by the largest of these over the queries.

        Returns:
            k (B, Hkv, n, k (l + 1), D), unrotated; v; and the positions (B, Hkv, n, k (l + 1)) to rotate the keys to.
            With "max_over_tokens" n is 1.
        """
        if aggregate not in AGGREGATES:
            raise ValueError(
                f"LandmarkCache: aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}"
            )
        return self._retrieve(q, integer("LandmarkCache", "top_k", top_k, 1), aggregate, self.blocks)

    def scores(self, q: Tensor, top_k: int) -> Tensor:
        """What blocks are chosen by, (B, Hkv, n, blocks): per key head, the max over query heads of the log softmax
        over all landmarks; arguments as in `retrieve`. Landmarks' positions depend on top_k."""
        return self._scores(q, integer("LandmarkCache", "top_k", top_k, 1), self.blocks)

    def choose(self, score: Tensor, top_k: int) -> Tensor:
        """The blocks to fetch, in ascending order, int64 (B, Hkv, n, k), by score (B, Hkv, n, blocks): the largest."""
        return score.topk(top_k, 3).indices.sort(3).values

    def _slots(self, top_k: int, blocks: int) -> tuple[int, int]:
        """Where slot 0 begins, and the first of the blocks that are late."""
        return (blocks - top_k - 1) * (self.every + 1), blocks - top_k

    @torch.no_grad()
    def _scores(self, q: Tensor, top_k: int, blocks: int) -> Tensor:
        if not blocks or self.whole is None:
            raise ValueError("LandmarkCache: there is no whole block to retrieve yet")
        k, size = self.whole[0], self.every + 1
        landmarks = k[:, :, self.every : blocks * size : size]  # (B, Hkv, R, D)
        place = torch.arange(blocks, device=k.device)
        if self.positions == "true":
            place = place * size
        else:
            start, late = self._slots(min(top_k, blocks), blocks)
            place = start + (place - late + 1).clamp_min(0) * size
        if self.rope is not None:
            landmarks = self.rope(landmarks, place + self.every)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        factor = q.shape[3] ** -0.5 if self.scale is None else self.scale
        return _best(_grouped_logits(q.to(wide), landmarks.to(wide)) * factor, k.shape[1])

    def _retrieve(self, q: Tensor, top_k: int, aggregate: str, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        score = self._scores(q, top_k, blocks)  # (B, Hkv, n, R)
        if aggregate == "max_over_tokens":
            score = score.amax(2, keepdim=True)
        k, v = cast("tuple[Tensor, Tensor]", self.whole)
        size, top_k = self.every + 1, min(top_k, blocks)
        chosen = self.choose(score, top_k)  # (B, Hkv, n, k)
        if self.positions == "true":
            starts = chosen * size
        else:
            start, late = self._slots(top_k, blocks)
            starts = start + (torch.arange(top_k, device=k.device) + (chosen >= late)) * size
        within = torch.arange(size, device=k.device)
        index = (chosen.unsqueeze(4) * size + within).flatten(3)
        b = torch.arange(len(k), device=k.device)[:, None, None, None]
        h = torch.arange(k.shape[1], device=k.device)[:, None, None]
        return k[b, h, index], v[b, h, index], (starts.unsqueeze(4) + within).flatten(3)

    def step(
        self,
        q: Tensor,
        k_pre: Tensor,
        v: Tensor,
        is_landmark: Tensor | None = None,
        *,
        top_k: int | None,
        aggregate: str = "token",
    ) -> Tensor:
        """Take the next n tokens in and return their outputs.

        Args:
            q: (B, H, n, D); k_pre: (B, Hkv, n, D), both before rotation; v: (B, Hkv, n, Dv).
            is_landmark: bool (n,) or (B, n); checked to be every (l + 1)-th token. None says so.
            top_k: blocks fetched from those that were whole before this step; None reads all of them in their places.
            aggregate: as in `retrieve`. With "token", n top_k (l + 1) keys are gathered per key head.
        """
        _check(q, k_pre, v)
        if q.shape[2] != k_pre.shape[2]:
            raise ValueError(
                f"LandmarkCache: q and k_pre of the same tokens are accepted, got {q.shape[2]} and {k_pre.shape[2]}"
            )
        if aggregate not in AGGREGATES:
            raise ValueError(
                f"LandmarkCache: aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}"
            )
        if top_k is not None:
            top_k = integer("LandmarkCache", "top_k", top_k, 0)
        before, blocks, size = self.length, self.blocks, self.every + 1
        self.append(k_pre, v, is_landmark)
        place = torch.arange(self.length, device=q.device)
        if self.rope is not None:
            q = self.rope(q, place[before:])
        start = 0 if top_k is None else blocks * size  # of what is read in its place
        keys, values = cast("tuple[Tensor, Tensor]", self.open)
        if self.whole is not None and self.whole[0].shape[2] > start:
            keys, values = _joined((self.whole[0][:, :, start:], self.whole[1][:, :, start:]), (keys, values))
        if self.rope is not None:
            keys = self.rope(keys, place[start:])
        near = _states(q, keys, values, (place[start:] + 1) % size == 0, None, self.scale, self.engine)
        if not top_k or not blocks:
            return near[0]
        k_far, v_far, positions = self._retrieve(q, top_k, aggregate, blocks)
        if self.rope is not None:
            k_far = self.rope(k_far, positions)
        return merge([near, self._fetched(q, k_far, v_far)])[0]

    def _fetched(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of queries (B, H, n, D) over fetched blocks (B, Hkv, n or 1, k (l + 1), D)."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        size, factor = self.every + 1, q.shape[3] ** -0.5 if self.scale is None else self.scale
        grouped = q.to(wide).unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, n, D)
        z = (
            torch.einsum("bhgnd,bhnjd->bhgnj", grouped, k.to(wide).expand(-1, -1, q.shape[2], -1, -1))
            * factor
        )
        z = z.unflatten(4, (-1, size))
        gate = z[..., -1]  # (B, Hkv, G, n, k)
        weight = torch.softmax(gate, -1).unsqueeze(-1) * torch.softmax(z[..., :-1], -1)
        weight = torch.nn.functional.pad(weight, (0, 1)).flatten(4)  # landmarks have no weight of their own
        out = torch.einsum("bhgnj,bhnjd->bhgnd", weight, v.to(wide).expand(-1, -1, q.shape[2], -1, -1))
        return out.flatten(1, 2).to(q.dtype), gate.logsumexp(-1).flatten(1, 2)

    def _landmarks(self, k: Tensor, is_landmark: Tensor | None) -> None:
        if is_landmark is None:
            return
        given = _mask("LandmarkCache", is_landmark, k.shape[0], k.shape[2])
        want = (torch.arange(self.length, self.length + k.shape[2]) + 1) % (self.every + 1) == 0
        if not bool((given.cpu() == want).all()):
            raise ValueError(
                f"LandmarkCache: is_landmark must hold at every {self.every + 1}th token from the first on and nowhere "
                f"else, got {int(given.sum())} landmarks in {k.shape[2]} tokens after {self.length}"
            )


def _joined(held: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([held[0], new[0]], 2), torch.cat([held[1], new[1]], 2)


def _best(z: Tensor, kv_heads: int) -> Tensor:
    """Gate logits (B, H, n, R) -> what blocks are chosen by, (B, Hkv, n, R): log softmax, max over grouped heads."""
    z = z - z.logsumexp(3, keepdim=True).nan_to_num(neginf=0.0)
    return z.unflatten(1, (kv_heads, -1)).amax(2)


def _grouped_logits(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, n, D) times k (B, Hkv, R, D) -> (B, H, n, R)"""
    heads = q.unflatten(1, (k.shape[1], -1))
    return (heads.flatten(2, 3) @ k.mT).unflatten(2, heads.shape[2:4]).flatten(1, 2)


def _logsumexp(z: Tensor, choice: Tensor) -> Tensor:
    """Over the chosen ones of the last axis; -inf, without a gradient, where there are none."""
    some = choice.any(-1)
    return (
        z.masked_fill(~choice & some.unsqueeze(-1), -torch.inf).logsumexp(-1).masked_fill(~some, -torch.inf)
    )


def _masked_softmax(z: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed ones of the last axis; 0 where there are none."""
    some = allowed.any(-1, keepdim=True)
    return torch.softmax(z.masked_fill(~allowed & some, -torch.inf), -1) * allowed


def _mask(owner: str, landmark: Tensor, batch: int, m: int) -> Tensor:
    if not isinstance(landmark, Tensor) or landmark.dtype != torch.bool:
        got = landmark.dtype if isinstance(landmark, Tensor) else type(landmark).__name__
        raise TypeError(f"{owner}: is_landmark must be a bool tensor, got {got}")
    if tuple(landmark.shape) not in ((m,), (batch, m)):
        raise ValueError(
            f"{owner}: is_landmark must have shape ({m},) or ({batch}, {m}), got {tuple(landmark.shape)}"
        )
    return landmark.expand(batch, m)


def _check(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.ndim != 4:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), got {got}")
    batch, heads, n, dim = q.shape
    kv_heads, m = k.shape[1:3]
    if (k.shape[0], k.shape[3]) != (batch, dim) or v.shape[:3] != k.shape[:3] or heads % kv_heads:
        raise ValueError(
            "q (B, H, N, D), k (B, Hkv, M, D) and v (B, Hkv, M, Dv) must fit each other, with H a multiple of Hkv; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    return batch, heads, n, m
