"""Attention by its definition, twice: element by element in Python, and dense in any dtype, differentiable. Shares
nothing with foveate but the fields of its scores and normalisers, which it reads by class name. A score of another
class is taken at its word, `apply`, in float64.
"""

# scores and normalisers are read by class name, which a type checker cannot follow
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


# ---------------------------------------------------------------------------- element by element
def loop_attention(
    q,
    k,
    v,
    allowed=None,
    *,
    scale=None,
    change=None,
    scores=(),
    sinks=None,
    normalizer=None,
    keep=None,
    dropout_p=0.0,
):
    """One weight at a time.

    Args:
        q, k, v: (B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv); computed in Python floats.
        allowed: bool, broadcastable to (B, H, N, M); None = every pair.
        change: function (logit, b, h, i, j) -> logit, applied to the scaled logit.
        scores: applied after `change`, in order.
        sinks: one float per head.
        normalizer: None = softmax.
        keep: bool (B, H, N, M), which weights dropout keeps; None = all.

    Returns:
        out (B, H, N, Dv), lse (B, H, N), float64; lse is -inf throughout for a normaliser that has none.
    """
    (batch, heads, n, dim), (_, kv_heads, m, _) = q.shape, k.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    seen = torch.ones(1, dtype=torch.bool) if allowed is None else allowed
    seen = torch.broadcast_to(seen, (batch, heads, n, m)).tolist()
    kept = None if keep is None else keep.tolist()
    q, k, v = (t.detach().double().tolist() for t in (q, k, v))
    out = torch.zeros(batch, heads, n, len(v[0][0][0]), dtype=torch.float64)
    lse = torch.full((batch, heads, n), -math.inf, dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(n)):
        g = h // (heads // kv_heads)
        logits = {}
        for j in range(m):
            if seen[b][h][i][j]:
                logit = scale * math.fsum(x * y for x, y in zip(q[b][h][i], k[b][g][j], strict=True))
                logit = logit if change is None else change(logit, b, h, i, j)
                for score in scores:
                    logit = changed(score, logit, b, h, i, j, n, m)
                logits[j] = logit
        weights, lse[b, h, i] = loop_weights(logits, normalizer, None if sinks is None else float(sinks[h]))
        if kept is not None:
            weights = {j: x / (1 - dropout_p) for j, x in weights.items() if kept[b][h][i][j]}
        for d in range(out.shape[3]):
            out[b, h, i, d] = math.fsum(x * v[b][g][j][d] for j, x in weights.items() if x > 0)
    return out, lse


def loop_weights(logits: dict, normalizer, sink: float | None) -> tuple[dict, float]:
    """Weights of one row by key, and its lse; `logits` by key, those that may be seen."""
    kind = "Softmax" if normalizer is None else type(normalizer).__name__
    if kind == "ReLU":
        return {j: max(x, 0.0) for j, x in logits.items()}, -math.inf
    if kind == "Sigmoid":

        def sigmoid(x):
            return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))

        return {j: sigmoid(x + normalizer.bias) for j, x in logits.items()}, -math.inf
    assert kind in ("Softmax", "SoftmaxPlusOne"), kind
    every = list(logits.values()) + ([] if sink is None else [sink])
    every += [0.0] if kind == "SoftmaxPlusOne" else []
    top = max(every, default=-math.inf)
    if top == -math.inf:
        return {}, top
    total = math.fsum(math.exp(x - top) for x in every)
    return {j: math.exp(x - top) / total for j, x in logits.items()}, top + math.log(total)


