"""How wrong an engine may be: eager's error in the same dtype plus a rounding budget from the reduction
sizes.

Let u = 2^-24 (float32, in which engines accumulate; 2^-53 for float64), u_io the unit roundoff of the
tensors' dtype, A_ij = scale sum_d |q_id k_jd|, s the exact changed logits, p the exact weights, T = ceil(M /
64) tiles. A sum of n rounded terms is off by about lambda sqrt(n) u times the sum of magnitudes (roundings
are close to independent; Higham and Mary 2019); lambda = 2 is beyond three standard deviations. Then, to
first order:

    logit        |ds_ij|  <= e_ij = lambda sqrt(D + 4) u (A_ij + |s_ij|)
    exponential  relative error of exp(s - max) <= e + x, where x = 2^-20 is what vectorised exponentials
    guarantee
    running max  every tile may rescale what was summed so far by another exponential: sqrt(T) (x + u) in all
    so           r_i = max_j e_ij + (1 + sqrt(T)) (x + u), the relative error of a weight before it is
    normalised denominator  r_i + lambda sqrt(M) u p v          lambda sqrt(M) u sum_j p_ij |v_jd|, and where
    weights are rounded to the dtype before the product
                 lambda u_io sqrt(sum_j p_ij^2 v_jd^2), plus 2^-25 sqrt(M) max|v| where float16 weights
                 underflow
    output       u_io |out_id|

    budget_id = (2 r_i + 2 lambda sqrt(M) u) sum_j p_ij |v_jd|
                + lambda u_io sqrt(sum_j p_ij^2 v_jd^2) [+ underflow] + u_io |out_id|
    budget of lse_i = r_i + lambda sqrt(M) u + 2 u |lse_i|

Eager's error enters as the largest one of the row. A row that sees nothing has budget 0: it must be 0 and
-inf.
"""

from __future__ import annotations

import math

import torch
from attention_oracle import change, logits64, weights
from torch import Tensor

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
    scale: float | None = None,
    lse: Tensor | None = None,
    factor: float = 1.0,
) -> float:
    """Compare an engine's out (and lse) with the definition in float64.

    Args:
        allowed: bool, broadcastable to (B, H, N, M); None = every pair.
        factor: multiplies the rounding budget; for an engine that states a coarser arithmetic.

    Returns:
        The largest error as a share of what was allowed, for curious tests.

    Keys and values that are not finite must not reach rows for which they are masked; rows that may attend to
    one must come out as NaN or Inf somewhere.
    """
    dtype, (_, heads, n, dim), (_, kv_heads, m, _) = out.dtype, q.shape, k.shape
    assert out.shape == (*q.shape[:3], v.shape[3]), f"out has shape {tuple(out.shape)}"
    assert dtype == q.dtype, f"out is {dtype}, q is {q.dtype}"
    scale = dim**-0.5 if scale is None else scale
    q, k, v = (t.detach() for t in (q, k, v))
    spoilt = ~(torch.isfinite(k).all(-1) & torch.isfinite(v).all(-1))  # (B, Hkv, M)
    k, v = (torch.where(spoilt.unsqueeze(-1), 0, t) for t in (k, v))
    every = torch.ones((), dtype=torch.bool) if allowed is None else allowed
    sees_spoilt = (every & spoilt.repeat_interleave(heads // kv_heads, 1).unsqueeze(2)).any(-1)  # (B, H, N)
    sees_spoilt = sees_spoilt.expand(q.shape[:3])
    if bool(sees_spoilt.any()):
        assert not torch.isfinite(out[sees_spoilt]).all(-1).any(), "a visible NaN or Inf was lost"

    s = logits64(q, k, scale, scores)
    p, gold_lse = weights(s, allowed, sinks)
    wide_v = v.double().repeat_interleave(heads // kv_heads, 1)
    gold = p @ wide_v
    eager_out, eager_lse = _eager(q, k, v, allowed, scores, sinks, scale)

    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    unit_io = UNIT[dtype]
    exponential = 2.0**-50 if dtype == torch.float64 else 2.0**-20
    magnitude = logits64(q.abs(), k.abs(), scale)  # A
    error = LAMBDA * math.sqrt(dim + 4) * unit * (magnitude + torch.where(torch.isfinite(s), s.abs(), 0))
    if allowed is not None:
        error = torch.where(allowed, error, 0)
    relative = error.amax(-1) + (1 + math.sqrt(-(-m // 64))) * (exponential + unit)  # r, (B, H, N)
    summing = LAMBDA * math.sqrt(m) * unit
    budget = (2 * relative + 2 * summing).unsqueeze(-1) * (p @ wide_v.abs()) + unit_io * gold.abs()
    if unit_io > unit:
        budget = budget + LAMBDA * unit_io * (p.square() @ wide_v.square()).sqrt()
    nothing = torch.isneginf(gold_lse)
    if dtype == torch.float16:
        budget = budget + 2.0**-25 * math.sqrt(m) * wide_v.abs().amax()
        budget = torch.where((p.sum(-1) == 0).unsqueeze(-1), 0, budget)
    allowance = factor * budget + (eager_out.double() - gold).abs().amax(-1, keepdim=True)
    share = _check("out", out.double(), gold, allowance, sees_spoilt.unsqueeze(-1).expand_as(gold))
    if lse is not None:
        assert lse.shape == (*q.shape[:2], n), f"lse has shape {tuple(lse.shape)}"
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), (
            f"lse is {lse.dtype}"
        )
        lse = lse.detach().double()
        blank = nothing & ~sees_spoilt
        assert torch.isneginf(lse[blank]).all(), "a row that sees nothing has lse other than -inf"
        slack = (
            factor * (relative + summing + 2 * unit * gold_lse.abs()) + (eager_lse.double() - gold_lse).abs()
        )
        share = max(share, _check("lse", lse, gold_lse, slack, sees_spoilt | nothing))
    return share


def _check(name: str, got: Tensor, want: Tensor, allowance: Tensor, skip: Tensor) -> float:
    error = torch.where(skip, 0, (got - want).abs())
    good = skip | (error <= allowance)  # NaN is not good
    if not bool(good.all()):
        worst = torch.where(good, -1, torch.nan_to_num(error / allowance, nan=math.inf))
        at = torch.unravel_index(worst.argmax(), worst.shape)
        raise AssertionError(
            f"{name} exceeds its error budget in {int((~good).sum())} of {good.numel()} places; worst at "
            f"{tuple(int(i) for i in at)}: got {got[at]:.8g}, want {want[at]:.8g}, error {error[at]:.3g}, "
            f"allowed {allowance[at]:.3g}"
        )
    return float(torch.where(skip | (allowance == 0), 0, error / allowance).max())


def _eager(q, k, v, allowed, scores, sinks, scale):
    """What plain PyTorch computes in the tensors' dtype."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    p, lse = weights(change(q @ k.transpose(-1, -2) * scale, scores), allowed, sinks)
    return p @ v, lse
