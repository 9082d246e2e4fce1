"""Routing: tokens attend inside clusters, which an online k-means of normalised queries and keys finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.core.layout import BlockLayout
from foveate.core.patterns import Causal, SlidingWindow
from foveate.layers.intervals import interval_layout
from foveate.layers.rotary import rotated

CHUNK = 1 << 25  # scores of tokens and centroids held at once, unless one head has more
ASSIGNMENTS = ("balanced", "nearest")


@dataclass(frozen=True, eq=False, repr=False)
class ClusterLayout:
    """Groups of queries and keys: query slot r of a group sees its key slot s when enter[s] <= r < leave[s].

    Attributes:
        q_idx: int64 (B, H, C, wq), positions of the queries, rising; -1: an empty slot.
        k_idx: int64 (B, H, C, wk), positions of the keys.
        enter, leave: int64 (B, H, C, wk), in query slots.
        apart: True where query slot r must not see key slot r (it is itself).
    """

    q_idx: Tensor
    k_idx: Tensor
    enter: Tensor
    leave: Tensor
    apart: bool = False

    def pairs(self) -> Tensor:
        """bool (B, H, C, wq, wk): the (query, key) slots that attend."""
        r = torch.arange(self.q_idx.shape[3], device=self.q_idx.device)[:, None]
        seen = (r >= self.enter.unsqueeze(3)) & (r < self.leave.unsqueeze(3))
        seen &= (self.q_idx >= 0).unsqueeze(4) & (self.k_idx >= 0).unsqueeze(3)
        return seen & (self.q_idx.unsqueeze(4) != self.k_idx.unsqueeze(3)) if self.apart else seen

    def to_dense(self, n: int) -> Tensor:
        """bool (B, H, n, n): the pairs that meet in some group. Of a size for tests and pictures."""
        batch, heads = self.q_idx.shape[:2]
        out = torch.zeros(batch, heads, n * n, dtype=torch.int32, device=self.q_idx.device)
        cell = self.q_idx.clamp_min(0).unsqueeze(4) * n + self.k_idx.clamp_min(0).unsqueeze(3)
        out.scatter_add_(2, cell.flatten(2), self.pairs().flatten(2).int())
        return (out > 0).view(batch, heads, n, n)

    @property
    def computed(self) -> int:
        """(query, key) pairs of slots, over all groups, heads and batch rows: what attention costs at most."""
        return self.q_idx.numel() * self.k_idx.shape[3]


class RoutingSelector(nn.Module):
    """Clusters of queries and keys, by centroids that follow them.

    Tokens are normalised, x~ = LayerNorm(x) without scale and bias, so that the nearest centroid is the one with the
    largest dot product. Every head has its own centroids mu_c.

    assignment "balanced" (the paper's): each centroid takes the w queries and the w keys that are nearest to it.
    Clusters may overlap and a token may be in none. Under a causal mask no query sees a later key, but whether it is in
    a cluster depends on later tokens, which compete for the same places: for training and for scoring whole texts.

    assignment "nearest": each token goes to its nearest centroid, and sees the w tokens of that cluster latest before
    it. Exactly causal: for generation. Clusters are of any size; needs shared queries and keys.

    With shared queries and keys a token is most like itself; it sees itself only as the first of its cluster.

    Args:
        heads, dim: of queries and keys.
        n_clusters: C, about the square root of the length.
        decay: lambda of the moving average.
        shared_qk: keys are the queries (causal models); False: two projections, one set of centroids.
        see_self: whether a token sees itself; default: unless shared_qk.

    Buffer `means`: (H, C, D), the centroids.

    Source: Efficient Content-Based Sparse Attention with Routing Transformers (2020). Differs from the released code:
    the mean of a cluster is averaged as in the paper (there: sums and counts are), then normalised like the tokens; a
    centroid that no token is nearest to stays; equal scores go to the earlier token; no commitment loss; a token does
    not see itself with shared queries and keys (there: it does).

    >>> selector = RoutingSelector(heads=2, dim=16, n_clusters=4)
    >>> q = torch.randn(1, 2, 40, 16)
    >>> groups = selector(q, q, window=10)
    >>> groups.q_idx.shape, int(groups.to_dense(40).triu(1).sum())
    (torch.Size([1, 2, 4, 10]), 0)
    """

    means: Tensor

    def __init__(
        self,
        heads: int,
        dim: int,
        n_clusters: int,
        decay: float = 0.999,
        shared_qk: bool = True,
        see_self: bool | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("dim", dim), ("n_clusters", n_clusters)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"RoutingSelector: {name} must be an int >= 1, got {value!r}")
        if not 0 <= decay <= 1:
            raise ValueError(f"RoutingSelector: decay must lie in [0, 1], got {decay!r}")
        if see_self is False and not shared_qk:
            raise ValueError("RoutingSelector: see_self=False needs shared_qk=True, got shared_qk=False")
        self.decay, self.shared_qk = decay, shared_qk
        self.see_self = not shared_qk if see_self is None else see_self
        self.register_buffer("means", normalised(torch.randn(heads, n_clusters, dim)))

    @torch.no_grad()
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        window: int | None = None,
        assignment: str = "balanced",
        *,
        causal: bool = True,
        mask: Tensor | None = None,
    ) -> ClusterLayout:
        """The groups for q and k (B, H, N, D).

        Args:
            window: w; default: N / C, rounded up.
            assignment: "balanced" or "nearest", see above.
            causal: no query sees a later key.
            mask: bool (B, N), False: padding, in no cluster.
        """
        self._check(q, k, window, assignment, causal, mask)
        n, clusters = q.shape[2], self.means.shape[1]
        w = min(-(-n // clusters) if window is None else window, n)
        if assignment == "nearest":
            return self._latest(self._nearest(q), w, mask)
        q_idx = self._best(q, w, mask)
        k_idx = q_idx if self.shared_qk else self._best(k, w, mask)
        return self._whole(q_idx, k_idx, causal)

    @torch.no_grad()
    def update(self, q: Tensor, k: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Move each centroid towards the mean of the tokens that are nearest to it.

            mu_c <- LN(lambda mu_c + (1 - lambda) mean of its q~)        (shared; else half that and half of its k~)

        In data-parallel training every process moves its own copy: average `means` over the processes.
        """
        many = [q] if self.shared_qk or k is None else [q, k]
        heads, clusters, _ = self.means.shape
        first = (torch.arange(heads, device=q.device) * clusters).view(-1, 1)
        moved = self.means.clone()
        for x in many:
            cluster = self._nearest(x) + first  # (B, H, N)
            real = (
                torch.ones_like(cluster, dtype=torch.bool)
                if mask is None
                else mask[:, None].expand_as(cluster)
            )
            at, count = cluster[real], torch.zeros(heads * clusters, device=q.device)
            count = count.index_add(0, at, torch.ones_like(at, dtype=count.dtype)).view(heads, clusters, 1)
            total = torch.zeros_like(self.means).flatten(0, 1)
            total = total.index_add(0, at, normalised(x)[real].to(total))
            mean = total.view_as(self.means) / count.clamp_min(1)
            moved += (1 - self.decay) / len(many) * torch.where(count > 0, mean - self.means, 0.0)
        self.means.copy_(normalised(moved))

    # --------------------------------------------------------------------------------------- assignments
    def _scores(self, x: Tensor) -> Iterator[Tensor]:
        """mu . x~, (B, H, C, N), some heads at a time."""
        step = max(1, CHUNK // (x.shape[0] * self.means.shape[1] * x.shape[2]))
        for h in range(0, x.shape[1], step):
            some = normalised(x[:, h : h + step])
            yield torch.matmul(self.means[h : h + step].to(some), some.mT)

    def _nearest(self, x: Tensor) -> Tensor:
        """int64 (B, H, N): the centroid of each token."""
        return torch.cat([score.argmax(2) for score in self._scores(x)], 1)

    def _best(self, x: Tensor, w: int, mask: Tensor | None) -> Tensor:
        """int64 (B, H, C, w): the w tokens nearest to each centroid, by position; -1 where there are fewer."""
        parts, n = [], x.shape[2]
        for score in self._scores(x):
            if mask is not None:
                score = score.masked_fill(~mask[:, None, None], -torch.inf)
            least = score.topk(w, 3).values[..., -1:]
            above, ties = score > least, score == least
            taken = above | (ties & (ties.cumsum(3, dtype=torch.int32) <= w - above.sum(3, keepdim=True)))
            parts.append(taken.nonzero()[:, 3].view(*score.shape[:3], w))
        found = torch.cat(parts, 1)
        if mask is None:
            return found
        real = mask[:, None, None].expand(*found.shape[:3], -1).gather(3, found)
        found = torch.where(real, found, n).sort(3).values  # empty slots last
        return torch.where(found < n, found, -1)

    def _whole(self, q_idx: Tensor, k_idx: Tensor, causal: bool) -> ClusterLayout:
        """Every query of a cluster sees every key of it (up to itself)."""
        w = q_idx.shape[3]
        enter, leave = torch.zeros_like(k_idx), torch.where(k_idx >= 0, w, 0)
        apart = not self.see_self and self.shared_qk and w > 1
        if causal:
            last = torch.where(q_idx >= 0, q_idx, torch.iinfo(q_idx.dtype).max)
            enter = torch.searchsorted(
                last, k_idx.clamp_min(0).contiguous()
            )  # the first query at or after the key
            if apart:
                enter = enter + (
                    torch.arange(w, device=enter.device) > 0
                )  # the first token sees itself alone
                apart = False
        return ClusterLayout(q_idx, k_idx, enter, leave, apart)

    def _latest(self, cluster: Tensor, w: int, mask: Tensor | None) -> ClusterLayout:
        """Runs of w tokens of a cluster, each with the run before it as keys too."""
        batch, heads, n = cluster.shape
        device, clusters = cluster.device, self.means.shape[1]
        if mask is not None:
            cluster = torch.where(mask[:, None], cluster, clusters)  # padding: a cluster that is left out
        order = torch.argsort(cluster, dim=2, stable=True)  # by cluster, then by position
        counts = torch.zeros(batch, heads, clusters + 1, dtype=torch.int64, device=device)
        counts = counts.scatter_add(2, cluster, torch.ones_like(cluster))
        runs = (counts + w - 1) // w
        sorted_by = cluster.gather(2, order)
        rank = torch.arange(n, device=device) - (counts.cumsum(2) - counts).gather(2, sorted_by)
        run = (runs.cumsum(2) - runs).gather(2, sorted_by) + rank // w
        many = max(1, int(runs[..., :clusters].sum(2).max()))
        own = torch.full((batch, heads, (int(run.max()) + 2) * w), -1, device=device)
        own = own.scatter(2, (run + 1) * w + rank % w, torch.where(sorted_by < clusters, order, -1))
        own = own.view(batch, heads, -1, w)  # one empty run before all others
        first = torch.zeros(batch, heads, own.shape[2] + 1, dtype=torch.bool, device=device)
        first = first.scatter(2, runs.cumsum(2) - runs + 1, True)[
            :, :, 1 : many + 1
        ]  # runs that begin a cluster
        q_idx, before = own[:, :, 1 : many + 1], own[:, :, :many]
        before = torch.where(first.unsqueeze(3), -1, before)
        slot = torch.arange(w, device=device)
        late = 0 if self.see_self else 1
        enter = torch.cat([torch.zeros_like(slot), slot + late]).expand(batch, heads, many, -1)
        if late:
            enter = torch.where(first.unsqueeze(3) & (torch.arange(2 * w, device=device) == w), 0, enter)
        leave = torch.cat([slot + late, torch.full_like(slot, w)]).expand(batch, heads, many, -1)
        k_idx = torch.cat([before, q_idx], 3)
        return ClusterLayout(q_idx, k_idx, enter, torch.where(k_idx >= 0, leave, 0))

    def _check(
        self, q: Tensor, k: Tensor, window: int | None, assignment: str, causal: bool, mask: Tensor | None
    ) -> None:
        heads, _, dim = self.means.shape
        for name, t in (("q", q), ("k", k)):
            if (
                t.ndim != 4
                or t.shape[1] != heads
                or t.shape[3] != dim
                or t.shape[2] < 1
                or t.shape != q.shape
            ):
                raise ValueError(
                    f"RoutingSelector: {name} must be (B, {heads} heads, N, {dim}) like q, got {tuple(t.shape)}"
                )
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ValueError(f"RoutingSelector: window must be an int >= 1 or None, got {window!r}")
        if assignment not in ASSIGNMENTS:
            raise ValueError(
                f"RoutingSelector: assignment must be one of {', '.join(ASSIGNMENTS)}, got {assignment!r}"
            )
        if assignment == "nearest" and not (causal and self.shared_qk):
            raise ValueError(
                "RoutingSelector: assignment nearest is for causal attention with shared queries and keys; got "
                f"causal={causal}, shared_qk={self.shared_qk}"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[0], q.shape[2])):
            raise ValueError(
                f"RoutingSelector: mask must be bool {(q.shape[0], q.shape[2])}, got {mask.dtype} {tuple(mask.shape)}"
            )


def wide(x: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def normalised(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without scale and bias, in at least float32: mean 0, norm sqrt(D)."""
    return F.layer_norm(x.to(wide(x)), x.shape[-1:])


def routing_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    selector: RoutingSelector,
    *,
    causal: bool = True,
    window: int | None = None,
    assignment: str = "balanced",
    mask: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Attention inside the clusters of `selector`, over normalised queries and keys.

        o_i = mean over the clusters c of i of sum_{j in K_c} softmax_j(scale q~_i . k~_j) v_j

    A token that no cluster took, or that sees no key, gives 0: other heads and the residual path serve it.

    Args:
        q: (B, H, N, D); k: the same shape, or None for shared queries and keys; v: (B, H, N, Dv).
        selector: `RoutingSelector` for H heads of width D. In train mode its centroids move after the call.
        causal, window, assignment, mask: as in `RoutingSelector`; the causal mask is by original positions.
        scale: default D ** -0.5.
        engine: as in `attention`.

    Returns:
        (B, H, N, Dv) in v's dtype. Gradients of q, k and v come through the attention alone.

    Cost: N C scores of centroids and C w^2 pairs per head, N^1.5 for C = w = sqrt(N).

    >>> selector = RoutingSelector(heads=2, dim=16, n_clusters=5)
    >>> q, v = torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    >>> routing_attention(q, None, v, selector).shape
    torch.Size([1, 2, 100, 16])
    """
    if selector.shared_qk is not (k is None):
        raise ValueError(
            "routing_attention: k must be None exactly when the selector shares queries and keys; got "
            f"shared_qk={selector.shared_qk} and k {'None' if k is None else tuple(k.shape)}"
        )
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "routing_attention: v must be (B, H, N, Dv) with the batch, heads and length of q (heads are not grouped); "
            f"got {tuple(v.shape)} and {tuple(q.shape)}"
        )
    q_ = normalised(q)
    k_ = q_ if k is None else normalised(k)
    groups = selector(q_, k_, window, assignment, causal=causal, mask=mask)
    out = _attend(q_.to(v.dtype), k_.to(v.dtype), v, groups, scale, engine)
    if selector.training:
        selector.update(q_, None if k is None else k_, mask)
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, groups: ClusterLayout, scale: float | None, engine: str
) -> Tensor:
    """Gather the groups, attend in each, and take the mean where a token is in several."""
    (batch, heads, n, _), many = q.shape, groups.q_idx.shape[2]
    plane = (torch.arange(batch * heads, device=q.device) * n).view(batch, heads, 1, 1)

    def gathered(x: Tensor, idx: Tensor) -> Tensor:  # (B C, H, w, .)
        rows = x.reshape(-1, x.shape[3]).index_select(0, (plane + idx.clamp_min(0)).flatten())
        return rows.view(*idx.shape, -1).transpose(1, 2).flatten(0, 1)

    out, lse = cast(
        tuple[Tensor, Tensor],
        attention(
            gathered(q, groups.q_idx), gathered(k, groups.k_idx), gathered(v, groups.k_idx),
            _who(groups), scale=scale, return_lse=True, engine=engine,
        ),
    )  # fmt: skip
    back = lambda t: t.unflatten(0, (batch, many)).transpose(1, 2).flatten(0, 3)  # noqa: E731  (B H C w, ...)
    counts = (back(lse.detach()) > -torch.inf) & (groups.q_idx.flatten() >= 0)
    at = (plane + groups.q_idx.clamp_min(0)).flatten()[counts]
    total = torch.zeros(batch * heads * n, v.shape[3], dtype=wide(v), device=v.device)
    total = total.index_add(0, at, back(out)[counts].to(total.dtype))
    times = torch.bincount(at, minlength=len(total)).clamp_min(1)
    return (total / times[:, None]).to(v.dtype).view(batch, heads, n, -1)


def _who(groups: ClusterLayout):
    """The layout of the groups, (B C, H, wq, wk); one for all where they are alike."""
    enter, leave = (t.transpose(1, 2).flatten(0, 1) for t in (groups.enter, groups.leave))  # (B C, H, wk)
    if bool((enter == enter[:1, :1]).all()) and bool((leave == leave[:1, :1]).all()):
        enter, leave = enter[:1, :1], leave[:1, :1]
    layout = interval_layout(enter, leave, groups.q_idx.shape[3], enter.shape[1])
    if groups.apart:
        layout = layout & (~SlidingWindow(1)).layout(layout.q_len, layout.k_len).to(layout.device)
    return layout


class RoutingAttention(nn.Module):
    """Multi-head attention in which some heads see a window and the others the clusters of their tokens.

    Args:
        d_model: width of the tokens.
        n_local_heads, n_routing_heads: heads of either kind; at least one in all.
        local_window: keys of a local head: causal, the query's own and those before; else half before and half after.
        n_clusters, window, decay, assignment: of the routing heads, see `RoutingSelector` and `routing_attention`.
        causal: True: routing heads share queries and keys, no token sees a later one (but see `RoutingSelector`
            about assignment "balanced"); False: bidirectional, with two projections.
        head_dim: default d_model / heads.

    Shape: (B, N, d_model) -> (B, N, d_model).

    In train mode every call moves the centroids (a buffer). For generation set `assignment = "nearest"`.

    Source: Efficient Content-Based Sparse Attention with Routing Transformers (2020). Differs from the paper: rotary
    positions, of local heads only, in place of relative ones; routing heads know positions by their mask.

    >>> layer = RoutingAttention(64, 2, 2, local_window=16, n_clusters=8)
    >>> layer(torch.randn(1, 100, 64)).shape
    torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        d_model: int,
        n_local_heads: int,
        n_routing_heads: int,
        local_window: int = 256,
        n_clusters: int = 16,
        window: int | None = None,
        *,
        causal: bool = True,
        assignment: str = "balanced",
        decay: float = 0.999,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        heads = n_local_heads + n_routing_heads
        if min(n_local_heads, n_routing_heads) < 0 or heads < 1 or (head_dim is None and d_model % heads):
            raise ValueError(
                "RoutingAttention: n_local_heads and n_routing_heads must be >= 0 and add up to a divisor of d_model; "
                f"got {n_local_heads}, {n_routing_heads} and {d_model}"
            )
        if isinstance(local_window, bool) or not isinstance(local_window, int) or local_window < 1:
            raise ValueError(f"RoutingAttention: local_window must be an int >= 1, got {local_window!r}")
        if assignment not in ASSIGNMENTS or (assignment == "nearest" and not causal):
            raise ValueError(
                "RoutingAttention: assignment must be balanced, or nearest with causal=True; "
                f"got {assignment!r} with causal={causal}"
            )
        self.head_dim = head_dim or d_model // heads
        self.n_local_heads, self.n_routing_heads, self.causal = n_local_heads, n_routing_heads, causal
        self.window, self.assignment = window, assignment
        self.local = (
            Causal() & SlidingWindow(local_window)
            if causal
            else SlidingWindow(before=local_window // 2, after=(local_window - 1) // 2)
        )
        key_heads = (
            n_local_heads if causal else heads
        )  # routing heads of a causal model have no keys of their own
        self.q_proj = nn.Linear(d_model, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, key_heads * self.head_dim, bias=False) if key_heads else None
        self.v_proj = nn.Linear(d_model, heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, d_model, bias=False)
        self.selector = (
            RoutingSelector(n_routing_heads, self.head_dim, n_clusters, decay, shared_qk=causal)
            if n_routing_heads
            else None
        )

    def forward(self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """out (B, N, d_model).

        Args:
            x: (B, N, d_model).
            rope: angles (N, D / 2) by which queries and keys of local heads are rotated; None: no positions.
            mask: bool (B, N), False: padding at the end, seen by nobody.
        """
        split = lambda t: t.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # noqa: E731  (B, heads, N, D)
        q, v, near, parts = split(self.q_proj(x)), split(self.v_proj(x)), self.n_local_heads, []
        k = None if self.k_proj is None else split(self.k_proj(x))
        if near and k is not None:
            local = q[:, :near], k[:, :near]
            if rope is not None:
                local = rotated(local[0], rope), rotated(local[1], rope)
            who = self.local if mask is None else self.local.layout(x.shape[1]) & _real(mask)
            parts.append(cast(Tensor, attention(local[0], local[1], v[:, :near], who)))
        if self.selector is not None:
            shared = None if self.causal or k is None else k[:, near:]
            parts.append(
                routing_attention(
                    q[:, near:], shared, v[:, near:], self.selector,
                    causal=self.causal, window=self.window, assignment=self.assignment, mask=mask,
                )
            )  # fmt: skip
        return self.o_proj(torch.cat(parts, 1).transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return (
            f"n_local_heads={self.n_local_heads}, n_routing_heads={self.n_routing_heads}, local={self.local!r}, "
            f"window={self.window}, assignment={self.assignment}, causal={self.causal}"
        )


def _real(mask: Tensor) -> BlockLayout:
    """Layout (B, 1, N, N) in which every query sees the keys that are no padding."""
    n = mask.shape[1]
    leave = torch.where(mask, n, 0).unsqueeze(1)
    return interval_layout(torch.zeros_like(leave), leave, n, 1)
