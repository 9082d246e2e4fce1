"""What one attention call executes: the keys it uses and the pairs among them. Made once per forward and
rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from foveate.core.layout import TILE, BlockLayout, tail_word
from foveate.core.patterns import And, Causal, Dilated, Extent, Full, Not, Or, Pattern, SlidingWindow, Strided
from foveate.core.selectors.base import Selector
from foveate.hf.recognise import Window, is_causal, left_pads, pattern_of, window_of
from foveate.hf.rule import Rule
from foveate.hf.sets import HeadSet, Moved, PerRow, Placed


@dataclass(frozen=True)
class Plan:
    """Keys [start, stop) and who sees whom among them (`foveate.attention`'s pattern argument).

    `area` and `rule_area` are allowed pairs per batch row and head, as executed and by the model's own rule.
    """

    start: int
    stop: int
    who: Pattern | BlockLayout | None
    area: float
    rule_area: float
    nbytes: int = 0


@dataclass(frozen=True)
class View:
    """A rule after recognition: geometry, pattern and padding, shared by all layers of a forward."""

    window: Window
    base: Pattern | None
    pads: tuple[int, ...]

    @property
    def moved(self) -> bool:
        return self.window.kv_offset > 0 or any(self.pads)


def view_of(rule: Rule) -> View:
    view = rule.memo.get("view")
    if view is None:
        window = window_of(rule)
        view = rule.memo["view"] = View(window, pattern_of(rule, window), left_pads(rule))
    return view


def dense_plan(rule: Rule) -> Plan:
    """The model's own rule, nothing else."""
    plan = rule.memo.get("dense")
    if plan is None:
        view = view_of(rule)
        plan = rule.memo["dense"] = _plan(view.base, view.window, None)
    return plan


def own_area(rule: Rule) -> float:
    """Pairs that the model's own rule allows, per batch row and head."""
    view = view_of(rule)
    if "dense" in rule.memo or view.base is None or view.window.q_len > 1:
        return dense_plan(rule).area
    if "area" not in rule.memo:
        rows = _rows(view.base, view.window.k_len)
        rule.memo["area"] = float(rows.sum()) / (rows.shape[0] * rows.shape[1])
    return rule.memo["area"]


def pattern_plan(rule: Rule, policy: Pattern, heads: HeadSet | None) -> Plan:
    """The model's own rule AND `policy` (on the heads outside `heads`' complement, the rule alone)."""
    key = (policy, heads)
    plan = rule.memo.get(key)
    if plan is None:
        view = view_of(rule)
        extra = place(policy, view)
        if heads is not None:
            extra = extra | ~heads
        whole = extra if view.base is None else view.base & extra
        plan = rule.memo[key] = _plan(whole, view.window, own_area(rule))
    return plan


def selector_plan(
    rule: Rule, policy: Selector, heads: HeadSet | None, q: Tensor, k: Tensor, scale: float | None
) -> Plan:
    """The model's own rule AND what `policy` selects from this layer's queries and keys."""
    view = view_of(rule)
    window = view.window
    causal = is_causal(rule.function)
    k = k[:, :, : window.k_len]
    if any(view.pads):
        chosen = _select_per_row(view, policy, q, k, scale, causal)
    else:
        chosen = policy.layout(q, k, scale=scale, is_causal=causal)
    if heads is not None:
        chosen = chosen | (~heads).layout(window.q_len, window.k_len)
    if view.base is not None:
        chosen = chosen & view.base.layout(window.q_len, window.k_len)
    return Plan(0, window.k_len, chosen, mean_area(chosen), own_area(rule), chosen.nbytes)


def _select_per_row(
    view: View, policy: Selector, q: Tensor, k: Tensor, scale: float | None, causal: bool
) -> BlockLayout:
    """Select on the real tokens of each row: padding must not attract or repel a selector."""
    parts = []
    n, m = view.window.q_len, view.window.k_len
    for b in range(q.shape[0]):
        k_skip = max(0, view.pads[b] - view.window.kv_offset)
        q_skip = min(max(0, view.pads[b] - view.window.q_offset), n - 1)
        k_skip = min(k_skip, m - 1)
        one = policy.layout(q[b : b + 1, :, q_skip:], k[b : b + 1, :, k_skip:], scale=scale, is_causal=causal)
        parts.append(Moved(Placed(one), q_skip, k_skip, Extent(n - q_skip, m - k_skip)))
    return PerRow(tuple(parts)).layout(n, m)


def place(policy: Pattern, view: View) -> Pattern:
    """`policy` with its positions counted from each row's first real token."""
    window = view.window
    if not window.aligned:
        raise ValueError(
            f"a policy needs the last query ({window.q_offset + window.q_len - 1}) at the last key "
            f"({window.kv_offset + window.k_len - 1}); this layer attends to later keys. "
            "Use layers= to leave it out"
        )
    if not view.moved or relative(policy):
        return policy
    rows = tuple(_from_first_token(policy, window, pad, b) for b, pad in enumerate(view.pads))
    return rows[0] if len(set(rows)) == 1 else PerRow(rows)


def _from_first_token(policy: Pattern, window: Window, pad: int, b: int) -> Pattern:
    """`policy` for a row with `pad` padding tokens in front. Parts that depend on distances only stay as they
    are (their tiles have closed forms); they may allow padding keys, which the model's own rule forbids."""
    if relative(policy):
        return policy
    if isinstance(policy, (And, Or)):
        return type(policy)(tuple(_from_first_token(p, window, pad, b) for p in policy.parts))
    if isinstance(policy, Not):
        return ~_from_first_token(policy.part, window, pad, b)
    q_shift = min(max(0, pad - window.q_offset), window.q_len - 1)
    seen = max(window.q_offset + window.q_len - pad, 1)
    inner = Extent(window.q_len - q_shift, seen)
    return Moved(policy, q_shift, pad - window.kv_offset, inner, b if policy.batch > 1 else None)


def relative(pattern: Pattern) -> bool:
    """Depends on distances only, so the origin does not matter."""
    if isinstance(pattern, (And, Or)):
        return all(relative(p) for p in pattern.parts)
    if isinstance(pattern, Not):
        return relative(pattern.part)
    return isinstance(pattern, (Causal, Dilated, Full, SlidingWindow, Strided))


def pattern_rows(
    rule: Rule, policy: Pattern | None, heads: HeadSet | None, first: int, last: int
) -> Tensor | None:
    """Bool (B|1, H|1, last - first, K) over the keys of a rule: what the queries [first, last) of this call may see by
    the model's own rule AND ``policy``; None = everything (one causal query, say)."""
    key = ("rows", policy, heads, first, last)
    if key in rule.memo:
        return rule.memo[key]
    view = view_of(rule)
    # a store holds no padding, so the rule's own need not be looked at
    whole = view.base if rule.padding is None else pattern_of(replace(rule, padding=None), view.window)
    if policy is not None:
        extra = place(policy, view)
        if heads is not None:
            extra = extra | ~heads
        whole = extra if whole is None else whole & extra
    rows = None
    if whole is not None:
        n, m = view.window.q_len, view.window.k_len
        ext = Extent(n, m)
        whole.check(ext)
        q, k = np.arange(first, last)[:, None], np.arange(m)
        seen = np.empty((whole.batch, whole.heads, last - first, m), bool)
        for b in range(whole.batch):
            for h in range(whole.heads):
                seen[b, h] = np.broadcast_to(whole.at(b, h).contains(ext, b, h, q, k), (last - first, m))
        rows = None if seen.all() else torch.from_numpy(seen)
    rule.memo[key] = rows
    return rows


def mean_area(layout: BlockLayout) -> float:
    """Allowed pairs per batch row and head."""
    return layout.area / (layout.batch * layout.heads)


def _plan(pattern: Pattern | None, window: Window, rule_area: float | None) -> Plan:
    n, m = window.q_len, window.k_len
    if pattern is None or isinstance(pattern, Full):
        return Plan(0, m, None, n * m, n * m if rule_area is None else rule_area)
    if n == 1:
        return _row_plan(pattern, m, rule_area)
    if isinstance(pattern, Causal):
        first = m - n + 1  # keys of query 0; rises by one per query, never below 0
        area = sum_range(max(first, 0), m)
        return Plan(0, m, pattern, area, area if rule_area is None else rule_area)
    layout = pattern.layout(n, m)
    area = mean_area(layout)
    return Plan(0, m, layout, area, area if rule_area is None else rule_area, layout.nbytes)


def sum_range(first: int, last: int) -> int:
    """first + (first + 1) + ... + last"""
    return (last * (last + 1) - first * (first - 1)) // 2


def _rows(pattern: Pattern, m: int) -> np.ndarray:
    """Bool (batch, heads, M): the keys that a single query sees."""
    ext = Extent(1, m)
    pattern.check(ext)
    q, k = np.zeros(1, np.int64), np.arange(m)
    rows = np.empty((pattern.batch, pattern.heads, m), bool)
    known: dict[tuple[Pattern, int, int], np.ndarray] = {}
    for b in range(pattern.batch):
        for h in range(pattern.heads):
            one = pattern.at(b, h)
            key = (one, b if one.batch > 1 else 0, h if one.heads > 1 else 0)
            if key not in known:
                known[key] = np.broadcast_to(one.contains(ext, key[1], key[2], q, k), m)
            rows[b, h] = known[key]
    return rows


def _row_plan(pattern: Pattern, m: int, rule_area: float | None) -> Plan:
    """One query (decoding): evaluate the row; a single run of keys becomes a slice that needs no layout."""
    rows = _rows(pattern, m)
    area = float(rows.sum()) / (rows.shape[0] * rows.shape[1])
    own = area if rule_area is None else rule_area
    if rows.shape[:2] == (1, 1):
        seen = np.flatnonzero(rows[0, 0])
        if len(seen) and len(seen) == seen[-1] - seen[0] + 1:
            return Plan(int(seen[0]), int(seen[-1]) + 1, None, area, own)
    layout = row_layout(rows)
    return Plan(0, m, layout, area, own, layout.nbytes)


def row_layout(rows: np.ndarray) -> BlockLayout:
    """The canonical layout of bool (B, H, M): one query per batch row and head. Written out because
    generation needs one per token."""
    batch, heads, m = rows.shape
    padded = np.zeros((batch * heads, -(-m // TILE) * TILE), bool)
    padded[:, :m] = rows.reshape(batch * heads, m)
    words = np.packbits(padded.reshape(-1), bitorder="little").view("<i8").reshape(batch * heads, -1)
    every = np.full(words.shape[1], -1, np.int64)
    every[-1] = tail_word(m).astype(np.int64)
    listed = words != 0
    row_ptr = np.zeros(batch * heads + 1, np.int64)
    np.cumsum(listed.sum(axis=1), out=row_ptr[1:])
    tile = np.nonzero(listed)[1]
    held = words[listed]
    partial = held != every[tile]
    distinct, number = np.unique(held[partial], return_inverse=True)
    ids = np.zeros(len(held), np.int32)
    ids[partial] = number + 1
    dictionary = np.zeros((len(distinct), TILE), np.int64)
    dictionary[:, 0] = distinct
    return BlockLayout(
        1,
        m,
        torch.from_numpy(row_ptr),
        torch.from_numpy(tile.astype(np.int32)),
        torch.from_numpy(ids),
        torch.from_numpy(dictionary),
        batch,
        heads,
        checked=True,
    )


def mask_plan(allowed: Tensor, policy: Pattern | None, heads: HeadSet | None) -> Plan:
    """A ready-made mask, bool (B|1, H|1, Q, K), AND a policy. The last query is taken to sit at the last
    key."""
    n, m = allowed.shape[2], allowed.shape[3]
    layout = BlockLayout.from_mask(allowed)
    own = mean_area(layout)
    if policy is not None:
        extra = policy if heads is None else policy | ~heads
        layout = layout & extra.layout(n, m)
    return Plan(0, m, layout, mean_area(layout), own, layout.nbytes)


def split_additive(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Float mask -> (allowed, finite values to add or None). Values below half the smallest float mean
    "never"."""
    allowed = mask > torch.finfo(mask.dtype).min / 2
    rest = torch.where(allowed, mask, torch.zeros((), dtype=mask.dtype, device=mask.device))
    return allowed, rest if bool((rest != 0).any()) else None
