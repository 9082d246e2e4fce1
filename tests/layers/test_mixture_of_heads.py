"""Mixture of heads: routers against loops in float64, gates, the balance loss, sparse execution, and states."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import foveate as fv
from foveate.layers import (
    MixtureOfHeads,
    SelfAttention,
    TransformerLM,
    chosen_attention,
    moh_total_aux,
    route_heads,
    route_heads_by_query_norm,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def made(*args, seed=0, noise=0.3, **kwargs):
    torch.manual_seed(seed)
    layer = MixtureOfHeads(*args, **kwargs).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += noise * torch.randn(p.shape)
    return layer


def softmax(z):
    e = [math.exp(a - max(z)) for a in z]
    return [a / math.fsum(e) for a in e]


def times(x, w):
    return [math.fsum(a * row[c] for a, row in zip(x, w, strict=True)) for c in range(len(w[0]))]


# ------------------------------------------------------------------------------------------------ routers
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("shared", "routed", "k"), [(2, 5, 3), (1, 4, 1), (0, 6, 2), (3, 4, 0), (2, 3, 3)])
def test_the_linear_router_is_the_formula(shared, routed, k, renormalize):
    x, wg = normal(2, 7, 6, seed=1), normal(6, routed, seed=2)
    ws = normal(6, shared, seed=3) if shared > 1 else None
    w0 = normal(6, 2, seed=4) if shared and k else None
    gates, aux = route_heads(x, wg, ws, w0, k=k, shared=shared, renormalize=renormalize)
    assert gates.shape == (2, 7, shared + routed)
    f, mean = [0.0] * routed, [0.0] * routed
    for b, t in itertools.product(range(2), range(7)):
        row = x[b, t].tolist()
        p = softmax(times(row, wg.tolist()))
        top = sorted(range(routed), key=lambda e: -p[e])[:k]
        for e in range(routed):
            f[e] += (e in top) / 14
            mean[e] += p[e] / 14
        total = math.fsum(p[e] for e in top)
        r = [p[e] * (k / total if renormalize else 1) if e in top else 0.0 for e in range(routed)]
        s = [1.0] * shared
        if ws is not None:
            s = [a * (shared if renormalize else 1) for a in softmax(times(row, ws.tolist()))]
        if w0 is not None:
            a1, a2 = (a * (2 if renormalize else 1) for a in softmax(times(row, w0.tolist())))
            s, r = [a1 * a for a in s], [a2 * a for a in r]
            if renormalize:
                assert math.isclose(float(gates[b, t, :shared].sum()), shared * a1, rel_tol=1e-9)
                assert math.isclose(float(gates[b, t, shared:].sum()), k * a2, rel_tol=1e-9)
        torch.testing.assert_close(gates[b, t], torch.tensor(s + r, dtype=torch.float64), atol=1e-9, rtol=0)
    assert ((gates != 0).sum(-1) == shared + k).all()
    assert math.isclose(
        float(aux), routed * math.fsum(a * b for a, b in zip(f, mean, strict=True)), abs_tol=1e-9
    )


@pytest.mark.parametrize(("shared", "k"), [(2, 2), (0, 3), (3, 0)])
def test_the_query_norm_router_is_the_formula(shared, k):
    q = normal(2, 7, 5, 4, seed=1)
    gates = route_heads_by_query_norm(q, shared=shared, k=k)
    for b, t in itertools.product(range(2), range(5)):
        norms = [math.sqrt(math.fsum(a * a for a in q[b, h, t].tolist())) for h in range(shared, 7)]
        top = sorted(range(7 - shared), key=lambda e: -norms[e])[:k]
        want = [1.0] * shared + [float(e in top) for e in range(7 - shared)]
        assert gates[b, t].tolist() == want


def test_query_norm_gates_are_0_or_1_and_scaling_a_token_changes_nothing():
    q = normal(2, 8, 31, 5, seed=2, dtype=torch.float32)
    gates = route_heads_by_query_norm(q, shared=4, k=2)
    assert gates.unique().tolist() == [0.0, 1.0]
    for c in (1e-6, 0.3, 1e6):
        scaled = q.clone()
        scaled[:, :, 7] *= c
        assert torch.equal(route_heads_by_query_norm(scaled, shared=4, k=2), gates)
    assert route_heads_by_query_norm(torch.zeros(1, 4, 3, 5), shared=1, k=2)[0].tolist() == [[1, 1, 1, 0]] * 3


def test_the_gradient_passes_the_choice_as_the_probability():
    q = normal(1, 6, 5, 4, seed=3).requires_grad_()
    c = normal(1, 5, 6, seed=4)
    (route_heads_by_query_norm(q, shared=2, k=2) * c).sum().backward()
    got, q.grad = q.grad, None
    z = q[:, 2:].norm(dim=-1).transpose(1, 2)
    p = (z / z.std(-1, keepdim=True)).softmax(-1)
    (p * c[..., 2:]).sum().backward()
    torch.testing.assert_close(got, q.grad, atol=1e-12, rtol=0)
    assert got[:, 2:].any()
    assert not got[:, :2].any()


def test_the_balance_loss_is_k_at_balance_and_more_when_collapsed():
    x = 20 * torch.eye(6).double()[None]  # token t prefers head t
    for k in (1, 2, 4):
        ring = torch.zeros(6, 6).double()
        for t, j in itertools.product(range(6), range(k)):
            ring[t, (t + j) % 6] = 1 - j / 100
        _, balanced = route_heads(x, ring, k=k)
        assert math.isclose(float(balanced), k, rel_tol=1e-9)
        collapsed = torch.zeros(6, 6).double()
        collapsed[:, :k] = 1.0
        _, worst = route_heads(x, collapsed, k=k)
        assert float(worst) > k + 0.5
        assert math.isclose(float(worst), 6.0, rel_tol=1e-6)  # E * k * (1 * 1 / k)
    _, uniform = route_heads(x, torch.zeros(6, 6).double(), k=3)  # uniform p, whatever is picked
    assert math.isclose(float(uniform), 3.0, rel_tol=1e-12)


def test_total_aux_is_a_weighted_mean_of_layers_with_routed_heads():
    layers = torch.nn.ModuleList(
        [made(32, 8, shared=2, k=4, seed=s) for s in (0, 1)] + [made(32, 8, shared=8, k=0)]
    )
    assert moh_total_aux(layers) == 0.0
    for layer in layers.train():
        layer(normal(2, 11, 32))
    want = 0.02 * (layers[0].aux_loss + layers[1].aux_loss) / 2
    assert layers[2].aux_loss is None
    torch.testing.assert_close(moh_total_aux(layers, 0.02), want)
    want.backward()
    assert layers[0].wg.weight.grad.any()
    layers.eval()[0](normal(2, 11, 32))
    assert layers[0].aux_loss is None


# -------------------------------------------------------------------------------------------------- the layer
def test_a_zero_router_with_all_heads_is_plain_attention():
    layer = made(32, 8, 4, shared=3, k=5, causal=True, rotary=True)
    plain = SelfAttention(32, 8, 4).double()
    plain.load_state_dict({n: t for n, t in layer.state_dict().items() if "proj" in n})
    for router in (layer.wg, layer.ws, layer.w0):
        torch.nn.init.zeros_(router.weight)
    x = normal(2, 37, 32)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=0)
    assert (layer.gates - 1).abs().max() < 1e-12


@pytest.mark.parametrize("router", ["linear", "query_norm"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_is_the_sum_over_heads(causal, router):
    layer = made(24, 6, 3, shared=2, k=2, causal=causal, router=router)
    x = normal(2, 13, 24)
    out = layer(x)
    q, k, v = (p(x).unflatten(2, (-1, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    want = torch.zeros_like(x)
    for h in range(6):
        logits = q[:, h] @ k[:, h // 2].transpose(1, 2) / 2
        if causal:
            logits = logits.masked_fill(torch.ones(13, 13).triu(1).bool(), -torch.inf)
        head = logits.softmax(-1) @ v[:, h // 2]
        want += layer.gates[..., h, None] * head @ layer.o_proj.weight[:, 4 * h : 4 * h + 4].T
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------- sparse execution
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n", "m", "heads", "kv"), [(131, 131, 4, 2), (7, 200, 3, 3), (1, 65, 2, 1), (129, 129, 6, 2)]
)
def test_chosen_queries_get_what_all_would(n, m, heads, kv, causal):
    q, k, v = normal(2, heads, n, 8, seed=1), normal(2, kv, m, 8, seed=2), normal(2, kv, m, 5, seed=3)
    chosen = torch.rand(2, heads, n, generator=torch.Generator().manual_seed(4)) < 0.4
    chosen[0, 0], chosen[1, 1] = True, False
    out = chosen_attention(q, k, v, chosen, is_causal=causal)
    want = fv.attention(q, k, v, is_causal=causal) * chosen.unsqueeze(-1)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    assert not chosen_attention(q, k, v, torch.zeros_like(chosen), is_causal=causal).any()


def test_sparse_equals_dense_with_its_gradients():
    x = normal(2, 131, 32)
    for causal, router, kv in ((True, "linear", 8), (False, "linear", 2), (True, "query_norm", 4)):
        layer = made(32, 8, kv, shared=2, k=3, causal=causal, router=router)
        outs, grads = [], []
        for sparse in (False, True):
            layer.sparse = sparse
            layer.zero_grad()
            out = layer(x)
            (out * normal(2, 131, 32, seed=9)).sum().backward()
            outs.append(out.detach())
            named = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
            grads.append(
                named if router == "linear" else {n: named[n] for n in ("k_proj.weight", "o_proj.weight")}
            )
        torch.testing.assert_close(outs[1], outs[0], atol=1e-12, rtol=0)
        for name, want in grads[0].items():
            torch.testing.assert_close(grads[1][name], want, atol=1e-10, rtol=0)
            assert want.any(), name


def test_a_key_counts_for_others_though_its_token_skipped_the_head():
    layer = made(16, 4, shared=0, k=1, sparse=True)
    x = normal(1, 20, 16)
    out = layer(x)
    skipped = int((layer.gates[0, :, 0] == 0).nonzero()[0])
    users = (layer.gates[0, :, 0] != 0).nonzero().flatten()
    changed = x.clone()
    changed[0, skipped] *= 1.0001  # the same heads, another key
    moved = layer(changed)
    assert layer.gates[0, skipped, 0] == 0
    assert len(users)
    assert ((moved - out)[0, users].abs().amax(-1) > 0).all()


def test_bfloat16_and_strides():
    layer = made(32, 8, shared=2, k=4, causal=True, sparse=True).float()
    x = normal(2, 67, 32, dtype=torch.float32)
    want = layer(x).detach()
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(layer(turned), want, atol=1e-6, rtol=0)
    low = layer.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert layer.gates.dtype == torch.float32
    close = (low.float() - want).abs().amax(-1) < 0.1 * want.abs().max()
    assert close.float().mean() > 0.8  # a choice may turn in low precision


# ------------------------------------------------------------------------------------------------------ states
@pytest.mark.parametrize("sparse", [False, True])
def test_decoding_equals_the_whole(sparse):
    layer = made(24, 6, 3, shared=1, k=2, causal=True, rotary=True, sparse=sparse)
    x = normal(2, 29, 24)
    full = layer(x)
    for cuts in ([0, 13, 29], [0, 1, 2, 28, 29], range(30)):
        state, parts = layer.initial_state(x), []
        for a, b in itertools.pairwise(cuts):
            out, state = layer(x[:, a:b], state=state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-10, rtol=0)
        assert state.position == 29


def test_in_a_language_model():
    torch.manual_seed(0)
    model = TransformerLM(
        11, 32, 2, lambda layer: MixtureOfHeads(32, 8, shared=2, k=4, causal=True, sparse=True)
    )
    ids = torch.arange(40).remainder(11)[None]
    loss = model(ids).square().mean() + moh_total_aux(model)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_errors_name_the_argument():
    x, wg = normal(1, 3, 4), normal(4, 5)
    for arguments, says in (
        ({"wg": wg, "k": 6}, r"k must lie in \[0, 5\], the routed heads; got 6"),
        ({"wg": wg.T, "k": 1}, r"wg must be \(4, 4\), got \(5, 4\)"),
        ({"wg": wg, "ws": normal(3, 2), "k": 1}, r"ws must be \(4, 2\), got \(3, 2\)"),
        ({"wg": wg, "k": 1, "shared": 2}, "2 shared heads need ws"),
        ({"wg": wg, "k": 1, "shared": 1}, "need w0"),
    ):
        with pytest.raises(ValueError, match=says):
            route_heads(x, **arguments)
    with pytest.raises(ValueError, match=r"shared \+ k must lie in \[0, 4\], both >= 0; got 2 and 3"):
        route_heads_by_query_norm(normal(1, 4, 3, 2), shared=2, k=3)
    q = normal(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"chosen must be bool \(1, 2, 5\), got torch.int64 \(1, 2, 5\)"):
        chosen_attention(q, q, q, torch.ones(1, 2, 5, dtype=torch.int64))
    for arguments, says in (
        ({"heads": 5, "shared": 1, "k": 1}, "dim must be a multiple of heads"),
        ({"heads": 4, "kv_heads": 3, "shared": 1, "k": 1}, "heads of kv_heads"),
        ({"heads": 4, "shared": 3, "k": 2}, r"shared \+ k must lie in \[1, 4\]"),
        (
            {"heads": 4, "shared": 1, "k": 1, "router": "x"},
            "router must be one of linear, query_norm, got 'x'",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            MixtureOfHeads(32, **arguments)
    layer = MixtureOfHeads(32, 4, shared=1, k=1)
    with pytest.raises(ValueError, match="only causal=True carries a state"):
        layer.initial_state(torch.randn(1, 3, 32))
