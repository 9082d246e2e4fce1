"""Core attention disaggregation: the weight-free part of attention, cut into tasks of equal cost, on any server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from foveate.core.attention import attention
from foveate.core.patterns.base import integer

Plan = Sequence[Sequence["CAShard"]]  # the shards of every server


@dataclass(frozen=True)
class CAShard:
    """A task: rows [q_start, q_end) of a document, and the keys [0, kv_end) that causal attention needs for them.

    Attributes:
        doc: the document, counted over all ranks.
        q_start, q_end, kv_end: rows and keys of the document; causal, so kv_end = q_end.
        home: the rank that holds the document.
        server: the rank that computes the task.

    >>> CAShard(0, 2, 4, 4, home=0, server=1).cost
    7
    """

    doc: int
    q_start: int
    q_end: int
    kv_end: int
    home: int
    server: int

    @property
    def cost(self) -> int:
        """Query-key pairs."""
        return causal_cost(self.q_end - self.q_start, self.kv_end)


def causal_cost(q: int, kv: int) -> int:
    """F(q, kv) = q kv - q (q - 1) / 2: the pairs of q consecutive rows whose last row sees kv keys.

    The m rows before and the m rows after the middle of a document of even length L cost m (L + 1) together, whatever
    of them was cut away before: a document can be shared out at a constant price per row.

    >>> causal_cost(3, 5), causal_cost(2, 4) + causal_cost(2, 6)  # 3 + 4 + 5 pairs; m = 2, L = 8
    (12, 18)
    """
    return q * kv - q * (q - 1) // 2


@dataclass
class _Item:
    """Head rows [a, b) and tail rows [c, d) of a document, as many on both sides; a document is whole if b = c.

    The tail of an odd document has the middle row besides, so that a head row and a tail row together always cost L
    (an even document: L + 1).
    """

    doc: int
    length: int
    home: int
    server: int
    head: tuple[int, int]
    tail: tuple[int, int]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        (a, b), (c, d) = self.head, self.tail
        both = [(a, d)] if b == c else [(a, b), (c, d)]
        return [(start, end) for start, end in both if end > start]

    @property
    def cost(self) -> int:
        return sum(causal_cost(end - start, end) for start, end in self.ranges)

    @property
    def pair(self) -> int:
        """Cost of one head row and one tail row."""
        return self.length + 1 - self.length % 2

    def rows(self, cost: float, tile: int) -> int:
        """Row pairs, in whole tiles, that can be cut off for at most this cost."""
        return min(int(cost / self.pair), self.head[1] - self.head[0]) // tile * tile

    def cut(self, m: int, server: int) -> _Item:
        """Take the m inner rows of both sides away, as an item of another server."""
        (a, b), (c, d) = self.head, self.tail
        self.head, self.tail = (a, b - m), (c + m, d)
        return _Item(self.doc, self.length, self.home, server, (b - m, b), (c, c + m))


def plan_core_attention(
    docs_per_rank: Sequence[Sequence[int]],
    *,
    q_bytes: float,
    kv_bytes: float,
    tolerance: float = 0.1,
    tile: int = 1,
) -> list[list[CAShard]]:
    """Share the causal attention of packed documents out over as many servers as there are ranks.

    Servers with less than the mean, the emptiest first, take work until they lack at most tolerance * mean: of all
    items on servers with more than the mean the one with the fewest bytes per pair moved, whole if it fits, else its m
    inner head rows and m inner tail rows, which cost m (L + 1) in a document of even length L. Then, while a server has
    more than (1 + tolerance) times the mean, it hands work to the emptiest one in the same way, until that has as much.
    So no server keeps more than this, or more than the mean and a tile of row pairs of the longest document.

    Args:
        docs_per_rank: lengths of the documents that each rank holds, in order, >= 1 each.
        q_bytes: bytes of a row of queries (all heads).
        kv_bytes: bytes of a row of keys and values together.
        tolerance: of the balance, >= 0.
        tile: m is a multiple of this; 128 (one kernel tile) in production.

    Returns:
        For every server its shards, by document and first row. All rows of all documents are in just one shard.

    Raises:
        ValueError, TypeError: no ranks or no documents; a length, a tolerance, a tile or bytes out of range.

    Source: Efficient Long-context Language Model Training by Core Attention Disaggregation (2025). The last pass is not
    in the authors' planner, which leaves a server overfull where many others lack a little each; nor are odd lengths.

    >>> plan = plan_core_attention([[8], [2, 2]], q_bytes=1, kv_bytes=1)
    >>> [[(s.doc, s.q_start, s.q_end) for s in shards] for shards in plan]
    [[(0, 0, 3), (0, 5, 8)], [(0, 3, 5), (1, 0, 2), (2, 0, 2)]]
    >>> [sum(s.cost for s in shards) for shards in plan]  # 36 and 6 without a plan
    [27, 15]
    """
    servers = len(docs_per_rank)
    tile = integer("plan_core_attention", "tile", tile, 1)
    for name, value in (("q_bytes", q_bytes), ("kv_bytes", kv_bytes), ("tolerance", tolerance)):
        if not value >= 0:
            raise ValueError(f"plan_core_attention: {name} must be >= 0, got {value!r}")
    items: list[_Item] = []
    for home, lengths in enumerate(docs_per_rank):
        for length in lengths:
            n = integer("plan_core_attention", f"docs_per_rank[{home}]: a length", length, 1)
            items.append(_Item(len(items), n, home, home, (0, n // 2), (n // 2, n)))
    if not items:
        raise ValueError(f"plan_core_attention: docs_per_rank must hold a document, got {docs_per_rank!r}")
    load = [0] * servers
    for item in items:
        load[item.server] += item.cost
    mean = sum(load) / servers
    surplus = [x - mean for x in load]

    def move(donors: set[int], server: int, need: float, *, stuck: bool) -> float:
        """Move the cheapest item, or a part of it, to a server; the cost moved. Not stuck: skip what cannot be cut."""
        most = 0.0
        best, least = None, float("inf")
        for item in items:
            if item.server not in donors:
                continue
            movable = min(need, item.cost, surplus[item.server])
            if not stuck and movable < item.cost and not item.rows(movable, tile):
                continue
            price = (movable / (item.length + 1) * q_bytes + (item.length + 1) * kv_bytes) / movable
            if price < least:
                best, least, most = item, price, movable
        if best is None:
            return 0.0
        donor, whole = best.server, best.cost
        if most >= whole:
            best.server, moved = server, whole
        else:
            m = best.rows(most, tile)
            moved = m * best.pair
            if m:
                items.append(best.cut(m, server))
        surplus[donor] -= moved
        surplus[server] += moved
        return moved

    for lack, server in sorted((s, i) for i, s in enumerate(surplus) if s < 0):
        need = -lack
        while need > tolerance * mean:
            moved = move({i for i, s in enumerate(surplus) if s > 0}, server, need, stuck=True)
            need -= moved
            if not moved:
                break
    room = max(tolerance * mean, tile * max(item.pair for item in items))
    while max(surplus) > tolerance * mean:  # every move makes the sum of squares smaller, so this ends
        donor, server = surplus.index(max(surplus)), surplus.index(min(surplus))
        if not move({donor}, server, room - surplus[server], stuck=False):
            break

    plan: list[list[CAShard]] = [[] for _ in range(servers)]
    for item in items:
        for start, end in item.ranges:
            plan[item.server].append(CAShard(item.doc, start, end, end, item.home, item.server))
    for shards in plan:
        shards.sort(key=lambda s: (s.doc, s.kv_end))
    return plan


def run_plan(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | Sequence[int], *, engine: str = "auto"
) -> Tensor:
    """Causal attention of packed documents, computed as a plan says: every server by itself, here one after another.

    A server gets the query rows of its shards and the keys and values before them, and makes one call of attention
    with variable lengths; the results go back to where the rows stood.

    Args:
        plan: of `plan_core_attention`, or any that covers every row of the documents once.
        q: (total, H, D); k: (total, Hkv, D); v: (total, Hkv, Dv): the documents one after another, H a multiple of Hkv.
        cu_seqlens: [0, n1, n1 + n2, ..., total].
        engine: as in `foveate.attention`.

    Returns:
        (total, H, Dv), with gradients of q, k and v.

    Raises:
        ValueError: the plan and the documents do not fit.

    >>> q = k = v = torch.randn(12, 2, 16)
    >>> plan = plan_core_attention([[8], [2, 2]], q_bytes=1, kv_bytes=1)
    >>> out = run_plan(plan, q, k, v, [0, 8, 10, 12])
    >>> whole = attention(*(x.transpose(0, 1)[None, :, :8] for x in (q, k, v)), is_causal=True)
    >>> torch.allclose(out[:8], whole[0].transpose(0, 1), atol=1e-6)
    True
    """
    cu = [int(c) for c in cu_seqlens]
    check_plan(plan, [b - a for a, b in pairwise(cu)])
    if any(x.ndim != 3 or len(x) != cu[-1] for x in (q, k, v)):
        raise ValueError(
            f"run_plan: q, k and v must be ({cu[-1]}, heads, width) for these cu_seqlens; got "
            f"{', '.join(str(tuple(x.shape)) for x in (q, k, v))}"
        )
    rows, parts = [], []
    for shards in filter(None, plan):
        mine = [torch.arange(cu[s.doc] + s.q_start, cu[s.doc] + s.q_end) for s in shards]
        keys = torch.cat([torch.arange(cu[s.doc], cu[s.doc] + s.kv_end) for s in shards]).to(q.device)
        rows.append(torch.cat(mine).to(q.device))
        parts.append(serve(shards, q[rows[-1]], k[keys], v[keys], engine=engine))
    order = torch.cat(rows).argsort()  # where every row is among the results
    return torch.cat(parts)[order]


def serve(shards: Sequence[CAShard], q: Tensor, k: Tensor, v: Tensor, *, engine: str = "auto") -> Tensor:
    """What one server computes: q (rows, H, D) of its shards in order, k, v (keys, Hkv, D) -> (rows, H, Dv)."""
    cu_q, cu_k = [0], [0]
    for s in shards:
        cu_q.append(cu_q[-1] + s.q_end - s.q_start)
        cu_k.append(cu_k[-1] + s.kv_end)
    out = attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),  # (1, heads, rows, width)
        is_causal=True,
        cu_seqlens=(cu_q, cu_k),
        engine=engine,
    )
    assert isinstance(out, Tensor)
    return out[0].transpose(0, 1)


def check_plan(plan: Plan, lengths: Sequence[int]) -> None:
    """ValueError unless the shards cover every row of documents of these lengths once, with the keys that they need."""
    found: list[list[CAShard]] = [[] for _ in lengths]
    for server, shards in enumerate(plan):
        for s in shards:
            if not 0 <= s.doc < len(lengths) or s.server != server or s.kv_end != s.q_end:
                raise ValueError(
                    f"plan: {s} of server {server}; accepted: documents 0 to {len(lengths) - 1}, the server's own "
                    "number, kv_end = q_end"
                )
            found[s.doc].append(s)
    for doc, (shards, length) in enumerate(zip(found, lengths, strict=True)):
        if list(_joined(shards)) != [(0, length)]:
            raise ValueError(
                f"plan: document {doc} of {length} rows is in shards "
                f"{sorted((s.q_start, s.q_end) for s in shards)}; accepted: every row once"
            )


def _joined(shards: Sequence[CAShard]) -> Iterator[tuple[int, int]]:
    """The ranges of rows of shards, those that touch joined; overlapping and empty ones stay apart."""
    ranges = sorted((s.q_start, s.q_end) for s in shards)
    start = 0
    for i, (_, end) in enumerate(ranges):
        if i + 1 == len(ranges) or ranges[i + 1][0] != end:
            yield ranges[start][0], end
            start = i + 1
