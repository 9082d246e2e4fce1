"""How wrong an engine may be: eager's error in the same dtype plus a rounding budget from the reduction sizes.

Let u = 2^-24 (float32, in which engines accumulate; 2^-53 for float64), u_io the unit roundoff of the tensors' dtype,
A_ij = scale sum_d |q_id k_jd|, s the exact changed logits, p the exact weights, T = ceil(M / 64) tiles. A sum of n
rounded terms is off by about lambda sqrt(n) u times the sum of magnitudes (roundings are close to independent; Higham
and Mary 2019); lambda = 2 is beyond three standard deviations. Then, to first order:

    logit        |ds_ij|  <= e_ij = lambda sqrt(D + 4) u (a_ij + |s_ij|), where a starts as A and follows the scores: a
                 temperature t makes it |t| a, a soft-cap max(slope a, |s after|); before a further score a sum with a
                 bias is at least its own size
    exponential  relative error of exp(s - max) <= e + x, where x = 2^-20 is what vectorised exponentials guarantee
    running max  every tile may rescale what was summed so far by another exponential: sqrt(T) (x + u) in all
    so           r_i = max_j e_ij + (1 + sqrt(T)) (x + u), the relative error of a weight before it is normalised
    denominator  r_i + lambda sqrt(M) u
    p v          lambda sqrt(M) u sum_j p_ij |v_jd|, and where weights are rounded to the dtype before the product
                 lambda u_io sqrt(sum_j p_ij^2 v_jd^2), plus 2^-25 sqrt(M) max|v| where float16 weights underflow
    output       u_io |out_id|

    budget_id = (2 r_i + 2 lambda sqrt(M) u) sum_j p_ij |v_jd|
                + lambda u_io sqrt(sum_j p_ij^2 v_jd^2) [+ underflow] + u_io |out_id|
                + f (1 + sum_j |v_jd|), where f = 2^-125 is what flushing small numbers to 0 costs, j seen
    budget of lse_i = l_i + 2 u |lse_i| with l_i = r_i + lambda sqrt(M) u

The weights of the other normalisers are off by rho_ij = e p (1 - p) + (x + 2 u) p for a sigmoid and e + 2 u p above
-e for a ReLU, and 2 r_i p_ij gives way to rho_ij. With dropout p_ij stands for c_ij p_ij, c = keep / (1 - dropout_p).

Gradients. With g = dout, dp_ij = c_ij g_i . v_j, delta_i = sum_j p_ij dp_ij = g_i . out_i, and b = dlse, a softmax has

    dv_j = sum_i c_ij p_ij g_i     ds_ij = p_ij (dp_ij - delta_i + b_i)     dq_i = scale sum_j ds_ij k_j, dk_j likewise

An engine that stores nothing of size N x M makes p again from q, k and lse, and delta from g and the rounded out:

    weight       |dp_ij|  <= rho_ij = p_ij (exp(e_ij + x + u + l_i + 2 u |lse_i|) - 1), at most 1, at least f where
                 the pair is seen; the exponential counts, as extreme logits make e large
    product      E_ij = c_ij (lambda sqrt(Dv + 1) u sum_d |g_id v_jd|) + 2 u |dp_ij|
    delta        of order u:    R_i = sum_j rho_ij |dp_ij| + lambda sqrt(M) u sqrt(sum_d g_id^2 (sum_j c p |v_jd|)^2)
                                      + lambda sqrt(Dv + 1) u sum_d |g_id out_id|
                 of order u_io: R'_i = lambda u_io sqrt(sum_d g_id^2 out_id^2) since out was rounded, and where weights
                                       are rounded before the product + lambda u_io sqrt(sum_j p_ij^2 dp_ij^2)
    so           |dds_ij| <= F_ij = rho_ij |dp - delta + b| + (p + rho)_ij (E_ij + R_i + 3 u (|dp| + |delta| + |b|))
                 and besides, one and the same for a row, p_ij R'_i with an unknown sign
    sigmoid      ds = p (1 - p) dp:  F = |dp| (e p (1 - p) + 3 (x + 2 u) p) + (p + rho) E
    ReLU         ds = [s > 0] dp:    F = E + 2 u |dp| above -e; within e of the kink either side is right: + |dp|
    scores       back through a slope J, which is off by E_J: F <- F (J + E_J) + |ds| E_J + 2 u |J ds|. A temperature
                 has E_J = 0; a soft-cap J = 1 - t^2 with t = tanh, E_J = 2 |t| (J e / cap + |t| lambda sqrt(D + 4) u)

Errors of order u are summed by magnitude, as they may conspire (lse is one number for a row); those of order u_io are
roundings of stored numbers, each for itself, and are summed in squares, but for R'_i, which is the same for all keys:

    dq_id: |scale| (sum_j F_ij |k_jd| + R'_i |sum_j p_ij J_ij k_jd| + lambda sqrt(M) u sum_j |ds_ij k_jd|
                    + lambda u_io sqrt(sum_j ds_ij^2 k_jd^2)) + u_io |dq_id|
    dk_jd: |scale| (sum_i F_ij |q_id| + sqrt(sum_i (R'_i p_ij J_ij q_id)^2) + lambda sqrt(N G) u sum_i |ds_ij q_id|
                    + lambda u_io sqrt(sum_i ds_ij^2 q_id^2)) + u_io |dk_jd|, i over the queries of all G heads
    dv_jd: sum_i c rho_ij |g_id| + lambda sqrt(N G) u sum_i c p_ij |g_id| + lambda u_io sqrt(sum_i (c p g)^2)
                    + u_io |dv_jd|
    sinks: with weight p_i of the sink, sum_i p_i ((exp(2 l_i + 2 u |lse_i|) - 1) |b - delta| + R_i + R'_i
                    + 2 u (|b| + |delta|)) + lambda sqrt(B N) u sum |p_i (b - delta)| + 4 u_io |grad|
    tensors of scores, which add w ds over the pairs they touch: sum |w| (F + R' p J) + lambda sqrt(count) u sum |w ds|
                    + u_io |grad|; w = s for a temperature (+ |ds| e), the distance for slopes, 1 for the others

The terms lambda u_io sqrt(...) of products are left out where u_io = u: nothing is rounded there. Eager's error enters
as the largest one of the row. A row that sees nothing has budget 0: it must be 0 and -inf, and all its gradients 0.
"""

