"""MoA: how far back each head looks, searched from what its attention entries are worth to the loss."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.core.patterns import Causal, Pattern, PerHead, Sinks, SlidingWindow
from foveate.core.patterns.base import integer

HELD = 1 << 23  # attention entries held at once by `attention_influence`
EPS = 1e-9  # least 1 - a that is divided by
LIMIT = 20_000  # partial plans that the exact search keeps
MOVES = 400  # options of a layer up to which two layers are changed at once


@dataclass(frozen=True)
class SpanRule:
    """How many of the latest tokens a head sees at length n, besides the first `sink` ones.

        span(n) = block * max(1, ceil((alpha + beta n) / block))      the query's own token included

    >>> SpanRule(128, 0.25).span(1000), SpanRule(-400, 0.5, block=1).span(1000)
    (384, 100)
    """

    alpha: float
    beta: float
    sink: int = 64
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"SpanRule: {name} must be a finite number, got {value!r}")
        object.__setattr__(self, "sink", integer("SpanRule", "sink", self.sink, 0))
        object.__setattr__(self, "block", integer("SpanRule", "block", self.block, 1))

    def span(self, n: int) -> int:
        """Latest tokens seen at length n."""
        wanted = self.alpha + self.beta * integer("span", "n", n, 1)
        return self.block * max(1, math.ceil(wanted / self.block - 1e-9))

    def kept(self, n: int) -> int:
        """Keys that a cache of n tokens keeps: sinks and span, at most n."""
        return min(n, self.sink + self.span(n))

    def density(self, n: int) -> float:
        """Pairs of `pattern(n)` over all causal pairs of n tokens. Query i sees min(i + 1, sink + span) keys."""
        w = self.kept(n)
        return (w * n - w * (w - 1) / 2) / (n * (n + 1) / 2)

    def pattern(self, n: int) -> Pattern:
        """Causal: the first `sink` keys and the `span(n)` latest ones."""
        return Causal() & (SlidingWindow(self.span(n)) | Sinks(self.sink))


def span_rules(
    profiled: Sequence[int], longest: int, *, step: int | None = None, sink: int = 64, block: int = 64
) -> tuple[SpanRule, ...]:
    """The candidates: alpha from -min to max of the profiled lengths in steps, beta in nine steps from 0 to 1.

    Rules are left out whose alpha + beta N exceeds N at a profiled or the longest length, or is not positive at the
    shortest.

    Args:
        profiled: lengths. longest: the longest one that the plan is for. step: of alpha, default the shortest
            length / 2 (the paper: 1024 for lengths from 2048 on).

    >>> rules = span_rules([256, 512], 1024)
    >>> len(rules), max(rule.span(1024) for rule in rules)
    (18, 1024)
    """
    lengths = sorted({integer("span_rules", "profiled", n, 1) for n in profiled})
    if not lengths:
        raise ValueError("span_rules: profiled is empty; accepted: at least one length")
    integer("span_rules", "longest", longest, lengths[-1])
    step = max(1, lengths[0] // 2) if step is None else integer("span_rules", "step", step, 1)
    made = []
    for alpha in range(-(lengths[0] // step) * step, lengths[-1] + 1, step):
        for beta in (i / 8 for i in range(9)):
            if alpha + beta * lengths[0] > 0 and all(alpha + beta * n <= n for n in (*lengths, longest)):
                made.append(SpanRule(alpha, beta, sink, block))
    return tuple(made)


@torch.no_grad()
def attention_influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    *,
    block: int = 64,
    scale: float | None = None,
    average: bool = True,
) -> Tensor:
    """What the loss would change if blocks of attention entries were masked, to first order.

    With a_i the softmax of row i, and g_ij = dL/da_ij = grad_out_i . v_j, masking entry j and renormalising the row
    changes the loss by

        E_ij = a_ij / (1 - a_ij) (sum_n a_in g_in - g_ij)          and by -a_ij g_ij where nothing else is seen,

    which is exact for a loss that is linear in the row. E is averaged over the samples of the batch, and |E| summed
    over blocks of queries and keys. Causal (the last query is aligned with the last key).

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D), v: (B, Hkv, M, Dv) as attention got them; grad_out: (B, H, N, Dv), the
            gradient of the loss with respect to its output. M >= N, H a multiple of Hkv.
        block: queries and keys of a block. scale: default D ** -0.5.
        average: over the batch, before the absolute value, as in the paper; else each sample by itself.

    Returns:
        float32 (1 or B, H, N / block, M / block), rounded up.

    Memory: rows of a few queries at a time; nothing N x M is held. Sums in float64.

    Source: MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (2024).

    >>> q, k, v, grad = (torch.randn(2, 4, 100, 16) for _ in range(4))
    >>> attention_influence(q, k, v, grad, block=32).shape
    torch.Size([1, 4, 4, 4])
    """
    _check_tensors(q, k, v, grad_out)
    block = integer("attention_influence", "block", block, 1)
    scale = float(q.shape[3] ** -0.5) if scale is None else float(scale)
    batch, heads, n, _ = q.shape
    kv_heads, m = k.shape[1], k.shape[2]
    nb, mb = -(-n // block), -(-m // block)
    made = torch.zeros(1 if average else batch, heads, nb, mb, dtype=torch.float64, device=q.device)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, grad = (t.to(wide) for t in (q, k, v, grad_out))
    rows = max(1, HELD // (batch * heads * m * block)) * block
    for first in range(0, n, rows):
        here = slice(first, min(first + rows, n))
        entries = _entries(q[:, :, here], k, v, grad[:, :, here], first + m - n, scale, kv_heads)
        entries = (entries.mean(0, keepdim=True) if average else entries).abs()  # (b, H, rows, M)
        padded = torch.nn.functional.pad(entries, (0, mb * block - m, 0, -entries.shape[2] % block))
        sums = padded.unflatten(3, (mb, block)).unflatten(2, (-1, block)).sum((3, 5))  # (b, H, blocks, mb)
        made[:, :, first // block : first // block + sums.shape[2]] = sums
    return made.float()


def _entries(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, first: int, scale: float, kv_heads: int
) -> Tensor:
    """E of rows whose first query sees keys 0 .. first, float64 (B, H, rows, M)."""

    def products(x: Tensor, y: Tensor) -> Tensor:  # the heads of a group share y
        grouped = x.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # (B, Hkv, G rows, D)
        return (grouped @ y.mT).unflatten(2, (-1, x.shape[2])).flatten(1, 2)  # (B, H, rows, M)

    places = torch.arange(k.shape[2], device=q.device)
    last = first + torch.arange(q.shape[2], device=q.device)[:, None]
    hidden = places > last  # (rows, M)
    a = products(q * scale, k).double().masked_fill(hidden, -math.inf).softmax(-1)
    g = products(grad, v).double().masked_fill(hidden, 0.0)
    mean = (a * g).sum(-1, keepdim=True)
    entries = a / (1 - a).clamp_min(EPS) * (mean - g)
    return torch.where(last > 0, entries, -a * g)  # the first row has nothing left to renormalise


def group_influence(influence: Tensor, kv_heads: int) -> Tensor:
    """The largest over the query heads of each key/value head: (.., H, nb, nb) -> (.., Hkv, nb, nb).

    Head h reads key/value head h // (H / Hkv).

    >>> group_influence(torch.arange(4.0).view(4, 1, 1), 2).flatten().tolist()
    [1.0, 3.0]
    """
    heads = influence.shape[-3]
    if integer("group_influence", "kv_heads", kv_heads, 1) > heads or heads % kv_heads:
        raise ValueError(f"group_influence: kv_heads must divide the {heads} heads, got {kv_heads}")
    return influence.unflatten(-3, (kv_heads, -1)).amax(-3)


def predicted_loss(influence: Tensor, rule: SpanRule, n: int, *, block: int = 64) -> Tensor:
    """Influence outside of a rule's pattern at n tokens: (.., nb, nb) of blocks of `block` -> (..), float64.

    Inside are the blocks on the diagonal and those that the pattern holds whole: of the sinks, and of the latest
    tokens of all of its queries.
    """
    place = torch.arange(influence.shape[-1], device=influence.device)
    back = place[:, None] - place
    outside = (back > 0) & ((back + 1) * block > rule.span(n)) & ((place + 1) * block > rule.sink)
    return (influence.double() * outside).sum((-2, -1))


@dataclass(frozen=True)
class MoAPlan:
    """A rule for each layer and key/value head.

    Args:
        rules: layers of heads of `SpanRule`, as many heads in each layer.

    >>> plan = MoAPlan(((SpanRule(64, 0.0), SpanRule(0, 1.0)),))
    >>> plan.spans(1000), round(plan.density(1000), 3), plan.kept(1000)
    ((((64, 64), (64, 1024)),), 0.62, ((128, 1000),))
    """

    rules: tuple[tuple[SpanRule, ...], ...]

    def __post_init__(self) -> None:
        rules = tuple(tuple(layer) for layer in self.rules)
        if not rules or not rules[0] or len({len(layer) for layer in rules}) > 1:
            raise ValueError(
                f"MoAPlan: rules must be layers of equally many heads, got {[len(layer) for layer in rules]}"
            )
        for rule in (rule for layer in rules for rule in layer):
            if not isinstance(rule, SpanRule):
                raise TypeError(f"MoAPlan: rules must be SpanRule, got {type(rule).__name__}")
        object.__setattr__(self, "rules", rules)

    @property
    def layers(self) -> int:
        return len(self.rules)

    @property
    def kv_heads(self) -> int:
        return len(self.rules[0])

    def spans(self, n: int) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(sinks, latest tokens) of each layer and key/value head at n tokens."""
        return tuple(tuple((rule.sink, rule.span(n)) for rule in layer) for layer in self.rules)

    def kept(self, n: int) -> tuple[tuple[int, ...], ...]:
        """Keys that each layer and key/value head keeps of n tokens."""
        return tuple(tuple(rule.kept(n) for rule in layer) for layer in self.rules)

    def density(self, n: int) -> float:
        """Pairs over all causal pairs at n tokens, mean over heads."""
        found = [rule.density(n) for layer in self.rules for rule in layer]
        return math.fsum(found) / len(found)

    def patterns(self, n: int, heads: int | None = None) -> tuple[Pattern, ...]:
        """One pattern per layer, for prompts of n tokens.

        Args:
            heads: query heads, a multiple of the key/value heads; default as many.
        """
        heads = self.kv_heads if heads is None else integer("patterns", "heads", heads, 1)
        if heads % self.kv_heads:
            raise ValueError(f"patterns: heads must be a multiple of {self.kv_heads}, got {heads}")
        groups = heads // self.kv_heads
        return tuple(
            PerHead(tuple(rule.pattern(n) for rule in layer for _ in range(groups))) for layer in self.rules
        )

    def save(self, path: str | Path) -> None:
        """Write JSON: alpha, beta, sink and block of each layer and head."""
        layers = [
            {name: [getattr(rule, name) for rule in layer] for name in SpanRule.__dataclass_fields__}
            for layer in self.rules
        ]
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"kind": "foveate.moa", "schema": 1, "layers": layers}, indent=1) + "\n")
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> MoAPlan:
        """Read what `save` wrote.

        Raises:
            ValueError: another kind of file, or fields that are missing.
        """
        try:
            found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            if (found["kind"], found["schema"]) != ("foveate.moa", 1):
                raise ValueError(f"kind {found['kind']!r}, schema {found['schema']!r}")
            names = list(SpanRule.__dataclass_fields__)
            return cls(
                tuple(
                    tuple(SpanRule(*row) for row in zip(*(layer[name] for name in names), strict=True))
                    for layer in found["layers"]
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no plan ({error}); accepted: what MoAPlan.save wrote") from error


# ---------------------------------------------------------------------------------------------------- the search
def search_spans(
    influence: Mapping[int, Tensor],
    lengths: Sequence[int],
    density: float = 0.5,
    *,
    rules: Sequence[SpanRule] | None = None,
    block: int = 64,
    max_rules_per_layer: int | None = 2,
    method: str = "lagrangian",
    least: float = 0.9,
) -> MoAPlan:
    """The plan of least predicted loss within a budget of pairs at every length.

        min over rules r of  sum over heads h, profiled lengths N of  Delta_hN(r_h) / Delta_N
        where, at every length N,  least * density <= mean over heads of density_N(r_h) <= density

    Delta_hN(r) is the influence outside of the pattern (`predicted_loss`), Delta_N all influence at that length.

    Within a layer the search is exact: for two rules, the heads that gain most from the wider one get it. Over layers,
    "lagrangian" prices the pairs of each length and then changes the rules of one or two layers while that helps;
    "exact" keeps every plan that no other one beats, and refuses where these are too many. The lower bound is met
    afterwards, by the changes that lose least: what lies inside anyway stays inside.

    Args:
        influence: profiled length -> (layers, key/value heads, nb, nb) of `attention_influence`, see
            `group_influence`.
        lengths: where the bounds hold besides the profiled lengths; the plan is extended to them by its rules.
        density: bound on the mean share of causal pairs, in (0, 1].
        rules: candidates, default `span_rules`. block: of the influence.
        max_rules_per_layer: 1 or 2 different rules in a layer, or None for one per head.
        method: "lagrangian" or "exact". least: share of the bound that must be used; 0 for none.

    Raises:
        ValueError: bounds that no plan meets, or arguments out of range.

    Source: MoA (2024), which solves this with a commercial integer programme for a Pareto set over the lengths; here
    the lengths' losses, each a share of its total, are added up.

    >>> far = torch.zeros(1, 2, 8, 8)
    >>> far[0, 0, :, 2] = 1.0  # one head looks back, the other does not
    >>> far[0, 1] += torch.eye(8)
    >>> plan = search_spans({512: far}, [1024], 0.7, least=0.0)
    >>> [rule.span(1024) for rule in plan.rules[0]]
    [384, 128]
    """
    profiled, shape = _check_influence(influence, integer("search_spans", "block", block, 1))
    lengths = sorted({*profiled, *(integer("search_spans", "lengths", n, 1) for n in lengths)})
    if isinstance(density, bool) or not 0 < density <= 1 or not 0 <= least <= 1:
        raise ValueError(
            f"search_spans: density must lie in (0, 1] and least in [0, 1]; got {density!r}, {least!r}"
        )
    if max_rules_per_layer not in (1, 2, None):
        raise ValueError(
            f"search_spans: max_rules_per_layer must be 1, 2 or None, got {max_rules_per_layer!r}"
        )
    if method not in ("lagrangian", "exact"):
        raise ValueError(f"search_spans: method must be lagrangian or exact, got {method!r}")
    candidates = tuple(span_rules(profiled, lengths[-1]) if rules is None else rules)
    if not candidates:
        raise ValueError("search_spans: rules is empty; accepted: at least one SpanRule")
    loss = np.zeros((*shape, len(candidates)))  # (layers, heads, rules)
    for n in profiled:
        whole = float(influence[n].double().tril().sum()) or 1.0
        found = [predicted_loss(influence[n], rule, n, block=block) / whole for rule in candidates]
        loss += torch.stack(found, -1).cpu().numpy()
    cost = np.array([[rule.density(n) for n in lengths] for rule in candidates])  # (rules, lengths)
    layers, heads = shape
    if max_rules_per_layer is None:  # every head chooses for itself
        items = [_options(row[None], cost, 1) for row in loss.reshape(layers * heads, -1)]
    else:
        items = [_options(layer, cost, max_rules_per_layer) for layer in loss]
    budget = np.full(len(lengths), density * layers * heads) * (1 + 1e-12)
    fronts = [item.front() for item in items]
    if any((sum(item.cost.min(0) for item in items) > budget).tolist()):
        raise ValueError(
            f"search_spans: the narrowest rules exceed density {density} at some of {lengths}; accepted: a larger "
            "bound, or narrower rules"
        )
    picked = (_exact if method == "exact" else _lagrangian)(fronts, budget)
    chosen = _fill(
        items, [front.at[i] for front, i in zip(fronts, picked, strict=True)], least * budget, budget
    )
    if chosen is None:
        raise ValueError(
            f"search_spans: no plan found between {least * density:.4g} and {density:.4g} at all of {lengths}; "
            "accepted: a smaller least, or more rules"
        )
    which = np.concatenate([item.which[i] for item, i in zip(items, chosen, strict=True)]).reshape(shape)
    return MoAPlan(tuple(tuple(candidates[r] for r in row) for row in which))


@dataclass(frozen=True)
class _Options:
    """Ways to give rules to the heads of a layer: cost (n, lengths) summed over heads, loss (n,), which (n, heads)."""

    cost: np.ndarray
    loss: np.ndarray
    which: np.ndarray
    at: np.ndarray  # numbers of these options in the list that they were taken from

    def front(self) -> _Options:
        """Those that no other one beats in loss and in cost at every length."""
        keep = _undominated(self.cost, self.loss)
        return _Options(self.cost[keep], self.loss[keep], self.which[keep], keep)


def _options(loss: np.ndarray, cost: np.ndarray, most: int) -> _Options:
    """All options of one layer that are best for their rules and counts; loss (heads, rules), cost (rules, lengths)."""
    heads, rules = loss.shape
    whichs = [np.repeat(np.arange(rules)[:, None], heads, 1)]
    if most == 2 and heads > 1:
        one, two = np.triu_indices(rules, 1)
        gain = loss[:, one] - loss[:, two]  # (heads, pairs): what a head gains from the second rule
        rank = np.argsort(np.argsort(-gain, axis=0, kind="stable"), axis=0)
        for count in range(1, heads):  # the cost is that of the counts, whichever heads they are
            whichs.append(np.where(rank < count, two, one).T)
    which = np.concatenate(whichs)
    total = loss[np.arange(heads), which].sum(1)
    return _Options(cost[which].sum(1), total, which, np.arange(len(which)))


def _undominated(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Numbers of the rows that no other row beats; of equal ones the first."""
    order = np.lexsort((*cost.T, loss))
    kept = np.zeros(0, np.int64)
    for first in range(0, len(order), 512):
        chunk = order[first : first + 512]
        beaten = (cost[kept][:, None] <= cost[chunk][None]).all(2).any(0)  # kept ones have no more loss
        chunk = chunk[~beaten]
        inside = (cost[chunk][:, None] <= cost[chunk][None]).all(2) & np.triu(
            np.ones((len(chunk),) * 2, bool), 1
        )
        kept = np.concatenate([kept, chunk[~inside.any(0)]])
    return kept


def _exact(fronts: list[_Options], budget: np.ndarray) -> list[int]:
    cost, loss, trail = np.zeros((1, len(budget))), np.zeros(1), np.zeros((1, 0), np.int64)
    for front in fronts:
        states, options = len(loss), len(front.loss)
        if states * options > LIMIT * 200:
            raise ValueError(
                f"search_spans: {states} partial plans of {options} options each; method exact is for small "
                "problems, accepted: method lagrangian"
            )
        cost = (cost[:, None] + front.cost).reshape(-1, len(budget))
        loss = (loss[:, None] + front.loss).reshape(-1)
        fits = np.flatnonzero((cost <= budget).all(1))
        if not len(fits):
            raise ValueError(
                "search_spans: no plan is within the bound at every length; accepted: a larger bound"
            )
        keep = fits[_undominated(cost[fits], loss[fits])]
        if len(keep) > LIMIT:
            raise ValueError(
                f"search_spans: more than {LIMIT} partial plans; method exact is for small problems, accepted: "
                "method lagrangian"
            )
        trail = np.column_stack([trail[keep // options], keep % options])
        cost, loss = cost[keep], loss[keep]
    return trail[loss.argmin()].tolist()


def _lagrangian(fronts: list[_Options], budget: np.ndarray) -> list[int]:
    """Prices of the lengths by subgradient steps, then changes of one and two layers."""
    cheapest = [int((front.cost / budget).max(1).argmin()) for front in fronts]
    spread = max(max(float(np.ptp(front.loss)) for front in fronts), 1e-30)
    price = np.zeros(len(budget))
    best, best_loss = cheapest, math.inf

    def total(picked: list[int]) -> tuple[np.ndarray, float]:
        rows = list(zip(fronts, picked, strict=True))
        return np.sum([f.cost[i] for f, i in rows], 0), math.fsum(f.loss[i] for f, i in rows)

    for step in range(300):
        picked = [int((f.loss + (f.cost / budget) @ price).argmin()) for f in fronts]
        cost, loss = total(picked)
        if (cost <= budget).all() and loss < best_loss:
            best, best_loss = picked, loss
        rate = spread * len(fronts) * 4 / (1 + step) ** 0.7
        price = np.maximum(0.0, price + rate * (cost / budget - 1))
    if (total(best)[0] > budget).any():
        raise ValueError(
            "search_spans: found no plan within the bound at every length; accepted: a larger bound"
        )
    return _improved(fronts, budget, best)


def _improved(fronts: list[_Options], budget: np.ndarray, picked: list[int]) -> list[int]:
    picked = list(picked)
    spent = np.sum([f.cost[i] for f, i in zip(fronts, picked, strict=True)], 0)
    while True:
        gain, change = 1e-15, {}
        for a, front in enumerate(fronts):
            room = budget - spent + front.cost[picked[a]]
            loss = np.where((front.cost <= room).all(1), front.loss, math.inf)
            if front.loss[picked[a]] - loss.min() > gain:
                gain, change = front.loss[picked[a]] - loss.min(), {a: int(loss.argmin())}
            if len(front.loss) > MOVES:
                continue
            for b in range(a):
                other = fronts[b]
                if len(other.loss) > MOVES:
                    continue
                fits = (front.cost[:, None] + other.cost <= room + other.cost[picked[b]]).all(2)
                pair = np.where(fits, front.loss[:, None] + other.loss, math.inf)
                now = front.loss[picked[a]] + other.loss[picked[b]]
                if now - pair.min() > gain:
                    i, j = divmod(int(pair.argmin()), len(other.loss))
                    gain, change = now - pair.min(), {a: i, b: j}
        if not change:
            return picked
        for layer, option in change.items():
            spent = spent + fronts[layer].cost[option] - fronts[layer].cost[picked[layer]]
            picked[layer] = option


def _fill(items: list[_Options], picked: list[int], low: np.ndarray, high: np.ndarray) -> list[int] | None:
    """Change options until every length has its least cost: of the changes that lose least, the largest step."""
    picked = [int(i) for i in picked]
    while True:
        spent = np.sum([item.cost[i] for item, i in zip(items, picked, strict=True)], 0)
        short = np.maximum(low - spent, 0)
        if not short.any():
            return picked
        best: tuple[float, float, int, int] | None = None
        for number, (item, now) in enumerate(zip(items, picked, strict=True)):
            cost = spent - item.cost[now] + item.cost
            nearer = short.sum() - np.maximum(low - cost, 0).sum(1)
            ok = np.flatnonzero((cost <= high).all(1) & (nearer > 1e-12))
            if len(ok):
                i = ok[np.lexsort((-nearer[ok], item.loss[ok]))[0]]
                found = (float(item.loss[i] - item.loss[now]), -float(nearer[i]), number, int(i))
                best = found if best is None or found < best else best
        if best is None:
            return None
        picked[best[2]] = best[3]


# ---------------------------------------------------------------------------------------------------- refusals
def _check_tensors(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v), ("grad_out", grad)):
        if not isinstance(t, Tensor) or t.ndim != 4:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), got {got}")
    want = (*q.shape[:3], v.shape[3])
    if (
        k.shape[:3] != v.shape[:3]
        or k.shape[0] != q.shape[0]
        or k.shape[3] != q.shape[3]
        or q.shape[1] % k.shape[1]
        or k.shape[2] < q.shape[2]
        or tuple(grad.shape) != want
    ):
        raise ValueError(
            "q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) and grad_out (B, H, N, Dv) must fit each other, with "
            f"H a multiple of Hkv and M >= N; got {', '.join(str(tuple(t.shape)) for t in (q, k, v, grad))}"
        )


def _check_influence(influence: Mapping[int, Tensor], block: int) -> tuple[list[int], tuple[int, int]]:
    if not influence:
        raise ValueError("search_spans: influence is empty; accepted: length -> (layers, heads, nb, nb)")
    profiled = sorted(integer("search_spans", "influence", n, 1) for n in influence)
    layers, heads = (*influence[profiled[0]].shape, 0, 0)[:2]
    for n in profiled:
        nb = -(-n // block)
        if tuple(influence[n].shape) != (layers, heads, nb, nb) or 0 in (layers, heads):
            raise ValueError(
                f"search_spans: influence at length {n} must be ({layers}, {heads}, {nb}, {nb}), layers, heads and "
                f"blocks of {block}; got {tuple(influence[n].shape)}"
            )
    return profiled, (layers, heads)
