"""The cache of one layer: a ragged store under a policy and a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.cache.attend import attend
from foveate.cache.budget import Budget, share, top
from foveate.cache.policy import Policy, Reader
from foveate.cache.store import SLACK, RaggedStore
from foveate.cache.view import View, received

LOGITS = 1 << 25  # formed at once when several queries meet a filled store
APPEND_EVERY = 32  # tokens that leave the recent window before an append-only cache decides on them


@dataclass(frozen=True)
class Geometry:
    """What a layer's attention does to its logits, and where it ends."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None
    """The model's own sliding window: keys that far behind are never seen again, and never stored."""
    out_weight: Tensor | None = None


class LayerCache:
    """Keys and values of one layer, as its policy keeps them.

    Args:
        policy, budget: who stays. ``budget`` may be None for policies that need none.
        evict: "prefill" (only after calls with several tokens), "append" (each token is decided once, when it leaves
            the recent ones, and nothing kept is touched again), or n: also after every n single tokens.
        layer: its number.
        pool: for budgets shared by the whole model: where layers meet.
    """

    def __init__(
        self, policy: Policy, budget: Budget, evict: str | int, layer: int, pool: Pool | None = None
    ):
        self.policy, self.budget, self.evict, self.layer, self.pool = policy, budget, evict, layer, pool
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.store: RaggedStore | None = None
        self.seen = 0  # tokens, padding counted: the next position
        self.real = self.first = self.last = torch.zeros(0, dtype=torch.int64)  # (B,)
        self.limit: Tensor | None = None  # (B, Hkv), of the policy's own decision
        self.part: Tensor | None = None  # (B,) tokens of this layer over an even share, budgets of the model
        self.queries: Tensor | None = None
        self.query_positions: Tensor | None = None
        self.state: Any = None
        self.steps = 0
        self.evicted_at = -1  # `seen` at the last eviction
        self.keys_read = 0
        self.order = torch.zeros(0, 0, dtype=torch.int64)  # of the remembered queries in their call

    # ------------------------------------------------------------------------------------ calls
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, real: Tensor, shape: Geometry) -> None:
        """Take in the first tokens, after their attention was computed elsewhere.

        Args:
            q: (B, H, N, D), k: (B, Hkv, N, D), v: (B, Hkv, N, Dv), out: (B, H, N, Dv).
            real: bool (B, N): not padding.
        """
        batch, hkv, n, _ = k.shape
        at = torch.arange(n, device=k.device).expand(batch, n)
        self.real = real.sum(1)
        self.first = at.masked_fill(~real, n).min(1).values
        self.last = at.masked_fill(~real, -1).max(1).values
        self.seen = n
        self._remember(q, at.masked_fill(~real, -1))
        tail = self._tail(out) if self.policy.needs_outputs else None
        positions = at[:, None].expand(batch, hkv, n)
        valid = self._alive(positions, real[:, None].expand(batch, hkv, n), shape)
        mass = None
        if self.policy.needs_mass:
            mass = received(q, k, real, shape.scale, shape.softcap)
        view = self._view(k, v, positions, valid, mass, shape, tail)
        decided = None if self.policy.reads else self.policy.first(view, self.budget)
        if decided is not None:
            self.limit = decided.limit.clone()
            self._store(k, v, positions, decided.keep & valid, decided.pinned, mass)
        elif self.policy.reads:
            self._store(k, v, positions, valid, None, mass)
            self._begin(shape)
        elif self.pool is not None:
            sink, recent = self.budget.protect(positions, valid, self.first, self.last)
            self.pool.join(
                self, self.policy.score(view), sink | recent, valid, (k, v, positions, sink, recent, mass)
            )
        else:
            keep, pinned = self._choose(view)
            self._store(k, v, positions, keep, pinned, mass)
        self._forget()

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor,
        shape: Geometry,
        allowed: Callable[[RaggedStore, int, int], Tensor | None],
    ) -> Tensor:
        """Take in new tokens and attend to what is stored, themselves included; then evict if it is time.

        Args:
            q: (B, H, Q, D), k: (B, Hkv, Q, D), v: (B, Hkv, Q, Dv); real: bool (B, Q).
            allowed: (store, first query, last query + 1) -> bool (B, H or Hkv or 1, queries, S), entries as in
                `RaggedStore.padded`, or None for everything: what the model's own rule allows, causality included.

        Returns:
            (B, H, Q, Dv).
        """
        if self.store is None:
            raise RuntimeError("extend() needs a prefill first")
        batch, heads, n, _ = q.shape
        at = torch.arange(self.seen, self.seen + n, device=k.device).expand(batch, n)
        self.store.append(k, v, at, None if bool(real.all()) else real)
        self.seen += n
        self.real = self.real + real.sum(1)
        self.last = torch.maximum(self.last, at.masked_fill(~real, -1).max(1).values)
        self.first = torch.minimum(self.first, at.masked_fill(~real, self.seen).min(1).values)
        self._remember(q, at.masked_fill(~real, -1))
        settings: dict[str, Any] = {"scale": shape.scale, "softcap": shape.softcap, "sinks": shape.sinks}
        single = n == 1
        if single and isinstance(self.policy, Reader):
            settings["allowed"] = allowed(self.store, 0, 1)
            view, tokens = self._held_view(shape), self.budget.tokens(self.real)
            out, self.state, read = self.policy.attend(self.state, q, self.store, view, tokens, settings)
            self.keys_read += read
            return out
        step = max(1, LOGITS // max(1, batch * heads * self.store.longest()))
        parts = []
        for a in range(0, n, step):
            b = min(a + step, n)
            seen = allowed(self.store, a, b)
            part, p = attend(
                q[:, :, a:b], self.store, allowed=seen, weights=self.policy.needs_mass, **settings
            )
            parts.append(part)
            if p is not None:
                self._receive(p)
        self._begin(shape)
        if single:
            self.keys_read += int(self.store.count.sum())
        self._evict(shape, single)
        self._forget()
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _begin(self, shape: Geometry) -> None:
        if isinstance(self.policy, Reader):
            assert self.store is not None
            self.state = self.policy.begin(
                self._held_view(shape, True), self.store, self.budget.tokens(self.real)
            )

    # ------------------------------------------------------------------------------------ deciding
    def _choose(self, view: View) -> tuple[Tensor, Tensor]:
        """(keep, pinned), bool (B, Hkv, S), by score."""
        sink, recent = self.budget.protect(view.positions, view.valid, view.first, view.last)
        if self.evict == "append" and self.store is not None:
            return self._append_only(view, sink, recent)
        keep = self._best(view, self.policy.score(view), sink | recent, view.valid)
        pinned = keep & ~recent if self.evict == "append" else sink
        return keep, pinned

    def _best(self, view: View, scores: Tensor, sure: Tensor, valid: Tensor) -> Tensor:
        """The tokens that stay under the budget, those in ``sure`` anyhow."""
        each = self.budget.tokens(view.seen)
        if self.budget.per == "head":
            return top(scores, sure, valid, each)
        heads = scores.shape[1]
        total = each * heads
        if self.part is not None:
            total = (total * self.part).round().to(each.dtype)
        return share(scores, sure, valid, total, (each * self.budget.floor).to(each.dtype))

    def _append_only(self, view: View, sink: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens that left the recent ones since the last decision, the best fraction stays for good."""
        pinned = self._padded("pinned")
        asked = view.valid & ~pinned & ~sink & ~recent
        scores = self.policy.score(view)
        share_of = float(self.budget.amount)
        if self.budget.per == "head":
            chosen = top(scores, torch.zeros_like(asked), asked, torch.ceil(asked.sum(2) * share_of).long())
        else:
            total = torch.ceil(asked.sum((1, 2)) * share_of).long()
            least = (asked.sum(2).amin(1) * share_of * self.budget.floor).long()
            chosen = share(scores, torch.zeros_like(asked), asked, total, least)
        pinned = pinned | chosen | (sink & view.valid)
        return view.valid & (pinned | recent), pinned

    def _evict(self, shape: Geometry, single: bool) -> None:
        """Back to the budget, if the schedule says so."""
        store = self.store
        assert store is not None
        if self.policy.reads:
            return
        if shape.window is not None:
            self._drop_dead(shape)
        if single:
            self.steps += 1
            every = APPEND_EVERY if self.evict == "append" else self.evict
            if every == "prefill" or self.steps % int(every):
                return
        view = self._held_view(shape)
        if self.policy.by_age:
            assert self.limit is not None
            limit = self.policy.limit(self.layer, view.seen, self.limit, self.budget)
            room = limit.where(limit >= 0, view.positions.shape[2])
            first = view.positions < view.first[:, None, None] + self.policy.first_tokens(self.budget)
            keep = top(view.positions, self._padded("pinned") | (view.valid & first), view.valid, room)
        else:
            keep, pinned = self._choose(view)
            self._pin(pinned)
        drop = store.valid() & ~keep
        if bool(drop.any()):
            self.evicted_at = self.seen
            store.evict(drop)
            if not single:
                store.shrink()

    def _drop_dead(self, shape: Geometry) -> None:
        """Tokens that the model's own window has left behind."""
        assert self.store is not None
        valid = self.store.valid()
        dead = valid & ~self._alive(self.store.padded("positions"), valid, shape)
        if bool(dead.any()):
            self.store.evict(dead)

    def _alive(self, positions: Tensor, valid: Tensor, shape: Geometry) -> Tensor:
        """Of the ``valid`` slots, those that a next query at ``seen`` may still see."""
        return valid if shape.window is None else valid & (positions > self.seen - shape.window)

    # ------------------------------------------------------------------------------------ looking
    def _view(
        self,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        valid: Tensor,
        mass: Tensor | None,
        shape: Geometry,
        tail: Tensor | None = None,
    ) -> View:
        assert self.queries is not None
        assert self.query_positions is not None
        return View(
            layer=self.layer,
            keys=k,
            values=v,
            positions=positions,
            valid=valid,
            first=self.first,
            last=self.last,
            seen=self.real,
            queries=self.queries,
            query_positions=self.query_positions,
            outputs=tail,
            mass=torch.zeros_like(valid, dtype=torch.float32) if mass is None else mass,
            scale=shape.scale,
            softcap=shape.softcap,
            out_weight=shape.out_weight,
        )

    def _held_view(self, shape: Geometry, whole: bool = False) -> View:
        """What is stored now; keys and values only if ``whole`` or for scores that need them (else empty)."""
        store = self.store
        assert store is not None
        valid = store.valid()
        if whole or (not (self.policy.by_age or self.policy.reads) and self.policy.needs_keys):
            k, v = store.padded("keys"), store.padded("values")
        else:
            k = store.keys.new_empty(*valid.shape, 0)
            v = store.values.new_empty(*valid.shape, 0)
        return self._view(k, v, store.padded("positions"), valid, store.padded("mass"), shape)

    def _padded(self, name: str) -> Tensor:
        assert self.store is not None
        return self.store.padded(name) & self.store.valid()

    def _remember(self, q: Tensor, at: Tensor) -> None:
        """Keep the last queries that the policy wants; ``at`` (B, Q) are their positions, -1 = padding."""
        want = self.policy.window
        if self._once:
            self.queries = self.query_positions = None  # those of a call with several tokens are its own
        if self.queries is not None and self.query_positions is not None:
            q, at = torch.cat([self.queries, q], 2), torch.cat([self.query_positions, at], 1)
        order = (
            (at >= 0).to(torch.int8).argsort(stable=True, dim=1)[:, max(0, at.shape[1] - want) :]
        )  # real ones last
        self.order = order
        self.query_positions = at.gather(1, order)
        self.queries = q.gather(2, order[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))

    @property
    def _once(self) -> bool:
        """Queries matter only to the call they are in."""
        return self.evict == "prefill" or self.policy.by_age or self.policy.reads

    def _forget(self) -> None:
        """Queries that no later decision looks at."""
        if self._once and self.queries is not None and self.query_positions is not None:
            self.queries, self.query_positions = (
                self.queries[:, :, :0].clone(),
                self.query_positions[:, :0].clone(),
            )

    def _tail(self, out: Tensor) -> Tensor:
        """Outputs (B, H, W, Dv) of the remembered queries of a prefill."""
        return out.gather(2, self.order[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3]))

    def _receive(self, p: Tensor) -> None:
        """Add weights (B, H, Q, S), entries as in `padded`, to what each slot has received."""
        store = self.store
        assert store is not None
        batch, heads, _, width = p.shape
        got = p.view(batch, store.heads, heads // store.heads, -1, width).sum((2, 3)) / (heads // store.heads)
        valid = store.valid()
        store.mass[store._slots()] += got[valid]

    # ------------------------------------------------------------------------------------ storing
    def _store(
        self,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        keep: Tensor,
        pinned: Tensor | None,
        mass: Tensor | None,
    ) -> None:
        single_steps = isinstance(self.evict, int) and not self.policy.reads
        slack = int(self.evict) if single_steps and not self.budget.fraction else SLACK
        if not bool(keep.all()):
            self.evicted_at = self.seen
        self.store = RaggedStore.of(k, v, positions, keep, pinned=pinned, mass=mass, slack=slack)

    def _pin(self, pinned: Tensor) -> None:
        assert self.store is not None
        self.store.pinned[self.store._slots()] = pinned[self.store.valid()]

    # ------------------------------------------------------------------------------------ rows and bytes
    def select_rows(self, rows: Tensor) -> None:
        """Rows of the batch in another order, some more than once or not at all."""
        if self.store is None:
            return
        self.store.select_rows(rows)
        for name in ("real", "first", "last", "limit", "part", "queries", "query_positions"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[rows.to(value.device)])
        if isinstance(self.policy, Reader):
            self.state = self.policy.reorder(self.state, rows)

    def crop(self, remove: int) -> None:
        """Take back the last ``remove`` tokens.

        Raises:
            ValueError: something was evicted since they came, or there are not as many.
        """
        if self.store is None or remove == 0:
            return
        to = self.seen - remove
        if to < 0:
            raise ValueError(f"crop: {remove} tokens to remove, but only {self.seen} were seen")
        if self.evicted_at > to or self.policy.needs_mass or self.policy.reads:
            raise ValueError(
                f"crop: cannot take back {remove} tokens: policy {self.policy.name!r} has decided since they came, and "
                "what it evicted is gone. Assisted and speculative decoding need a cache that keeps everything"
            )
        positions, valid = self.store.padded("positions"), self.store.valid()
        gone = valid & (positions >= to)
        self.store.evict(gone)
        assert self.query_positions is not None
        self.query_positions = self.query_positions.masked_fill(self.query_positions >= to, -1)
        self.real = self.real - gone[:, 0].sum(1)
        self.seen = to
        self.last = self.last.clamp(max=to - 1)

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, positions and what the policy keeps beside them."""
        held = 0 if self.store is None else self.store.nbytes
        return held + sum(t.nbytes for t in (self.queries, self.query_positions) if t is not None)


class Pool:
    """Where the layers of a model meet to share one budget: the last one to finish its prefill decides for all."""

    def __init__(self, layers: int):
        self.layers = layers
        self.waiting: dict[int, tuple] = {}

    def join(self, layer: LayerCache, scores: Tensor, sure: Tensor, valid: Tensor, raw: tuple) -> None:
        """Layer ``layer`` has finished its prefill; ``raw``: (k, v, positions, sinks, recent, mass)."""
        self.waiting[layer.layer] = (layer, scores, sure, valid, raw)
        if len(self.waiting) == self.layers:
            self.decide()

    def decide(self) -> None:
        """Share the budget among all that wait."""
        waiting = [self.waiting[number] for number in sorted(self.waiting)]
        self.waiting = {}
        if not waiting:
            return
        budget, seen = waiting[0][0].budget, waiting[0][0].real
        scores, sure, valid = (torch.cat([entry[i] for entry in waiting], 1) for i in (1, 2, 3))
        each = budget.tokens(seen)
        keep = share(scores, sure, valid, each * scores.shape[1], (each * budget.floor).to(each.dtype))
        done = 0
        for layer, own, _, _, (k, v, positions, sink, recent, mass) in waiting:
            mine = keep[:, done : done + own.shape[1]]
            done += own.shape[1]
            layer.part = mine.sum((1, 2)) / (each * own.shape[1])
            pinned = mine & ~recent if layer.evict == "append" else sink
            layer._store(k, v, positions, mine, pinned, mass)