# the analysis reads scores and normalisers by class name, which a type checker cannot follow
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.catalogue.conformance.oracle import (
    addend,
    change,
    change_once,
    logits64,
    slope_of,
    unknown,
    weights,
)

LAMBDA = 2.0
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_within_budget(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    *,
    scores: tuple = (),
    sinks: Tensor | None = None,
    normalizer=None,
    scale: float | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    lse: Tensor | None = None,
    factor: float = 1.0,
) -> float:
    """Compare an engine's out (and lse) with the definition in float64.

    Args:
        allowed: bool, broadcastable to (B, H, N, M); None = every pair.
        normalizer: None = softmax.
        keep: bool (B, H, N, M), the weights that dropout keeps; None = all.
        factor: multiplies the rounding budget; for an engine that states a coarser arithmetic.

    Returns:
        The largest error as a share of what was allowed, for curious tests.

    Keys and values that are not finite must not reach rows for which they are masked; rows that may attend to one must
    come out as NaN or Inf somewhere.
    """
    dtype, (_, heads, n, dim), (_, kv_heads, m, _) = out.dtype, q.shape, k.shape
    assert out.shape == (*q.shape[:3], v.shape[3]), f"out has shape {tuple(out.shape)}"
    assert dtype == q.dtype, f"out is {dtype}, q is {q.dtype}"
    scale = dim**-0.5 if scale is None else scale
    q, k, v = (t.detach() for t in (q, k, v))
    scores, sinks = _detached(scores), None if sinks is None else sinks.detach()
    spoilt = ~(torch.isfinite(k).all(-1) & torch.isfinite(v).all(-1))  # (B, Hkv, M)
    k, v = (torch.where(spoilt.unsqueeze(-1), 0, t) for t in (k, v))
    every = torch.ones((), dtype=torch.bool) if allowed is None else allowed
    sees_spoilt = (every & spoilt.repeat_interleave(heads // kv_heads, 1).unsqueeze(2)).any(-1)  # (B, H, N)
    sees_spoilt = sees_spoilt.expand(q.shape[:3])
    if bool(sees_spoilt.any()):
        assert not torch.isfinite(out[sees_spoilt]).all(-1).any(), "a visible NaN or Inf was lost"

    it = _analyse(q, k, allowed, scores, sinks, normalizer, scale, factor)
    growth = _growth(keep, dropout_p)
    p = it.p * growth
    wide_v = v.double().repeat_interleave(heads // kv_heads, 1)
    gold = p @ wide_v
    eager_out, eager_lse = _eager(q, k, v, allowed, scores, sinks, normalizer, scale, growth)

    unit, unit_io = it.unit, UNIT[dtype]
    if it.softmax:
        budget = (2 * it.relative + 2 * it.summing).unsqueeze(-1) * (p @ wide_v.abs())
    else:
        budget = (it.rho * growth) @ wide_v.abs() + it.summing * (p @ wide_v.abs())
    tiny = it.floor * (1 + (it.seen * growth) @ wide_v.abs())
    budget = budget + unit_io * gold.abs() + torch.where(it.seen.any(-1, keepdim=True), tiny, 0)
    if unit_io > unit:
        budget = budget + LAMBDA * unit_io * (p.square() @ wide_v.square()).sqrt()
    nothing = torch.isneginf(it.lse)
    if dtype == torch.float16:
        budget = budget + 2.0**-25 * math.sqrt(m) * wide_v.abs().amax()
        budget = torch.where((it.p.sum(-1) == 0).unsqueeze(-1), 0, budget)
    allowance = factor * budget + (eager_out.double() - gold).abs().amax(-1, keepdim=True)
    share = _check("out", out.detach().double(), gold, allowance, sees_spoilt.unsqueeze(-1).expand_as(gold))
    if lse is not None:
        assert it.softmax, f"{normalizer} has no lse"
        assert lse.shape == (*q.shape[:2], n), f"lse has shape {tuple(lse.shape)}"
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), (
            f"lse is {lse.dtype}"
        )
        lse = lse.detach().double()
        blank = nothing & ~sees_spoilt
        assert torch.isneginf(lse[blank]).all(), "a row that sees nothing has lse other than -inf"
        slack = factor * it.lse_error + (eager_lse.double() - it.lse).abs()
        share = max(share, _check("lse", lse, it.lse, slack, sees_spoilt | nothing))
    return share


def assert_grads_within_budget(
    grads: dict,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    *,
    scores: tuple = (),
    sinks: Tensor | None = None,
    normalizer=None,
    scale: float | None = None,
    dout: Tensor,
    dlse: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    factor: float = 1.0,
) -> float:
    """Compare an engine's gradients with those of the definition in float64.

    Args:
        grads: "q", "k", "v", "sinks" or ("score", number) -> gradient; any of them.
        dout: gradient of out, (B, H, N, Dv), in any dtype (its values count).
        dlse: gradient of lse, (B, H, N); None = 0. Where lse is -inf it must not matter.
        keep, dropout_p, normalizer, factor: as in `assert_within_budget`.

    Returns:
        The largest error as a share of what was allowed.

    Keys and values that are not finite are accepted where no query sees them; their gradients must be 0.
    """
    dtype, (batch, heads, n, dim), (_, kv_heads, m, _) = q.dtype, q.shape, k.shape
    groups = heads // kv_heads
    scale = dim**-0.5 if scale is None else scale
    q, k, v, dout = (t.detach() for t in (q, k, v, dout))
    scores, sinks = _detached(scores), None if sinks is None else sinks.detach()
    given = {"q": q, "k": k, "v": v}
    given |= {} if sinks is None else {"sinks": sinks}
    given |= {("score", i): _tensor(s) for i, s in enumerate(scores) if _tensor(s) is not None}
    for name, grad in grads.items():
        if name not in given:
            raise ValueError(f"grads has {name!r}; the inputs are {list(given)}")
        assert isinstance(grad, Tensor), f"the gradient of {name} is {type(grad).__name__}"
        assert grad.shape == given[name].shape, f"the gradient of {name} has shape {tuple(grad.shape)}"
        assert grad.dtype == given[name].dtype, f"the gradient of {name} is {grad.dtype}"
    every = torch.ones((), dtype=torch.bool) if allowed is None else allowed
    every = every.expand(batch, heads, n, m)
    k, v = _unseen_to_zero(every, k, v)

    it = _analyse(q, k, allowed, scores, sinks, normalizer, scale, factor)
    growth = _growth(keep, dropout_p).expand(batch, heads, n, m)
    live = torch.isfinite(it.lse)  # rows that have an lse
    dlse = torch.zeros(batch, heads, n) if dlse is None else dlse.detach()
    dlse = torch.where(live, dlse.double(), 0)
    gold = _gradients(torch.float64, q, k, v, allowed, scores, sinks, normalizer, scale, growth, dout, dlse)
    eager = _gradients(dtype, q, k, v, allowed, scores, sinks, normalizer, scale, growth, dout, dlse)

    budgets = _budgets(it, q, k, v, scores, sinks, normalizer, scale, growth, dout, dlse, gold, factor)
    sees = it.seen.any(-1)  # (B, H, N)
    seen = it.seen.any(2).view(batch, kv_heads, groups, m).any(2)  # (B, Hkv, M)
    share = 0.0
    for name, grad in grads.items():
        want, grad = gold[name], grad.detach().double()
        if name in ("q", "k", "v"):
            what, zero = (
                ("query that sees nothing", ~sees) if name == "q" else ("key that nobody sees", ~seen)
            )
            assert not bool((grad[zero] != 0).any()), f"the gradient of {name} is not 0 at a {what}"
        error = (eager[name].double() - want).abs()
        error = torch.where(torch.isfinite(error), error, 0)
        slack = error.amax(-1, keepdim=True) if error.ndim else error
        label = f"the gradient of {name if isinstance(name, str) else f'score {name[1]}'}"
        share = max(
            share,
            _check(label, grad, want, budgets[name] + slack, torch.zeros_like(want, dtype=torch.bool)),
        )
    return share


# ---------------------------------------------------------------------------- the parts of a budget
@dataclass
class _Analysis:
    """Exact values in float64 and the errors that a forward pass in float32 may have made; see the top."""

    softmax: bool  # or softmax plus one
    unit: float  # u
    exponential: float  # x
    stages: list[Tensor]  # logits before each score and after the last, (B, H, N, M)
    stage_errors: list[Tensor]  # of each of these
    seen: Tensor  # bool (B, H, N, M)
    p: Tensor
    lse: Tensor  # (B, H, N)
    error: Tensor  # e, 0 where not seen
    relative: Tensor  # r, (B, H, N)
    summing: float  # lambda sqrt(M) u
    lse_error: Tensor
    rho: Tensor  # absolute error of a weight
    floor: float  # what flushing small numbers to 0 costs


def _analyse(q, k, allowed, scores, sinks, normalizer, scale, factor) -> _Analysis:
    dim, m = q.shape[3], k.shape[2]
    double = q.dtype == torch.float64
    unit, exponential = (2.0**-53, 2.0**-50) if double else (2.0**-24, 2.0**-20)
    kind = "Softmax" if normalizer is None else type(normalizer).__name__
    level = LAMBDA * math.sqrt(dim + 4) * unit
    s, size = logits64(q, k, scale), logits64(q.abs(), k.abs(), abs(scale))
    stages, errors = [s], [level * (size + s.abs())]
    for number, score in enumerate(scores):
        before, s = s, change_once(s, score)
        if type(score).__name__ == "SoftCap":
            least = (before.abs() - errors[-1]).clamp(min=0) / score.cap
            size = torch.maximum(size / torch.cosh(least.clamp(max=300)).square(), s.abs())
        elif type(score).__name__ == "Temperature":
            size = size * score.tensor.double().abs()[..., None]
        elif unknown(score):
            size = slope_of(score, before).abs() * size + s.abs() / math.sqrt(dim + 4)
        else:
            if type(score).__name__ == "ALiBi":  # the product slope * distance is rounded
                size = size + addend(score, *s.shape[1:], s.dtype).abs() / math.sqrt(dim + 4)
            if number + 1 < len(scores):
                size = torch.maximum(size, _finite(s).abs())
        stages.append(s)
        errors.append(level * (size + _finite(s).abs()))
    seen = ~torch.isneginf(s) if allowed is None else allowed & ~torch.isneginf(s)
    p, lse = weights(s, allowed, sinks, normalizer)
    error = torch.where(seen, errors[-1], 0)
    if kind == "Sigmoid":
        error = torch.where(seen, error + level * abs(normalizer.bias), 0)
    relative = error.amax(-1) + (1 + math.sqrt(-(-m // 64))) * (exponential + unit)
    summing = LAMBDA * math.sqrt(m) * unit
    lse_error = relative + summing + 2 * unit * _finite(lse).abs()
    if kind == "Sigmoid":
        rho = error * p * (1 - p) + (exponential + 2 * unit) * p
    elif kind == "ReLU":
        rho = torch.where(s > -factor * error, error + 2 * unit * p, 0)
    else:
        rho = p * torch.expm1((error + exponential + unit + lse_error.unsqueeze(-1)).clamp(max=50))
        rho = rho.clamp(max=1)
    floor = 2.0**-1020 if double else 2.0**-125
    rho = torch.where(seen, rho + (2.0**-25 if q.dtype == torch.float16 else floor), 0)
    return _Analysis(
        kind.startswith("Softmax"), unit, exponential, stages, errors, seen, p, lse, error, relative, summing,
        lse_error, rho, floor,
    )  # fmt: skip


def _budgets(it, q, k, v, scores, sinks, normalizer, scale, growth, dout, dlse, gold, factor) -> dict:
    """What each gradient may be wrong by, with `factor`, without eager's error."""
    u, io, x = it.unit, UNIT[q.dtype], it.exponential
    rounds = io > u
    (batch, heads, n, dim), (kv_heads, m, v_dim) = q.shape, v.shape[1:]
    groups = heads // kv_heads
    wide_k, wide_v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    wide_q, g = q.double(), dout.double()
    p, rho, e = it.p, it.rho, it.error
    weight = growth * p
    out = weight @ wide_v

    dp = growth * (g @ wide_v.mT)
    product = growth * (LAMBDA * math.sqrt(v_dim + 1) * u * (g.abs() @ wide_v.abs().mT)) + 2 * u * dp.abs()
    shared = torch.zeros_like(it.lse)  # R': one number of unknown sign for all keys of a row
    if it.softmax:
        delta = (g * out).sum(-1)
        dots = (g * out).abs().sum(-1)
        reached = weight @ wide_v.abs()
        row = (rho * dp.abs()).sum(-1) + it.summing * (g * reached).square().sum(-1).sqrt()
        row = row + LAMBDA * math.sqrt(v_dim + 1) * u * dots
        shared = LAMBDA * io * (g * out).square().sum(-1).sqrt()
        if rounds:
            shared = shared + LAMBDA * io * (p * dp).square().sum(-1).sqrt()
        inner = dp + (dlse - delta).unsqueeze(-1)
        ds = p * inner
        sizes = dp.abs() + (delta.abs() + dlse.abs()).unsqueeze(-1)
        off = rho * inner.abs() + (p + rho) * (product + row.unsqueeze(-1) + 3 * u * sizes)
    elif type(normalizer).__name__ == "Sigmoid":
        ds = p * (1 - p) * dp
        off = dp.abs() * (e * p * (1 - p) + 3 * (x + 2 * u) * p) + (p + rho) * product
    else:
        s = it.stages[-1]
        ds = torch.where(it.seen & (s > 0), dp, 0)
        off = torch.where(it.seen & (s > -factor * e), product + 2 * u * dp.abs(), 0)
        off = torch.where(it.seen & (s.abs() <= factor * e), off + dp.abs(), off)
    along = torch.where(it.seen, p, 0)  # how the shared error of a row spreads over its keys

    budgets = {}
    for number in reversed(range(len(scores))):
        score, before, before_error = scores[number], it.stages[number], it.stage_errors[number]
        if _tensor(score) is not None:
            budgets["score", number] = _score_budget(
                score,
                ds,
                off,
                shared.unsqueeze(-1) * along.abs(),
                before,
                before_error,
                u,
                gold["score", number],
            )
        slope, wrong = torch.ones_like(ds), torch.zeros_like(ds)
        if type(score).__name__ == "Temperature":
            slope = score.tensor.double()[..., None].expand_as(ds)
        elif type(score).__name__ == "SoftCap":
            t = torch.tanh(before / score.cap)
            slope = 1 - t.square()
            wrong = (
                2 * t.abs() * (slope * before_error / score.cap + t.abs() * LAMBDA * math.sqrt(dim + 4) * u)
            )
        elif unknown(score):
            slope = slope_of(score, before)
            wrong = 2 * (slope_of(score, before + before_error) - slope).abs() + 4 * u * slope.abs()
        wrong = torch.where(it.seen, wrong, 0)
        slope = torch.where(it.seen, slope, 0)
        off = off * (slope.abs() + wrong) + ds.abs() * wrong + 2 * u * (ds * slope).abs()
        ds, along = ds * slope, along * slope

    def per_key(t: Tensor) -> Tensor:  # the sum over the query heads of a key head
        return t.view(batch, kv_heads, groups, m, -1).sum(2)

    least = 2.0**-24 if q.dtype == torch.float16 else 2.0**-1000 if q.dtype == torch.float64 else 2.0**-118
    sees = it.seen.any(-1, keepdim=True)
    keys_seen = it.seen.any(2).view(batch, kv_heads, groups, m).any(2).unsqueeze(-1)
    summing_queries = LAMBDA * math.sqrt(n * groups) * u
    by_query = off @ wide_k.abs() + shared.unsqueeze(-1) * (along @ wide_k).abs()
    by_query = by_query + it.summing * (ds.abs() @ wide_k.abs())
    by_key = per_key(off.mT @ wide_q.abs()) + summing_queries * per_key(ds.abs().mT @ wide_q.abs())
    squares = per_key((shared.unsqueeze(-1) * along).square().mT @ wide_q.square())
    by_key = by_key + squares.sqrt()
    by_value = per_key((growth * rho).mT @ g.abs()) + summing_queries * per_key(weight.mT @ g.abs())
    by_value = by_value + 2 * u * per_key(weight.mT @ g.abs())
    if rounds:
        by_query = by_query + LAMBDA * io * (ds.square() @ wide_k.square()).sqrt()
        by_key = by_key + LAMBDA * io * per_key(ds.square().mT @ wide_q.square()).sqrt()
        by_value = by_value + LAMBDA * io * per_key(weight.square().mT @ g.square()).sqrt()
    budgets["q"] = abs(scale) * by_query + io * gold["q"].abs() + torch.where(sees, least, 0)
    budgets["k"] = abs(scale) * by_key + io * gold["k"].abs() + torch.where(keys_seen, least, 0)
    budgets["v"] = by_value + io * gold["v"].abs() + torch.where(keys_seen, least, 0)
    if sinks is not None and it.softmax:
        lse = torch.where(torch.isfinite(it.lse), it.lse, 0)
        share = torch.where(
            torch.isfinite(it.lse), torch.exp(sinks.double().view(1, -1, 1) - lse), 0
        )  # (B, H, N)
        grown = torch.expm1((2 * it.lse_error).clamp(max=50))
        pulls = (dlse - delta).abs()
        terms = share * (grown * pulls + row + shared + 2 * u * (dlse.abs() + delta.abs()))
        terms = terms.sum((0, 2)) + LAMBDA * math.sqrt(batch * n) * u * (share * pulls).sum((0, 2))
        budgets["sinks"] = terms + (4 * u + UNIT[sinks.dtype]) * gold["sinks"].abs() + 2.0**-100
    return {name: factor * budget for name, budget in budgets.items()}


def _score_budget(score, ds, off, along, before, before_error, u, gold) -> Tensor:
    """The budget of the gradient of a score's tensor; `off` and `along` are what its logits' gradient may be off by."""
    held = _tensor(score)
    final = UNIT[held.dtype] * gold.abs() + 2.0**-100
    if type(score).__name__ == "Temperature":
        size = _finite(before).abs()
        terms = (off + along) * size + (ds.abs() + off) * torch.where(off > 0, before_error, 0)
        shape = (1,) * (3 - held.ndim) + tuple(held.shape)
        count = ds.numel() / held.numel()
        summed = [t.sum(-1).sum_to_size(shape).reshape(held.shape) for t in (terms, (ds * size).abs())]
        return summed[0] + LAMBDA * math.sqrt(count) * u * summed[1] + final
    leaf = held.double().requires_grad_()
    name = next(f.name for f in dataclasses.fields(score) if isinstance(getattr(score, f.name), Tensor))
    added = addend(dataclasses.replace(score, **{name: leaf}), *ds.shape[1:], torch.float64).expand_as(ds)

    def gathered(t: Tensor) -> Tensor:
        return torch.autograd.grad(added, leaf, t, retain_graph=True)[0].abs()

    count = gathered(torch.ones_like(ds)).clamp(max=ds.numel() / len(held) if held.ndim else ds.numel())
    return gathered(off + along) + LAMBDA * count.sqrt() * u * gathered(ds.abs()) + final


def _gradients(dtype, q, k, v, allowed, scores, sinks, normalizer, scale, growth, dout, dlse) -> dict:
    """Gradients of the dense definition by autograd, computed in `dtype`."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in (("q", q), ("k", k), ("v", v))}
    made = []
    for number, score in enumerate(scores):
        held = _tensor(score)
        if held is not None:
            wide = held.double() if dtype == torch.float64 else held.clone()
            leaves["score", number] = wide.requires_grad_()
            name = next(
                f.name for f in dataclasses.fields(score) if isinstance(getattr(score, f.name), Tensor)
            )
            score = dataclasses.replace(score, **{name: leaves["score", number]})
        made.append(score)
    if sinks is not None:
        sinks = sinks.double() if dtype == torch.float64 else sinks.clone()
        leaves["sinks"] = sinks.requires_grad_()
    out, lse = _eager(
        *(leaves[name] for name in "qkv"), allowed, tuple(made), sinks, normalizer, scale, growth
    )
    results, towards = [out], [dout.to(dtype)]
    if lse.requires_grad:
        results, towards = [out, lse], [dout.to(dtype), dlse.to(dtype)]
    grads = torch.autograd.grad(results, list(leaves.values()), towards, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def _eager(q, k, v, allowed, scores, sinks, normalizer, scale, growth):
    """What plain PyTorch computes in the tensors' dtype."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    p, lse = weights(change(q @ k.transpose(-1, -2) * scale, scores), allowed, sinks, normalizer)
    return (p * growth.to(p.dtype)) @ v, lse


def _growth(keep: Tensor | None, dropout_p: float) -> Tensor:
    """c: 0 for a dropped weight, 1 / (1 - dropout_p) for a kept one."""
    return torch.ones((), dtype=torch.float64) if keep is None else keep.double() / (1 - dropout_p)


def _unseen_to_zero(every: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values without NaN and Inf, which nobody may see here."""
    spoilt = ~(torch.isfinite(k).all(-1) & torch.isfinite(v).all(-1))  # (B, Hkv, M)
    groups = every.shape[1] // k.shape[1]
    if bool((every & spoilt.repeat_interleave(groups, 1).unsqueeze(2)).any()):
        raise ValueError("k or v is not finite where a query sees it: no gradient is defined")
    k, v = (torch.where(spoilt.unsqueeze(-1), 0, t) for t in (k, v))
    return k, v


def _finite(t: Tensor) -> Tensor:
    return torch.where(torch.isfinite(t), t, 0)


def _tensor(score) -> Tensor | None:
    """The tensor of a score, or None."""
    held = [getattr(score, f.name) for f in dataclasses.fields(score)]
    return next((t for t in held if isinstance(t, Tensor)), None)


def _detached(scores: tuple) -> tuple:
    return tuple(
        dataclasses.replace(
            score,
            **{
                f.name: getattr(score, f.name).detach()
                for f in dataclasses.fields(score)
                if isinstance(getattr(score, f.name), Tensor)
            },
        )
        for score in scores
    )


def _check(name: str, got: Tensor, want: Tensor, allowance: Tensor, skip: Tensor) -> float:
    error = torch.where(skip, 0, (got - want).abs())
    good = skip | (error <= allowance)  # NaN is not good
    if not bool(good.all()):
        worst = torch.where(good, -1, torch.nan_to_num(error / allowance, nan=math.inf))
        at = torch.unravel_index(worst.argmax(), worst.shape)
        raise AssertionError(
            f"{name} exceeds its error budget in {int((~good).sum())} of {good.numel()} places; worst at "
            f"{tuple(int(i) for i in at)}: got {got[at]:.8g}, want {want[at]:.8g}, error {error[at]:.3g}, "
            f"allowed {allowance.expand_as(error)[at]:.3g}"
        )
    return torch.where(skip | (allowance == 0), 0, error / allowance).max().item()
