"""The attention function registered with transformers as "foveate", and what it knows about each module."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveate.cache import Geometry, RaggedStore
from foveate.core.attention import attention
from foveate.core.patterns import Pattern
from foveate.core.scores import SoftCap
from foveate.core.selectors.base import Selector
from foveate.hf.kwargs import Extras, document_ids, read, with_bias
from foveate.hf.plan import (
    Plan,
    dense_plan,
    mask_plan,
    pattern_plan,
    pattern_rows,
    selector_plan,
    split_additive,
)
from foveate.hf.recognise import Known, reach_of
from foveate.hf.rule import Rule, RuleMask
from foveate.hf.sealed import Sealed
from foveate.hf.sets import HeadSet, SameGroup

NAME = "foveate"  # no slash (read as a hub kernel), no "flash", no "paged|"
PHASES = ("prefill", "decode", "both")


@dataclass
class Tally:
    """What one attention module did since the policy was applied."""

    calls: int = 0
    restricted: int = 0
    tokens: int = 0
    area: float = 0.0
    rule_area: float = 0.0
    nbytes: int = 0

    def add(self, plan: Plan, query: Tensor, restricted: bool) -> None:
        batch, heads, n = query.shape[:3]
        self.calls += 1
        self.restricted += restricted
        self.tokens += batch * n
        self.area += plan.area * batch * heads
        self.rule_area += plan.rule_area * batch * heads
        self.nbytes = max(self.nbytes, plan.nbytes)


@dataclass(eq=False)
class Job:
    """One `apply()`: shared by the attention modules of one model."""

    policy: Pattern | Selector | None  # None = dense
    heads: frozenset[int] | None
    phase: str
    engine: str
    mix: Callable[[int, Tensor, Tensor], Tensor] | None = None
    """(layer number, unrestricted output, restricted output) -> output, where gates decide between them."""
    suspended: bool = False  # check() runs the same path with the dense policy and without counting

    def head_set(self, total: int) -> HeadSet | None:
        if self.heads is None:
            return None
        if max(self.heads) >= total:
            raise ValueError(
                f"heads must lie in [0, {total}), the query heads of this model; got {sorted(self.heads)}"
            )
        return HeadSet(total, self.heads)


@dataclass(eq=False)
class Site:
    """What is known about one attention module."""

    path: str
    layer: int
    kind: str  # "self" or "cross"
    selected: bool
    job: Job
    tally: Tally = field(default_factory=Tally)


SITES: weakref.WeakKeyDictionary[nn.Module, Site] = weakref.WeakKeyDictionary()
_PLAIN = Job(policy=None, heads=None, phase="both", engine="auto")


@torch.compiler.disable
def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one module: its model's own rule AND the policy applied to it.

    A module that no `apply()` knows (another model that shares the same config object, or a copy) runs its
    model's own rule, densely: a policy belongs to the model object that it was given.

    Args:
        query: (B, H, Q, D); key: (B, Hkv, K, D); value: (B, Hkv, K, Dv). Rotary embedding and cache are
            already done.
        attention_mask: a `RuleMask`, None, bool (B|1, H|1, Q, K) with True = may attend, or additive floats.

    Returns:
        (B, Q, H, Dv) contiguous, and None in place of attention weights.
    """
    site = SITES.get(module)
    job = _PLAIN if site is None else site.job
    owner = type(module).__name__ if site is None else f"{site.path} ({type(module).__name__})"
    extras = read(kwargs, owner)
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    rule, additive, ready = _mask(attention_mask, query, key, causal, owner)
    if extras.cu_q is not None:
        rule = _packed(rule, extras.cu_q, extras.cu_k, owner)

    sealed = key if isinstance(key, Sealed) else None
    policy = None
    if site is not None and site.selected and not job.suspended and site.kind == "self":
        decoding = query.shape[2] == 1 and (rule.q_offset > 0 if rule is not None else key.shape[2] > 1)
        if job.phase == "both" or job.phase == ("decode" if decoding else "prefill"):
            policy = job.policy
    heads = job.head_set(query.shape[1]) if policy is not None else None

    if sealed is not None:
        assert isinstance(value, Sealed)
        if rule is None or extras.bias is not None or additive is not None or extras.cu_q is not None:
            raise ValueError(
                f"{owner}: a foveate.hf.Cache needs the model's mask as a rule; position biases, ready-made 4-D masks "
                "and packed sequences are not supported with it"
            )
        key, value = sealed.fresh, value.fresh
        if sealed.layer.held.seen:
            out = _proceed(sealed, query, key, value, rule, policy, heads, scaling, extras, owner)
            return out.transpose(1, 2).contiguous(), None

    if ready is not None:
        plan = _ready_plan(site, attention_mask, ready, policy, heads, owner)
    elif rule is None:
        raise AssertionError("a mask is a rule or ready-made")
    elif policy is None:
        plan = dense_plan(rule)
    elif isinstance(policy, Pattern):
        plan = pattern_plan(rule, policy, heads)
    else:
        assert site is not None
        plan = selector_plan(rule, policy.at_layer(site.layer), heads, query, key, scaling)

    def run(plan: Plan) -> Tensor:
        out = attention(
            query,
            key[:, :, plan.start : plan.stop],
            value[:, :, plan.start : plan.stop],
            plan.who,
            score=with_bias(extras, plan.start, plan.stop, additive) or None,
            sinks=extras.sinks,
            scale=scaling,
            dropout_p=dropout,
            engine=job.engine,
        )
        assert isinstance(out, Tensor)
        return out

    out = run(plan)
    if job.mix is not None and policy is not None and rule is not None and site is not None:
        out = job.mix(site.layer, run(dense_plan(rule)), out)
    if sealed is not None:
        from foveate.hf.cache import settle

        assert rule is not None
        shape = _geometry(query, scaling, extras, rule)
        settle(module, sealed.layer, query, key, value, out, rule.padding, shape)
    if site is not None and not job.suspended:
        site.tally.add(plan, query, policy is not None)
    return out.transpose(1, 2).contiguous(), None


