"""The budgets themselves: an honest engine stays within them on thousands of cases, a wrong one does not."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate as fv
from foveate.catalogue.conformance.budget import (
    _gradients,
    _growth,
    assert_grads_within_budget,
    assert_within_budget,
)
from foveate.catalogue.conformance.oracle import change, loop_attention, weights
from foveate.core.dropout import keep_mask
from foveate.core.patterns import tile_major

TILE = 64


# ---------------------------------------------------------------------------- an engine in a few lines
def tiled(case, mistake=None):
    """(out, lse, gradients) as a flash engine computes them in float32: tiles of 64 keys and a running maximum forward;
    backward, weights made again from lse, delta from the rounded out. In low precision weights and their gradients are
    rounded before each product, as matrix units want them.

    `mistake` names something done wrong.
    """
    c = case
    dtype, wide = c.q.dtype, torch.promote_types(c.q.dtype, torch.float32)
    groups = c.q.shape[1] // c.k.shape[1]
    q, k, v, dout = (t.to(wide) for t in (c.q, c.k, c.v, c.dout))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    n, m = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if c.scale is None else c.scale
    softmax = c.normalizer is None or isinstance(c.normalizer, (fv.Softmax, fv.SoftmaxPlusOne))

    def rounded(t):
        return t.to(dtype).to(wide)

    raw = (q @ k.mT * scale).requires_grad_()
    scores = [
        dataclasses.replace(
            s,
            **{
                f.name: getattr(s, f.name).detach().to(wide).requires_grad_()
                for f in dataclasses.fields(s)
                if isinstance(getattr(s, f.name), torch.Tensor)
            },
        )
        for s in c.scores
    ]
    with torch.enable_grad():
        changed = change(raw, tuple(scores))
    seen = torch.ones((), dtype=torch.bool) if c.allowed is None else c.allowed
    seen = seen.expand(changed.shape) & ~torch.isneginf(changed)
    s = torch.where(seen, changed.detach(), -math.inf)
    grow = torch.ones_like(s) if c.keep is None else c.keep.to(wide) / (1 - c.dropout_p)
    sinks = None if c.sinks is None else c.sinks.to(wide).view(1, -1, 1, 1)
    if isinstance(c.normalizer, fv.SoftmaxPlusOne):
        zero = torch.zeros(1, q.shape[1], 1, 1, dtype=wide)
        sinks = zero if sinks is None else torch.logaddexp(sinks, zero)

    # forward
    lse = None
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=wide)
    tiles = [slice(j, min(j + TILE, m)) for j in range(0, m, TILE)]
    if softmax:
        top = torch.full_like(s[..., :1], -math.inf) if sinks is None else sinks.expand_as(s[..., :1])
        total = torch.zeros_like(top) if sinks is None else torch.ones_like(top)
        for at in tiles:
            higher = torch.maximum(top, s[..., at].amax(-1, keepdim=True))
            base = torch.where(torch.isneginf(higher), 0, higher)
            p = torch.exp2((s[..., at] - base) * 1.4426950408889634)
            shrink = torch.exp(top - base)
            total = total * shrink + p.sum(-1, keepdim=True)
            out = out * shrink + rounded(p * grow[..., at]) @ v[..., at, :]
            top = higher
        blank = total == 0
        out = torch.where(blank, 0, out / torch.where(blank, 1, total))
        lse = torch.where(blank, -math.inf, top + torch.log(total)).squeeze(-1)
    else:
        p = torch.sigmoid(s + c.normalizer.bias) if isinstance(c.normalizer, fv.Sigmoid) else torch.relu(s)
        for at in tiles:
            out = out + rounded(p[..., at] * grow[..., at]) @ v[..., at, :]
    out = out.to(dtype)

    # backward
    if mistake == "scale":
        scale = scale * 1.05
    mask = seen.clone()
    if mistake == "row of the mask":
        row = n // 2
        mask[:, :, row] = mask[:, :, (row + 1) % n]
    if softmax:
        known = torch.where(torch.isneginf(lse), 0, lse).unsqueeze(-1)
        p = torch.where(mask, torch.exp(changed.detach() - known), 0)
    else:
        p = torch.where(mask, p, 0)
    if mistake == "dropout forgotten in dv":
        dv = rounded(p).mT @ dout
    else:
        dv = rounded(p * grow).mT @ dout
    dp = dout @ v.mT
    if mistake != "dropout forgotten in dp":
        dp = dp * grow
    if softmax:
        delta = (dout * out.to(wide)).sum(-1)
        if mistake == "delta":
            delta = torch.zeros_like(delta)
        pull = torch.zeros_like(delta) if c.dlse is None or mistake == "dlse" else c.dlse.to(wide)
        pull = torch.where(torch.isneginf(lse), 0, pull) - delta
        ds = p * (dp + pull.unsqueeze(-1))
    elif isinstance(c.normalizer, fv.Sigmoid):
        ds = dp * p * (1 - p) if mistake != "slope of the normaliser" else dp * p
    else:
        ds = torch.where(p > 0, dp, 0)
    leaves = [t for score in scores for t in vars(score).values() if isinstance(t, torch.Tensor)]
    if changed is raw:
        chained = [ds]
    else:
        chained = torch.autograd.grad(changed, [raw, *leaves], ds, allow_unused=True)
    ds = torch.where(seen, chained[0], 0) if mistake != "slope of the scores" else ds
    dq = torch.zeros_like(q)
    dk = torch.zeros_like(k)
    for number, at in enumerate(tiles):
        if mistake == "tile of dq" and number == len(tiles) - 1:
            continue
        dq = dq + rounded(ds[..., at]) @ k[..., at, :]
    for i in range(0, n, TILE):
        if mistake == "tile of dk" and i + TILE >= n:
            continue
        dk = dk + rounded(ds[:, :, i : i + TILE]).mT @ q[:, :, i : i + TILE]
    heads = slice(1, None) if mistake == "head of the group" else slice(None)
    dk, dv = (t.unflatten(1, (-1, groups))[:, :, heads].sum(2) for t in (dk, dv))
    grads = {"q": (dq * scale).to(dtype), "k": (dk * scale).to(dtype), "v": dv.to(dtype)}
    if c.sinks is not None:
        eff = torch.exp(sinks.squeeze(-1) - torch.where(torch.isneginf(lse), math.inf, lse))
        part = torch.sigmoid(c.sinks.to(wide)) if isinstance(c.normalizer, fv.SoftmaxPlusOne) else 1
        dsink = (eff * pull).sum((0, 2)) * part
        grads["sinks"] = (-dsink if mistake == "sign of the sinks" else dsink).to(c.sinks.dtype)
    found = iter(chained[1:])
    for number, score in enumerate(c.scores):
        held = [t for t in vars(score).values() if isinstance(t, torch.Tensor)]
        if held:
            grad = next(found).to(held[0].dtype)
            grads["score", number] = grad.roll(1, -1) if mistake == "table shifted" else grad
    return out, lse, grads


@dataclasses.dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None = None
    allowed: torch.Tensor | None = None
    scores: tuple = ()
    sinks: torch.Tensor | None = None
    normalizer: object = None
    scale: float | None = None
    keep: torch.Tensor | None = None
    dropout_p: float = 0.0

    @property
    def options(self):
        names = ("scores", "sinks", "normalizer", "scale", "keep", "dropout_p")
        return {name: getattr(self, name) for name in names}

    def check(self, out, lse, grads, **more):
        share = assert_within_budget(
            out, self.q, self.k, self.v, self.allowed, lse=lse, **self.options, **more
        )
        return share, self.check_grads(grads, **more)

    def check_grads(self, grads, **more):
        return assert_grads_within_budget(
            grads,
            self.q,
            self.k,
            self.v,
            self.allowed,
            dout=self.dout,
            dlse=self.dlse,
            **self.options,
            **more,
        )


def make(
    batch=1, kv_heads=1, groups=2, n=65, m=130, dim=16, v_dim=8, dtype=torch.float32, seed=0, size=1.0, **options
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = kv_heads * groups
    q, k, v = draw(batch, heads, n, dim), draw(batch, kv_heads, m, dim), draw(batch, kv_heads, m, v_dim)
    dout = draw(batch, heads, n, v_dim)
    normalizer = options.get("normalizer")
    softmax = normalizer is None or isinstance(normalizer, (fv.Softmax, fv.SoftmaxPlusOne))
    dlse = draw(batch, heads, n).float() if softmax else None
    return Case((q * size).to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype), dlse, **options)


@st.composite
def cases(draw, dtypes=(torch.float32, torch.bfloat16)):
    batch, kv_heads, groups = draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 1, 3), (2, 2, 1)]))
    heads = kv_heads * groups
    n = draw(st.sampled_from([1, 2, 5, 13, 63, 64, 65, 75, 130]))
    m = draw(st.sampled_from([1, 2, 7, 11, 63, 64, 65, 111, 200]))
    dtype = draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 9999))
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def random(*shape, of=wide):
        return torch.randn(shape, generator=generator).to(of)

    density = draw(st.sampled_from([None, 0.0, 0.05, 0.5, 0.9]))
    allowed = None
    if density is not None:
        allowed = torch.rand(batch, heads, n, m, generator=generator) < density
        allowed[:, :, draw(st.integers(0, n - 1))] = False
    normalizer = draw(
        st.sampled_from([None, None, None, fv.SoftmaxPlusOne(), fv.Sigmoid(), fv.Sigmoid(-3.0), fv.ReLU()])
    )
    softmax = normalizer is None or isinstance(normalizer, fv.SoftmaxPlusOne)
    scores = {
        "cap": lambda: fv.SoftCap(draw(st.sampled_from([0.5, 3.0, 30.0]))),
        "bias": lambda: fv.Bias(random(heads, 1, m, of=dtype)),
        "bias of all": lambda: fv.Bias(random(batch, 1, n, m)),
        "temperature": lambda: fv.Temperature(1 + 0.3 * random(heads, n)),
        "temperature of one": lambda: fv.Temperature(1 + random()),
        "table": lambda: fv.RelativeBias(random(heads, 2 * draw(st.integers(0, 90)) + 1, of=dtype)),
        "alibi": lambda: fv.ALiBi(random(heads).abs()),
        "t5": lambda: fv.T5Bias(random(32, heads), True),
    }
    names = draw(st.lists(st.sampled_from(sorted(scores)), max_size=3, unique=True))
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.1, 0.7]))
    return make(
        batch, kv_heads, groups, n, m,
        draw(st.sampled_from([1, 3, 16, 64])), draw(st.sampled_from([1, 5, 32])), dtype, seed,
        draw(st.sampled_from([1e-3, 1.0, 1.0, 10.0, 100.0])),
        allowed=allowed, scores=tuple(scores[name]() for name in names), normalizer=normalizer,
        sinks=random(heads) if softmax and draw(st.booleans()) else None,
        scale=draw(st.sampled_from([None, None, 0.3, -0.2])),
        keep=keep_mask(seed, dropout_p, batch, heads, n, m) if dropout_p else None, dropout_p=dropout_p,
    )  # fmt: skip


# ---------------------------------------------------------------------------- honest engines pass
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_an_honest_engine_stays_within(case):
    case.check(*tiled(case))


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(case=cases())
def test_an_honest_engine_stays_within_at_length(case):
    case.check(*tiled(case))


@settings(max_examples=40, deadline=None)
@given(case=cases(dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64)))
def test_the_reference_stays_within(case):
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in "qkv"}
    if case.sinks is not None:
        leaves["sinks"] = case.sinks.clone().requires_grad_()
    scores = []
    for number, score in enumerate(case.scores):
        for name, held in score.tensors.items():
            leaves["score", number] = held.clone().requires_grad_()
            score = dataclasses.replace(score, **{name: leaves["score", number]})
        scores.append(score)
    result = fv.attention(
        *(leaves[name] for name in "qkv"), case.allowed, score=tuple(scores), sinks=leaves.get("sinks"),
        normalizer=case.normalizer or fv.Softmax(), scale=case.scale, dropout_p=case.dropout_p,
        dropout_seed=0, return_lse=case.dlse is not None, engine="reference",
    )  # fmt: skip
    if case.keep is not None:
        (batch, heads, n, _), m = case.q.shape, case.k.shape[2]
        case.keep = keep_mask(0, case.dropout_p, batch, heads, n, m)
    out, lse = result if case.dlse is not None else (result, None)
    results = [out] if lse is None else [out, lse]
    towards = [case.dout] if lse is None else [case.dout, case.dlse.to(lse.dtype)]
    if lse is not None:
        towards[1] = torch.where(torch.isneginf(lse), 0, towards[1])
    grads = torch.autograd.grad(results, list(leaves.values()), towards)
    case.check(out.detach(), None if lse is None else lse.detach(), dict(zip(leaves, grads, strict=True)))


# ---------------------------------------------------------------------------- wrong ones do not
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
WRONG = {
    "tile of dq": ({}, "q"),
    "tile of dk": ({}, "k"),
    "delta": ({}, "q"),
    "dlse": ({}, "q"),
    "scale": ({}, "q"),
    "row of the mask": (
        {"allowed": torch.rand(65, 130, generator=torch.Generator().manual_seed(1)) < 0.5},
        "q",
    ),
    "head of the group": ({}, "k"),
    "dropout forgotten in dp": ({"keep": keep_mask(1, 0.2, 1, 2, 65, 130), "dropout_p": 0.2}, "q"),
    "dropout forgotten in dv": ({"keep": keep_mask(1, 0.2, 1, 2, 65, 130), "dropout_p": 0.2}, "v"),
    "slope of the normaliser": ({"normalizer": fv.Sigmoid(-2.0)}, "q"),
    "slope of the scores": ({"scores": (fv.SoftCap(2.0),)}, "q"),
    "sign of the sinks": ({"sinks": torch.tensor([0.5, 2.0])}, "sinks"),
    "table shifted": ({"scores": (fv.RelativeBias(torch.zeros(2, 41)),)}, ("score", 0)),
}


@DTYPES
@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("seed", range(3))
def test_a_mistake_is_noticed(mistake, dtype, seed):
    options, where = WRONG[mistake]
    case = make(dtype=dtype, seed=seed, **options)
    case.check(*tiled(case))
    grads = tiled(case, mistake)[2]
    label = where if isinstance(where, str) else f"score {where[1]}"
    with pytest.raises(AssertionError, match=f"the gradient of {label} exceeds its error budget"):
        case.check_grads({where: grads[where]})


def test_small_things_are_noticed_in_float32():
    """One pair too many, a scale wrong in the fourth digit, low precision inside, a key without gradient."""
    allowed = torch.rand(65, 130, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed[7] = False
    allowed[:, 11] = False
    case = make(allowed=allowed)
    grads = tiled(case)[2]
    assert case.check_grads(grads) < 1
    wider = allowed.clone()
    wider[0, (~allowed[0]).nonzero()[0, 0]] = True
    low = dataclasses.replace(
        case, **{name: getattr(case, name).bfloat16() for name in ("q", "k", "v", "dout")}
    )
    wrong = {
        "pair": tiled(dataclasses.replace(case, allowed=wider))[2],
        "scale": tiled(dataclasses.replace(case, scale=0.25005))[2],
        "low": {name: grad.float() for name, grad in tiled(low)[2].items()},
        "digits": {name: grad * 1.0002 for name, grad in grads.items()},
    }
    for kind, found in wrong.items():
        for name in "qk":
            with pytest.raises(AssertionError, match="exceeds its error budget"):
                case.check_grads({name: found[name]})
        if kind != "scale":  # 5e-5 in the logits hardly moves the weights
            with pytest.raises(AssertionError, match="exceeds its error budget"):
                case.check_grads({"v": found["v"]})


def test_what_sees_nothing_or_is_not_seen_has_gradient_0():
    allowed = torch.ones(65, 130, dtype=torch.bool)
    allowed[7] = False
    allowed[:, 11] = False
    case = make(allowed=allowed, dtype=torch.bfloat16)
    grads = tiled(case)[2]
    for name, at, words in (
        ("q", 7, "query that sees nothing"),
        ("k", 11, "key that"),
        ("v", 11, "key that"),
    ):
        bad = grads[name].clone()
        bad[0, 0, at, 0] = 1e-30
        with pytest.raises(AssertionError, match=f"the gradient of {name} is not 0 at a {words}"):
            case.check_grads({name: bad})
        bad[0, 0, at, 0] = math.nan
        with pytest.raises(AssertionError, match=f"the gradient of {name} is not 0 at a {words}"):
            case.check_grads({name: bad})
        bad = grads[name].clone()
        bad[0, 0, 3, 0] = math.nan
        with pytest.raises(AssertionError, match="exceeds its error budget"):
            case.check_grads({name: bad})


def test_unseen_poison_is_accepted_and_seen_poison_is_not():
    allowed = torch.ones(65, 130, dtype=torch.bool)
    allowed[:, 11] = False
    case = make(allowed=allowed)
    grads = tiled(case)[2]
    case.k[:, :, 11] = math.nan
    case.v[:, :, 11] = math.inf
    case.check_grads(grads)
    case.v[:, :, 12] = math.nan
    with pytest.raises(ValueError, match="not finite where a query sees it"):
        case.check_grads(grads)


def test_shapes_dtypes_and_names_are_checked():
    case = make()
    grads = tiled(case)[2]
    with pytest.raises(ValueError, match="grads has 'sinks'; the inputs are"):
        case.check_grads({"sinks": grads["q"]})
    with pytest.raises(AssertionError, match="has shape"):
        case.check_grads({"q": grads["q"][:, :1]})
    with pytest.raises(AssertionError, match=r"is torch\.float64"):
        case.check_grads({"q": grads["q"].double()})


def test_the_gold_gradients_are_those_of_the_loop():
    """Central differences of the loop oracle along one random direction per input, with everything at once."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v, dout, dlse = (
        draw(1, 2, 4, 3),
        draw(1, 1, 6, 3),
        draw(1, 1, 6, 2),
        draw(1, 2, 4, 2),
        draw(1, 2, 4),
    )
    allowed = draw(1, 2, 4, 6) > -0.5
    allowed[:, :, 1] = False
    keep = keep_mask(3, 0.3, 1, 2, 4, 6)
    sinks = draw(2)
    scores = (
        fv.Temperature(draw(2, 4)),
        fv.SoftCap(2.0),
        fv.Bias(draw(4, 6)),
        fv.RelativeBias(draw(2, 3, 5), shape=(2, 3), order=tile_major((2, 3), (2, 2))),
        fv.RelativeBias(draw(1, 5)),
        fv.ALiBi(draw(2)),
        fv.T5Bias(draw(8, 2), True, 5),
    )
    names = ["q", "k", "v", "sinks"] + [("score", i) for i in (0, 2, 3, 4, 5, 6)]
    for normalizer in (None, fv.SoftmaxPlusOne(), fv.Sigmoid(-0.5), fv.ReLU()):
        softmax = normalizer is None or isinstance(normalizer, fv.SoftmaxPlusOne)

        def loop(values, softmax=softmax, normalizer=normalizer):
            made = list(scores)
            for name, value in values.items():
                if isinstance(name, tuple):
                    (field,) = scores[name[1]].tensors
                    made[name[1]] = dataclasses.replace(scores[name[1]], **{field: value})
            out, lse = loop_attention(
                values["q"], values["k"], values["v"], allowed, scores=made, keep=keep, dropout_p=0.3,
                sinks=values["sinks"] if softmax else None, normalizer=normalizer,
            )  # fmt: skip
            finite = torch.isfinite(lse)
            return float((out * dout).sum() + (torch.where(finite, lse, 0) * dlse).sum())

        values = {"q": q, "k": k, "v": v, "sinks": sinks}
        values |= {name: next(iter(scores[name[1]].tensors.values())) for name in names[4:]}
        live = torch.ones(1, 2, 4, dtype=torch.bool)
        if softmax:
            logits = torch.zeros(1, 2, 4, 6, dtype=torch.float64)
            live = torch.isfinite(weights(logits, allowed, sinks, normalizer)[1])
        gold = _gradients(
            torch.float64, q, k, v, allowed, scores, sinks if softmax else None, normalizer, 3**-0.5,
            _growth(keep, 0.3), dout, torch.where(live, dlse, 0),
        )  # fmt: skip
        for name in names:
            if name == "sinks" and not softmax:
                continue
            step = draw(*values[name].shape)
            ends = [loop(values | {name: values[name] + sign * 1e-6 * step}) for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / 2e-6
            assert float((gold[name] * step).sum()) == pytest.approx(slope, abs=2e-7, rel=2e-7), name
