"""Hierarchical self-attention: tokens in a tree, one weight for each pair of sibling subtrees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.core.attention import attention
from foveate.core.patterns import SlidingWindow
from foveate.core.patterns.base import integer

WIDE = 128  # nodes with more children go through the engine, which holds no children x children logits
ENERGIES = ("dot", "sqdist")


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """A rooted tree whose leaves are the tokens, in any nesting and of any depth.

    Nodes 0 .. N - 1 are the tokens in their order, inner nodes follow in any order; parent[root] = -1. Nodes with one
    child are allowed and change nothing.

    Args:
        parent: integers (nodes,).
        tokens: N, at least 1.

    Raises:
        ValueError: not one root, a cycle, a token with children, an inner node without.

    >>> tree = Hierarchy.from_windows(9, 3)
    >>> tree.parent.tolist(), tree.depth, tree.scores
    ([9, 9, 9, 10, 10, 10, 11, 11, 11, 12, 12, 12, -1], 2, 33)
    """

    parent: Any
    tokens: int

    def __post_init__(self) -> None:
        parent = torch.as_tensor(self.parent)
        n = integer("Hierarchy", "tokens", self.tokens, 1)
        if parent.dtype.is_floating_point or parent.dtype == torch.bool or parent.dim() != 1:
            raise ValueError(
                f"Hierarchy: parent must be integers (nodes,), got {parent.dtype} {tuple(parent.shape)}"
            )
        up = parent.long().cpu().numpy()
        roots = int((up < 0).sum())
        if len(up) < n or roots != 1 or up.max(initial=-1) >= len(up):
            raise ValueError(
                f"Hierarchy: parent must name a node below {len(up)} for each of at least {n} nodes, and -1 for one "
                f"root; got {len(up)} nodes, {roots} roots, largest parent {up.max(initial=-1)}"
            )
        children = np.bincount(up[up >= 0], minlength=len(up))
        if children[:n].any():
            raise ValueError(f"Hierarchy: token {int(children[:n].argmax())} has children; accepted: leaves")
        if not children[n:].all():
            raise ValueError(f"Hierarchy: inner node {n + int((children[n:] == 0).argmax())} has no children")
        object.__setattr__(self, "parent", torch.from_numpy(up.copy()))
        object.__setattr__(self, "tokens", n)
        if (self._depths < 0).any():
            raise ValueError(f"Hierarchy: node {int((self._depths < 0).argmax())} lies on a cycle")

    @classmethod
    def from_windows(cls, tokens: int, branching: int | Sequence[int]) -> Hierarchy:
        """Windows of tokens, windows of windows and so on, up to one root.

        Args:
            tokens: N. branching: children of a node, >= 2, until at most that many are left for the root; or one
                number per level from the tokens upwards, with all that is left under the root. The last node of a
                level may be smaller.

        >>> Hierarchy.from_windows(7, [2]).parent.tolist()
        [7, 7, 8, 8, 9, 9, 10, 11, 11, 11, 11, -1]
        """
        count, first, parts = integer("from_windows", "tokens", tokens, 1), 0, []
        if isinstance(branching, int):
            b = integer("from_windows", "branching", branching, 2)
            sizes = [b] * max(0, math.ceil(math.log(count, b)) + 1)
            least = b
        else:
            sizes, least = [integer("from_windows", "branching", b, 2) for b in branching], 1
        for size in sizes:
            if count > least:
                parts.append(np.arange(count) // size + first + count)
                first, count = first + count, -(-count // size)
        if count > 1:
            parts.append(np.full(count, first + count))
        return cls(np.concatenate([*parts, [-1]]), tokens)

    @classmethod
    def from_segments(cls, ids: Sequence[Any]) -> Hierarchy:
        """Segments nested in each other, for example [sentence of each token, paragraph of each token].

        Args:
            ids: one list of integers (N,) per level, from the finest; equal ids are one segment, contiguous or not. The
                segments of the last level are the children of the root.

        Raises:
            ValueError: a segment that lies in two of the next level.

        >>> Hierarchy.from_segments([[0, 0, 1, 1, 2], [0, 0, 0, 0, 1]]).parent.tolist()
        [5, 5, 6, 6, 7, 8, 8, 9, 10, 10, -1]
        """
        levels = [np.asarray(level) for level in ids]
        if not levels or any(level.ndim != 1 or level.shape != levels[0].shape for level in levels):
            shapes = [level.shape for level in levels]
            raise ValueError(f"from_segments: ids must be lists of one length, got shapes {shapes}")
        n = len(levels[0])
        below, first, parts = np.arange(n), 0, []  # the node of each token at the level before
        for number, level in enumerate(levels):
            kinds, of_token = np.unique(level, return_inverse=True)
            count = int(below.max()) + 1
            up = np.full(count, -1)
            up[below] = of_token.reshape(-1)
            if (up[below] != of_token.reshape(-1)).any():
                raise ValueError(
                    f"from_segments: a segment of level {number - 1} lies in two segments of level {number}; "
                    "accepted: nested levels, the finest first"
                )
            parts.append(up + first + count)
            first, below = first + count, of_token.reshape(-1)
            last = len(kinds)
        return cls(np.concatenate([*parts, np.full(last, first + last), [-1]]), n)

    @classmethod
    def from_modalities(cls, lengths: Sequence[int], branching: int | None = None) -> Hierarchy:
        """One subtree per modality under the root, their tokens one after another.

        Args:
            lengths: tokens of each modality. branching: windows inside each (`from_windows`); None: its tokens are
                the children of its node.

        >>> Hierarchy.from_modalities([2, 3]).parent.tolist()
        [5, 5, 6, 6, 6, 7, 7, -1]
        """
        lengths = [integer("from_modalities", "lengths", length, 1) for length in lengths]
        n = sum(lengths)
        leaves, inner, first, start = [], [], 0, n
        for length in lengths:
            up = cls.from_windows(length, length + 1 if branching is None else branching).parent.numpy()
            node = np.concatenate([np.arange(length) + first, np.arange(len(up) - length) + start])
            up = np.where(up < 0, -1, node[up])
            leaves.append(up[:length])
            inner.append(up[length:])
            first, start = first + length, start + len(up) - length
        up = np.concatenate([*leaves, *inner])
        return cls(np.concatenate([np.where(up < 0, start, up), [-1]]), n)

    # ---------------------------------------------------------------------------------------- what the tree says
    @property
    def nodes(self) -> int:
        return len(self.parent)

    @cached_property
    def _depths(self) -> np.ndarray:
        """Edges between each node and the root; -1 for nodes that do not reach it."""
        up = self.parent.numpy()
        order = np.argsort(up, kind="stable")
        ends = np.searchsorted(up[order], np.arange(len(up) + 1))
        depths = np.full(len(up), -1)
        here, depth = order[: ends[0]], 0
        while len(here):
            depths[here] = depth
            counts = ends[here + 1] - ends[here]
            offsets = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            here, depth = order[np.repeat(ends[here], counts) + offsets], depth + 1
        return depths

    @property
    def depth(self) -> int:
        """Most edges between a token and the root; 1 where all tokens are siblings."""
        return int(self._depths.max())

    @cached_property
    def sizes(self) -> Tensor:
        """int64 (nodes,): tokens below each node, 1 for a token."""
        sizes = (np.arange(self.nodes) < self.tokens).astype(np.int64)
        up = self.parent.numpy()
        for depth in range(self.depth, 0, -1):
            here = np.flatnonzero(self._depths == depth)
            np.add.at(sizes, up[here], sizes[here])
        return torch.from_numpy(sizes)

    @property
    def scores(self) -> int:
        """Logits that attention computes per head: one per token with itself, one per ordered pair of siblings."""
        up = self.parent.numpy()
        children = np.bincount(up[up >= 0], minlength=self.nodes)
        return self.tokens + int((children * (children - 1)).sum())

    def subtree(self, node: int) -> Tensor:
        """bool (N,), True for the tokens below a node."""
        integer("subtree", "node", node, 0, self.nodes - 1)
        at = np.arange(self.tokens)
        below = np.zeros(self.tokens, bool)
        for _ in range(self.depth + 1):
            below |= at == node
            at = np.where(at < 0, -1, self.parent.numpy()[at])
        return torch.from_numpy(below)

    @cached_property
    def _levels(self) -> tuple[_Level, ...]:
        return _levels(self)


@dataclass(frozen=True)
class _Family:
    """Inner nodes of one depth that have about as many children; padded children are the first node, of size 0."""

    children: Tensor  # int64 (n, b), places in the next level
    nodes: Tensor  # int64 (n, b), the same as nodes of the tree
    share: Tensor  # float64 (n, b), |B| / |A|
    log_size: Tensor  # float64 (n, b), log |B|; -inf for padding

    @property
    def wide(self) -> bool:
        return self.children.shape[1] > WIDE


@dataclass(frozen=True)
class _Level:
    """Nodes of one depth: tokens first, then the inner nodes family by family."""

    tokens: Tensor  # int64, those at this depth
    families: tuple[_Family, ...]
    place: Tensor  # int64, where each node stands in the flattened children of the level above


def _levels(tree: Hierarchy) -> tuple[_Level, ...]:
    up, depths, sizes = tree.parent.numpy(), tree._depths, tree.sizes.numpy()
    counts = np.bincount(up[up >= 0], minlength=len(up))
    order = np.argsort(up, kind="stable")  # children of each node, in their order
    ends = np.searchsorted(up[order], np.arange(len(up) + 1))
    # narrow families are padded to a power of two, wide ones hold nodes of one width
    width = np.where(counts > WIDE, counts, 1 << np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int64))
    at = np.zeros(len(up), np.int64)  # place of a node in its level
    rows: list[list[np.ndarray]] = []
    for depth in range(tree.depth + 1):
        here = np.flatnonzero(depths == depth)
        inner = here[counts[here] > 0]
        groups = [inner[width[inner] == w] for w in np.unique(width[inner])]
        rows.append([here[counts[here] == 0], *groups])
        at[np.concatenate(rows[-1])] = np.arange(len(here))
    made: list[_Level] = []
    place = np.zeros(1, np.int64)
    for leaves, *groups in rows:
        families, below = [], []
        for group in groups:
            b = int(width[group[0]])
            column = np.arange(b)
            real = column < counts[group][:, None]
            nodes = order[ends[group][:, None] + np.where(real, column, 0)]  # (n, b)
            size = np.where(real, sizes[nodes], 0)
            with np.errstate(divide="ignore"):
                log_size = np.log(size.astype(np.float64))
            tensors = (np.where(real, at[nodes], 0), nodes, size / sizes[group][:, None], log_size)
            families.append(_Family(*(torch.from_numpy(t) for t in tensors)))
            below.append(np.where(real, at[nodes], -1).reshape(-1))
        made.append(_Level(torch.from_numpy(leaves), tuple(families), torch.from_numpy(place)))
        flat = np.concatenate(below) if below else np.zeros(0, np.int64)
        place = np.zeros(int(flat.max(initial=-1)) + 1, np.int64)
        place[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    return tuple(made)


def hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Hierarchy,
    *,
    sibling_bias: Tensor | None = None,
    scale: float | None = None,
    energy: str = "dot",
    return_weights: bool = False,
) -> Any:
    """The attention matrix that is closest to softmax among those in which sibling subtrees share one weight.

    For siblings B and C with mean queries, keys and values of the tokens below them, and |C| tokens:

        s_BC = scale qbar_B . kbar_C + eps_B . eps_C            logit shared by all pairs between B and C
        g_i  = scale q_i . k_i  for a token;    g_A = sum over children B of |B| / |A| log Z_B
        Z_B  = exp(g_B) + sum over siblings C of |C| exp(s_BC)                          upwards, leaves to root
        theta_BC = m_A exp(s_BC) / Z_B,   m_B = m_A exp(g_B) / Z_B,   m_root = 1          downwards
        o_i = m_i v_i + sum over B at or above i, over siblings C of B, of theta_BC |C| vbar_C

    Among all matrices theta with rows that sum to 1 and one weight per pair of siblings, it has the least
    sum_i KL(theta_i || softmax_i). Where all tokens are children of the root it is softmax attention. Rows are means
    over a subtree's queries, so that it cannot be causal.

    Args:
        q: (B, H, N, D); k: (B, Hkv, N, D); v: (B, Hkv, N, Dv); H a multiple of Hkv.
        tree: of N tokens, for all batch rows and heads.
        sibling_bias: eps, float (nodes, E), or (Hkv, nodes, E); features of each node's place among its siblings. They
            count between siblings, not in a token's logit with itself.
        scale: default D ** -0.5.
        energy: "dot", or "sqdist": logits - scale |q_i - k_j|^2 / 2, as the paper writes it. The two agree where all
            keys have one norm.
        return_weights: also return theta, (B, H, N, N).

    Returns:
        (B, H, N, Dv) in q's dtype; sums in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: inputs that do not fit each other or the tree.

    Cost: `tree.scores` logits per head, about N b + N for branching b, where dense attention has N^2.

    Source: Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems (2025).
    Differs: dot products by default, so that a flat tree is softmax attention; grouped heads.

    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> tree = Hierarchy.from_windows(100, 10)
    >>> hierarchical_attention(q, k, v, tree).shape, tree.scores
    (torch.Size([1, 2, 100, 16]), 1090)
    """
    _check(q, k, v, tree, sibling_bias, energy)
    dtype = q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = float(q.shape[3] ** -0.5) if scale is None else float(scale)
    dim = v.shape[3]
    q, k, v = q.to(wide) * scale, k.to(wide), v.to(wide)
    if energy == "sqdist":  # |q_i|^2 is the same in all logits of a row of any node, so that it cancels
        length = -0.5 * scale * k.square().sum(-1, keepdim=True)
        q, k = torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, length], -1)
    if return_weights:  # the rows of a unit matrix as values give the weights
        unit = torch.eye(tree.tokens, dtype=wide, device=v.device)
        v = torch.cat([v, unit.expand(*v.shape[:2], -1, -1)], -1)
    out = _two_passes(q, k, v, tree, None if sibling_bias is None else sibling_bias.to(wide))
    if return_weights:
        return out[..., :dim].to(dtype), out[..., dim:].to(dtype)
    return out.to(dtype)


def _two_passes(q: Tensor, k: Tensor, v: Tensor, tree: Hierarchy, eps: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    levels = [_to(level, q.device) for level in tree._levels]
    # upwards: means and energies of the level below, of which each family takes its children
    below: tuple[Tensor, ...] = ()  # queries (B, H, n, D), keys and values (B, Hkv, n, D), energies (B, H, n)
    found: list[list[tuple[Tensor, Tensor]]] = []
    for level in reversed(levels):
        mine = [t.index_select(2, level.tokens) for t in (q, k, v)]
        self_logit = (mine[0].unflatten(1, (-1, groups)) * mine[1][:, :, None]).sum(-1).flatten(1, 2)
        parts, here = [(*mine, self_logit)], []
        for family in level.families:
            queries, keys, values, g = (_take(t, family.children) for t in below)
            siblings = _wide if family.wide else _narrow
            log_z, log_keep, context = siblings(queries, keys, values, g, family, eps)
            share = family.share.to(q)
            pooled = tuple((share[..., None] * t).sum(3) for t in (queries, keys, values))  # (B, heads, n, D)
            parts.append((*pooled, (share * log_z).sum(3)))
            here.append((log_keep, context))
        below = tuple(torch.cat(t, 2) for t in zip(*parts, strict=True))
        found.append(here)
    # downwards: what of a query's weight is left inside a node, and the mixture of what lies outside of it
    log_mass = q.new_zeros(*q.shape[:2], 1)
    context = q.new_zeros(*q.shape[:2], 1, v.shape[3])
    outs: list[Tensor] = []
    for level, here in zip(levels, reversed(found), strict=True):
        log_mass, context = log_mass.index_select(2, level.place), context.index_select(2, level.place)
        n = len(level.tokens)
        own = v.index_select(2, level.tokens).repeat_interleave(groups, 1)
        outs.append(context[:, :, :n] + log_mass[:, :, :n, None].exp() * own)
        masses, contexts, start = [], [], n
        for family, (log_keep, mixed) in zip(level.families, here, strict=True):
            end = start + len(family.children)
            mass = log_mass[:, :, start:end, None]  # (B, H, n, 1)
            masses.append((mass + log_keep).flatten(2, 3))
            contexts.append((context[:, :, start:end, None] + mass[..., None].exp() * mixed).flatten(2, 3))
            start = end
        if masses:
            log_mass, context = torch.cat(masses, 2), torch.cat(contexts, 2)
    order = torch.cat([level.tokens for level in levels])
    return torch.cat(outs, 2).index_select(2, order.argsort())


def _narrow(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, family: _Family, eps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, log(m_B / m_A) (B, H, n, b), and the mixture of the siblings' values (B, H, n, b, Dv)."""
    heads, b, kv_heads = q.shape[1], q.shape[3], k.shape[1]

    def rows(
        t: Tensor,
    ) -> Tensor:  # (B, H, n, b, ..) -> (B, Hkv, n, G b, ..): the rows of a group share its keys
        return t.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(3, 4)

    def back(t: Tensor) -> Tensor:
        return t.unflatten(3, (-1, b)).transpose(2, 3).flatten(1, 2)

    s = back(rows(q) @ k.mT)  # (B, H, n, b, b)
    if eps is not None:
        bias = _bias(eps, family.nodes, kv_heads)  # (Hkv, n, b, E)
        s = s + (bias @ bias.mT).repeat_interleave(heads // kv_heads, 0)
    own = torch.eye(b, dtype=torch.bool, device=q.device)
    s = torch.where(own, g[..., None], s + family.log_size.to(s)[:, None])
    log_z = s.logsumexp(-1)
    weights = (s - log_z[..., None]).exp().masked_fill(own, 0.0)
    return log_z, g - log_z, back(rows(weights) @ v)


def _wide(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, family: _Family, eps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same through the engine: keys get one more column, log |C|, and a query does not see itself."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    more_q = [torch.ones_like(q[..., :1])]
    more_k = [family.log_size.to(k)[..., None].expand_as(k[..., :1])]
    if eps is not None:
        bias = _bias(eps, family.nodes, kv_heads).expand(kv_heads, -1, -1, -1)
        more_q.append(bias.repeat_interleave(groups, 0).expand(len(q), -1, -1, -1, -1))
        more_k.append(bias.expand(len(k), -1, -1, -1, -1))
    q, k = torch.cat([q, *more_q], -1), torch.cat([k, *more_k], -1)
    batch = len(q)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (B n, heads, b, D)
    out, lse = attention(q, k, v, ~SlidingWindow(1), scale=1.0, return_lse=True)
    out, lse = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (out, lse))
    log_z = torch.logaddexp(g, lse)
    return log_z, g - log_z, (lse - log_z).exp()[..., None] * out


def _take(t: Tensor, places: Tensor) -> Tensor:
    """t (B, heads, m, ..) at places (n, b): (B, heads, n, b, ..)."""
    return t.index_select(2, places.flatten()).unflatten(2, tuple(places.shape))


def _bias(eps: Tensor, nodes: Tensor, kv_heads: int) -> Tensor:
    """eps of nodes (n, b): (1 or Hkv, n, b, E)."""
    eps = eps[None] if eps.dim() == 2 else eps
    return eps.index_select(1, nodes.flatten()).unflatten(1, tuple(nodes.shape)).expand(kv_heads, -1, -1, -1)


def _to(level: _Level, device: torch.device) -> _Level:
    if level.place.device == device:
        return level
    families = (
        _Family(*(t.to(device) for t in (f.children, f.nodes, f.share, f.log_size))) for f in level.families
    )
    return _Level(level.tokens.to(device), tuple(families), level.place.to(device))


def _check(q: Tensor, k: Tensor, v: Tensor, tree: Hierarchy, eps: Tensor | None, energy: str) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.ndim != 4 or not t.is_floating_point():
            got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a float tensor (batch, heads, length, dim), got {got}")
    if not isinstance(tree, Hierarchy):
        raise TypeError(f"tree must be a Hierarchy, got {type(tree).__name__}")
    if (
        len({q.shape[0], k.shape[0], v.shape[0]}) > 1
        or q.shape[3] != k.shape[3]
        or k.shape[1] != v.shape[1]
        or q.shape[1] % k.shape[1]
        or len({q.dtype, k.dtype, v.dtype}) > 1
    ):
        raise ValueError(
            "q (B, H, N, D), k (B, Hkv, N, D) and v (B, Hkv, N, Dv) must share B, D, dtype and heads, with H a "
            f"multiple of Hkv; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    lengths = (q.shape[2], k.shape[2], v.shape[2])
    if set(lengths) != {tree.tokens}:
        raise ValueError(
            f"a tree of {tree.tokens} tokens needs as many queries, keys and values; got {lengths}"
        )
    if energy not in ENERGIES:
        raise ValueError(f"energy must be one of {', '.join(ENERGIES)}, got {energy!r}")
    if eps is None:
        return
    shape = tuple(eps.shape)
    if len(shape) not in (2, 3) or shape[-2] != tree.nodes or (len(shape) == 3 and shape[0] != k.shape[1]):
        raise ValueError(
            f"sibling_bias must be ({tree.nodes}, E) or ({k.shape[1]}, {tree.nodes}, E), features of each node; got "
            f"{shape}"
        )


def sibling_positions(tree: Hierarchy, dim: int, *, base: float = 100.0) -> Tensor:
    """Features of each node's place p among its siblings, float32 (nodes, dim): sin and cos of p base ** (-2 j / dim).

    Their products depend on the distance between siblings alone. For `sibling_bias`, times a weight of your choice.

    >>> eps = sibling_positions(Hierarchy.from_windows(9, 3), 4)  # tokens 0 to 2 are siblings, and 3 to 5
    >>> torch.equal(eps[:3], eps[3:6]), torch.allclose(eps[0] @ eps[1], eps[4] @ eps[5])
    (True, True)
    """
    integer("sibling_positions", "dim", dim, 2)
    if dim % 2:
        raise ValueError(f"sibling_positions: dim must be even, got {dim}")
    up = tree.parent.numpy()
    order = np.argsort(up, kind="stable")
    place = np.empty(len(up), np.int64)
    place[order] = np.arange(len(up)) - np.searchsorted(up[order], up[order])
    rates = base ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.from_numpy(place)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1) / math.sqrt(dim / 2)