def _proceed(
    sealed: Sealed,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    policy: Pattern | Selector | None,
    heads: HeadSet | None,
    scaling: float | None,
    extras: Extras,
    owner: str,
) -> Tensor:
    """Attention of tokens that come after others: to what the layer's `foveate.hf.Cache` holds."""
    from foveate.hf.cache import gather_rows, proceed

    if isinstance(policy, Selector):
        raise ValueError(
            f"{owner}: a selector chooses among all keys, a foveate.hf.Cache has evicted some; apply the selector with "
            "phase='prefill' (and without chunked prefill)"
        )

    def allowed(store: RaggedStore, first: int, last: int) -> Tensor | None:
        rows = pattern_rows(rule, policy, heads, first, last)
        return None if rows is None else gather_rows(store, rows.to(query.device))

    shape = _geometry(query, scaling, extras, rule)
    return proceed(sealed.layer, query, key, value, rule.padding, shape, allowed)


def _geometry(query: Tensor, scaling: float | None, extras: Extras, rule: Rule) -> Geometry:
    softcap = next((s.cap for s in extras.scores if isinstance(s, SoftCap)), None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Geometry(scale, softcap, extras.sinks, reach_of(rule))


def _mask(
    mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, owner: str
) -> tuple[Rule | None, Tensor | None, Tensor | None]:
    """(rule, additive values, ready-made bool mask): either a rule or a ready-made mask."""
    n, m = query.shape[2], key.shape[2]
    if mask is None:
        return _no_mask(query.shape[0], n, m, causal, query.device), None, None
    if isinstance(mask, RuleMask):
        rule = mask.rule
        if (rule.q_len, rule.kv_len) != (n, m) or rule.batch not in (1, query.shape[0]):
            raise ValueError(
                f"{owner}: the model's mask rule is for batch {rule.batch}, {rule.q_len} queries and "
                f"{rule.kv_len} keys, but the layer has batch {query.shape[0]}, {n} queries and {m} keys. "
                "Caches with a different length per layer are not supported"
            )
        return rule, None, None
    if mask.ndim != 4 or mask.shape[2] not in (1, n) or mask.shape[3] < m:
        raise ValueError(
            f"{owner}: attention mask must have shape (batch, heads or 1, {n}, {m}), got {tuple(mask.shape)}"
        )
    mask = mask[..., :m].expand(-1, -1, n, -1)
    if mask.dtype == torch.bool:
        return None, None, mask
    if not mask.is_floating_point():
        raise ValueError(
            f"{owner}: attention mask must be bool (True = may attend) or float, got {mask.dtype}"
        )
    allowed, additive = split_additive(mask)
    return None, additive, allowed


def _no_mask(batch: int, n: int, m: int, causal: bool, device: torch.device) -> Rule:
    """No mask means, as for `sdpa`: causal from the first key when there are several queries, else
    everything."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    function: Callable[..., Any] = causal_mask_function if causal and n > 1 else bidirectional_mask_function
    offset = m - 1 if n == 1 else 0
    return Rule(batch, n, m, offset, 0, function, device=device)


def _packed(rule: Rule | None, cu_q: Tensor | None, cu_k: Tensor | None, owner: str) -> Rule:
    """The rule AND "same packed sequence", from cumulative lengths."""
    from transformers.masking_utils import and_masks

    if rule is None:
        raise ValueError(f"{owner}: cu_seq_lens together with a ready-made 4-D mask is not supported")
    assert cu_q is not None
    assert cu_k is not None
    if rule.batch != 1 or rule.q_offset or rule.kv_offset:
        raise ValueError(f"{owner}: cu_seq_lens needs batch size 1 and no cache, got batch {rule.batch}")
    q_ids, k_ids = document_ids(cu_q, rule.q_len), document_ids(cu_k, rule.kv_len)
    key = ("packed", tuple(cu_q.tolist()), tuple(cu_k.tolist()))
    if key not in rule.memo:
        rule.memo[key] = Rule(
            rule.batch,
            rule.q_len,
            rule.kv_len,
            0,
            0,
            and_masks(rule.function, Known(SameGroup(q_ids, k_ids))),
            rule.padding,
            rule.vmap,
            rule.device,
        )
    return rule.memo[key]


def _ready_plan(
    site: Site | None,
    given: Tensor | None,
    allowed: Tensor,
    policy: Pattern | Selector | None,
    heads: HeadSet | None,
    owner: str,
) -> Plan:
    """Plan of a ready-made mask; the last one is remembered, because all layers of a forward share it."""
    if isinstance(policy, Selector):
        raise ValueError(
            f"{owner}: a selector needs the model's mask as a rule; it received a ready-made 4-D mask"
        )
    if site is None or given is None:
        return mask_plan(allowed, policy, heads)
    job = site.job
    stamp = (weakref.ref(given), given._version, tuple(allowed.shape))
    held = _READY.get(job)
    if held is None or held[0] != stamp:
        held = _READY[job] = (stamp, {})
    key = (policy, heads)
    if key not in held[1]:
        held[1][key] = mask_plan(allowed, policy, heads)
    return held[1][key]


_READY: weakref.WeakKeyDictionary[Job, tuple[tuple, dict]] = weakref.WeakKeyDictionary()