def changed(score, logit: float, b: int, h: int, i: int, j: int, n: int, m: int) -> float:
    """One logit after one score, in Python floats; query i stands at position i + m - n."""
    kind, distance = type(score).__name__, i + m - n - j

    def at(tensor, *index):  # of a tensor that broadcasts
        index = index[len(index) - tensor.ndim :]
        return float(
            tensor[tuple(0 if size == 1 else x for x, size in zip(index, tensor.shape, strict=True))]
        )

    if kind == "SoftCap":
        return score.cap * math.tanh(logit / score.cap)
    if kind == "Bias":
        return logit + at(score.tensor, b, h, i, j)
    if kind == "Temperature":
        return logit if logit == -math.inf else logit * at(score.tensor, b, h, i)
    if kind == "ALiBi":
        return logit - float(score.slopes[h]) * abs(distance)
    if kind == "T5Bias":
        bucket = t5_bucket(-distance, score.bidirectional, len(score.weight), score.max_distance)
        return logit + at(score.weight, bucket, h)
    assert kind == "RelativeBias", kind
    if score.shape is None:
        steps = [distance]
    else:
        cells = score.order.permutation.tolist()
        steps = [
            x - y
            for x, y in zip(place(cells[i + m - n], score.shape), place(cells[j], score.shape), strict=True)
        ]
    reach = [size // 2 for size in score.table.shape[1:]]
    entry = [r + max(-r, min(r, step)) for r, step in zip(reach, steps, strict=True)]
    return logit + at(score.table, h, *entry)


def place(cell: int, shape: tuple[int, ...]) -> list[int]:
    """Coordinates of a row-major cell number."""
    return [cell // math.prod(shape[axis + 1 :]) % shape[axis] for axis in range(len(shape))]


def t5_bucket(relative: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """Bucket of a key at `relative` = key - query, as the paper's code has it, in float32."""
    first = 0
    if bidirectional:
        buckets //= 2
        first, relative = (buckets, relative) if relative > 0 else (0, -relative)
    else:
        relative = max(-relative, 0)
    exact = buckets // 2
    if relative < exact:
        return first + relative
    ratio = torch.log(torch.tensor(float(relative)) / exact) / math.log(max_distance / exact)
    return first + min(exact + int(ratio * (buckets - exact)), buckets - 1)


def loop_keep_mask(seed: int, p: float, batch: int, heads: int, n: int, m: int) -> Tensor:
    """Which weights dropout keeps, from Philox in Python integers."""
    limit = min(round(p * 2**32), 2**32 - 1)
    kept = torch.zeros(batch, heads, n, m, dtype=torch.bool)
    for b, h, i, four in itertools.product(range(batch), range(heads), range(n), range(-(-m // 4))):
        words = loop_philox((four, i, (b * heads + h) % 2**32, 0), (seed % 2**32, (seed >> 32) % 2**32))
        for j in range(4 * four, min(4 * four + 4, m)):
            kept[b, h, i, j] = words[j % 4] >= limit
    return kept


def loop_philox(counter, key):
    c, k = list(counter), list(key)
    for step in range(10):
        if step:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second % 2**32,
            (first >> 32) ^ c[3] ^ k[1],
            first % 2**32,
        ]
    return c


# ---------------------------------------------------------------------------- dense
def logits64(q: Tensor, k: Tensor, scale: float, scores: tuple = ()) -> Tensor:
    """Scaled and changed logits in float64, (B, H, N, M)."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return change(torch.einsum("bhnd,bhmd->bhnm", q.double(), k) * scale, scores)


def change(logits: Tensor, scores: tuple) -> Tensor:
    """Apply scores to logits (B, H, N, M), in their dtype; differentiable."""
    for score in scores:
        logits = change_once(logits, score)
    return logits


def change_once(logits: Tensor, score) -> Tensor:
    kind = type(score).__name__
    if kind == "SoftCap":
        return score.cap * torch.tanh(logits / score.cap)
    if kind == "Temperature":
        gone = torch.isneginf(logits)
        factor = score.tensor.to(logits.dtype)[..., None]
        return torch.where(gone, logits, torch.where(gone, 0, logits) * factor)
    if unknown(score):
        return score.apply(logits)
    return logits + addend(score, *logits.shape[-3:], logits.dtype)


KNOWN = ("SoftCap", "Temperature", "Bias", "ALiBi", "T5Bias", "RelativeBias")


def unknown(score) -> bool:
    """Whether the oracle has no definition of its own of a score."""
    return type(score).__name__ not in KNOWN


def slope_of(score, logits: Tensor) -> Tensor:
    """d apply(s) / d s, elementwise, for a score that changes every logit by itself."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(score.apply(leaf).sum(), leaf)[0]


def addend(score, heads: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """What an additive score adds, broadcastable to (B, heads, n, m); differentiable back to its tensor."""
    kind = type(score).__name__
    distance = torch.arange(n)[:, None] + (m - n) - torch.arange(m)
    if kind == "Bias":
        return score.tensor.to(dtype)
    if kind == "ALiBi":
        return -score.slopes.to(dtype)[:, None, None] * distance.abs().to(dtype)
    if kind == "T5Bias":
        made = {
            d: t5_bucket(-d, score.bidirectional, len(score.weight), score.max_distance)
            for d in range(1 - n, m)
        }
        bucket = torch.tensor([[made[d] for d in row] for row in distance.tolist()])
        return score.weight.to(dtype)[bucket].permute(2, 0, 1)
    if unknown(score):
        return score.apply(torch.zeros(1, heads, n, m, dtype=dtype))
    if score.shape is None:
        steps = [distance]
    else:
        places = torch.stack(torch.unravel_index(score.order.permutation, score.shape))
        steps = list(places[:, m - n :, None] - places[:, None, :])
    reach = [size // 2 for size in score.table.shape[1:]]
    entry = [r + step.clamp(-r, r) for r, step in zip(reach, steps, strict=True)]
    return score.table.to(dtype)[(slice(None), *entry)]


def weights(
    logits: Tensor, allowed: Tensor | None, sinks: Tensor | None, normalizer=None
) -> tuple[Tensor, Tensor]:
    """Weights (B, H, N, M), exactly 0 where not allowed, and lse (B, H, N), -inf for a normaliser that has none and
    for rows that see nothing; in the dtype of the logits. Differentiable, with gradient 0 where not allowed.
    """
    kind = "Softmax" if normalizer is None else type(normalizer).__name__
    seen = ~torch.isneginf(logits) if allowed is None else allowed & ~torch.isneginf(logits)
    logits = torch.where(seen, logits, 0)
    if kind in ("Sigmoid", "ReLU"):
        p = torch.sigmoid(logits + normalizer.bias) if kind == "Sigmoid" else torch.relu(logits)
        return torch.where(seen, p, 0), torch.full_like(logits[..., 0], -math.inf)
    assert kind in ("Softmax", "SoftmaxPlusOne"), kind
    logits = torch.where(seen, logits, -math.inf)
    columns = [] if sinks is None else [sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)]
    columns += [torch.zeros_like(logits[..., :1])] if kind == "SoftmaxPlusOne" else []
    every = torch.cat([logits, *columns], -1)
    blank = torch.isneginf(every).all(-1, keepdim=True)
    every = torch.where(blank, 0, every)
    p = torch.where(blank, 0, torch.softmax(every, -1))[..., : logits.shape[-1]]
    lse = torch.where(blank.squeeze(-1), -math.inf, torch.logsumexp(every, -1))
    return torch.where(seen, p, 0), lse
