"""Routing attention against loops over its steps in float64, and what must hold of clusters and centroids."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import foveate as fv
from foveate.layers import RoutingAttention, RoutingSelector, routing_attention
from foveate.layers import routing as module


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def selector(heads, dim, clusters, seed=0, **settings):
    torch.manual_seed(seed)
    return RoutingSelector(heads, dim, clusters, **settings).double().eval()


# ------------------------------------------------------------------------------------------------ the oracle
def layer_norm(x):
    mean = math.fsum(x) / len(x)
    spread = math.sqrt(math.fsum((a - mean) ** 2 for a in x) / len(x) + 1e-5)
    return [(a - mean) / spread for a in x]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def oracle_sets(q, k, means, w, assignment, causal, see_self, shared, real):
    """For each cluster the list of (query, keys that it sees); q, k normalised lists, of one batch row and head."""
    n, found = len(q), []
    if assignment == "nearest":
        own = [max(range(len(means)), key=lambda c, i=i: (dot(means[c], q[i]), -c)) for i in range(n)]
        for i in range(n):
            if real[i]:
                mates = [j for j in range(i + 1) if own[j] == own[i] and real[j] and (see_self or j != i)]
                found.append([(i, mates[-w:] or [i])])
        return found

    def best(x, mu):
        order = sorted((i for i in range(n) if real[i]), key=lambda i: (-dot(mu, x[i]), i))
        return sorted(order[:w])

    for mu in means:
        queries, keys = best(q, mu), best(q if shared else k, mu)
        cluster = []
        for i in queries:
            seen = [j for j in keys if j <= i or not causal]
            seen = seen if see_self else [j for j in seen if j != i] or seen
            cluster.append((i, seen))
        found.append(cluster)
    return found


def oracle(q, k, v, means, w, assignment="balanced", causal=True, see_self=False, shared=True, real=None):
    n, dim = len(q), len(q[0])
    real = [True] * n if real is None else real
    q, k = [layer_norm(x) for x in q], [layer_norm(x) for x in (q if shared else k)]
    outs = [[] for _ in range(n)]
    for cluster in oracle_sets(q, k, means, w, assignment, causal, see_self, shared, real):
        for i, seen in cluster:
            if seen:
                weights = [math.exp(dot(q[i], k[j]) / math.sqrt(dim)) for j in seen]
                total = math.fsum(weights)
                outs[i].append(
                    [
                        math.fsum(p * v[j][d] for p, j in zip(weights, seen, strict=True)) / total
                        for d in range(len(v[0]))
                    ]
                )
    mean = [[math.fsum(x) / len(o) for x in zip(*o, strict=True)] if o else [0.0] * len(v[0]) for o in outs]
    return torch.tensor(mean, dtype=torch.float64)


CASES = [
    {},
    {"see_self": True},
    {"assignment": "nearest"},
    {"assignment": "nearest", "see_self": True},
    {"shared": False, "see_self": True},
    {"shared": False, "see_self": True, "causal": False},
    {"causal": False},
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("n", "clusters", "w"), [(31, 5, None), (31, 4, 3), (13, 3, 1), (7, 2, 50), (67, 2, 20)]
)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "paper")
def test_equals_the_oracle(case, n, clusters, w, masked):
    q, k, v = (normal(2, 2, n, 6, seed=i) for i in range(3))
    see_self, shared = case.get("see_self", False), case.get("shared", True)
    router = selector(2, 6, clusters, shared_qk=shared, see_self=see_self)
    mask = (torch.rand(2, n, generator=torch.Generator().manual_seed(9)) < 0.7) if masked else None
    causal, assignment = case.get("causal", True), case.get("assignment", "balanced")
    out = routing_attention(
        q, None if shared else k, v, router, window=w, causal=causal, assignment=assignment, mask=mask
    )
    for b, h in ((0, 1), (1, 0)):
        want = oracle(
            *(t[b, h].tolist() for t in (q, k, v)), router.means[h].tolist(), w or math.ceil(n / clusters),
            assignment, causal, see_self, shared, None if mask is None else mask[b].tolist(),
        )  # fmt: skip
        torch.testing.assert_close(out[b, h], want, atol=1e-12, rtol=0)


def test_some_heads_at_a_time_give_the_same(monkeypatch):
    q, router = normal(2, 4, 50, 8), selector(4, 8, 5)
    whole = router(q, q), router(q, q, None, "nearest")
    router.train().update(q)
    moved = router.means.clone()
    monkeypatch.setattr(module, "CHUNK", 1)
    router = selector(4, 8, 5)
    for one, other in zip(whole, (router(q, q), router(q, q, None, "nearest")), strict=True):
        assert torch.equal(one.q_idx, other.q_idx)
        assert torch.equal(one.k_idx, other.k_idx)
    router.update(q)
    assert torch.equal(router.means, moved)


# ------------------------------------------------------------------------------------------------ invariants
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("engine", ["native", "reference"])
def test_one_cluster_of_all_is_full_attention(causal, engine):
    q, k, v = (normal(2, 3, 131, 16, seed=i).float() for i in range(3))
    router = selector(3, 16, 1, shared_qk=False).float()
    out = routing_attention(q, k, v, router, window=131, causal=causal, engine=engine)
    want = fv.attention(module.normalised(q), module.normalised(k), v, is_causal=causal)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    shared = selector(3, 16, 1, see_self=True).float()
    out = routing_attention(q, None, v, shared, window=131, causal=causal, engine=engine)
    want = fv.attention(module.normalised(q), module.normalised(q), v, is_causal=causal)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_balanced_clusters_have_w_distinct_members_in_order(shared, ties):
    q, k = normal(2, 3, 97, 8, seed=1), normal(2, 3, 97, 8, seed=2)
    if ties:  # a few kinds of tokens, as in a first layer
        q, k = (x[:, :, torch.arange(97) % 5] for x in (q, k))
    groups = selector(3, 8, 7, shared_qk=shared)(q, k, window=11)
    for idx in (groups.q_idx, groups.k_idx):
        assert idx.shape == (2, 3, 7, 11)
        assert (idx.diff(dim=3) > 0).all()
        assert idx.min() >= 0
        assert idx.max() < 97
    seen = groups.pairs()
    later = groups.k_idx.unsqueeze(3) > groups.q_idx.unsqueeze(4)
    assert not (seen & later).any()
    assert not groups.to_dense(97).triu(1).any()


def test_equal_tokens_are_taken_in_order():
    q = torch.ones(1, 1, 20, 4, dtype=torch.float64).cumsum(3)
    assert selector(1, 4, 3)(q, q, window=6).q_idx.unique().tolist() == list(range(6))


def planted(seed=0, n=96, kinds=4, dim=32):
    """Tokens of well separated kinds in random order, (1, 1, n, dim), their kinds (n,) and the kinds' directions."""
    g = torch.Generator().manual_seed(seed)
    means = module.normalised(torch.linalg.qr(torch.randn(dim, kinds, generator=g, dtype=torch.float64)).Q.T)
    kind = torch.arange(n)[torch.randperm(n, generator=g)] % kinds
    x = means[kind] + 0.05 * torch.randn(n, dim, generator=g, dtype=torch.float64)
    return x[None, None], kind, means


@pytest.mark.parametrize("assignment", ["balanced", "nearest"])
def test_planted_clusters_keep_to_themselves(assignment):
    x, kind, means = planted()
    router = selector(1, 32, 4)
    dense = router(x, x, 40, assignment).to_dense(96)[0, 0]
    assert (dense & (kind[:, None] != kind)).any()  # random centroids mix them
    router.means.copy_(means[None])
    dense = router(x, x, None, assignment).to_dense(96)[0, 0]
    same = kind[:, None] == kind
    assert not (dense & ~same).any()
    assert torch.equal(dense.tril(-1), same.tril(-1))  # w = 24 holds a whole kind


def test_centroids_move_by_one_minus_decay():
    x, kind, means = planted()
    router = selector(1, 32, 4, decay=0.9)
    start = module.normalised(means + 0.1 * normal(4, 32, seed=3))
    router.means.copy_(start[None])
    router.update(x)
    mean = torch.stack([module.normalised(x)[0, 0, kind == c].mean(0) for c in range(4)])
    torch.testing.assert_close(
        router.means[0], module.normalised(0.9 * start + 0.1 * mean), atol=1e-12, rtol=0
    )
    # decay 1 keeps, decay 0 jumps, two projections share the step
    for decay, want in ((1.0, start), (0.0, mean)):
        router = selector(1, 32, 4, decay=decay)
        router.means.copy_(start[None])
        router.update(x)
        torch.testing.assert_close(router.means[0], module.normalised(want), atol=1e-4, rtol=0)
    both = selector(1, 32, 4, decay=0.9, shared_qk=False)
    both.means.copy_(start[None])
    both.update(x, 2 * x[:, :, :50])
    other = torch.stack([module.normalised(x)[0, 0, :50][kind[:50] == c].mean(0) for c in range(4)])
    want = module.normalised(0.9 * start + 0.05 * mean + 0.05 * other)
    torch.testing.assert_close(both.means[0], want, atol=1e-3, rtol=0)


def test_a_centroid_without_tokens_stays_and_padding_does_not_count():
    x, kind, means = planted()
    router = selector(1, 32, 5, decay=0.5)
    router.means.copy_(torch.cat([means, -means.sum(0, keepdim=True)])[None])
    router.means.copy_(module.normalised(router.means))
    before = router.means.clone()
    router.update(x, mask=(kind < 2)[None])
    moved = (router.means - before).abs().amax(-1)[0] > 1e-3
    assert moved.tolist() == [True, True, False, False, False]
    padded = torch.where((kind < 2)[:, None], x, 50.0 * normal(96, 32, seed=5))
    again = selector(1, 32, 5, decay=0.5)
    again.means.copy_(before)
    again.update(padded, mask=(kind < 2)[None])
    assert torch.equal(again.means, router.means)
    jump = selector(1, 32, 5, decay=0.0)
    jump.means.copy_(before)
    jump.update(x)
    torch.testing.assert_close(jump.means[0, 4], before[0, 4], atol=1e-5, rtol=0)


def test_the_centroids_find_planted_clusters():
    router = selector(1, 32, 4, decay=0.8)
    means = planted()[2]
    router.means.copy_(module.normalised(means + 0.6 * normal(4, 32, seed=1))[None])
    for seed in range(30):
        router.update(planted(0)[0] + 0.05 * normal(1, 1, 96, 32, seed=seed))
    assert ((router.means[0] @ means.T / 32).diagonal() > 0.98).all()


def test_only_train_mode_moves_the_centroids():
    torch.manual_seed(0)
    layer = RoutingAttention(32, 2, 2, local_window=8, n_clusters=4, decay=0.9)
    x = torch.randn(2, 40, 32, requires_grad=True)
    before = layer.selector.means.clone()
    layer.eval()(x)
    assert torch.equal(layer.selector.means, before)
    out = layer.train()(x)
    assert (layer.selector.means != before).any()
    out.square().sum().backward()
    assert not layer.selector.means.requires_grad
    assert "selector.means" in layer.state_dict()
    assert all(p.grad.any() for p in layer.parameters())
    assert x.grad.any()


def test_nearest_is_causal_and_balanced_leaks_its_choice():
    torch.manual_seed(0)
    leaks = 0
    for assignment in ("nearest", "balanced"):
        layer = RoutingAttention(32, 0, 2, n_clusters=4, window=6, assignment=assignment).double().eval()
        x = normal(1, 60, 32)
        full = layer(x)
        for t in (1, 7, 30, 59):
            other = torch.cat([x[:, :t], normal(1, 60 - t, 32, seed=t)], 1)
            moved = (layer(other)[:, :t] - full[:, :t]).abs().max()
            if assignment == "nearest":
                assert moved < 1e-12
                torch.testing.assert_close(layer(x[:, :t]), full[:, :t], atol=1e-12, rtol=0)
            else:
                leaks += int(moved > 1e-3)
    assert leaks >= 2  # the choice depends on later tokens


def test_values_of_later_tokens_never_leak():
    """Under the balanced assignment the choice looks ahead; what is read does not."""
    q, v = normal(1, 2, 60, 8), normal(1, 2, 60, 8, seed=1)
    router = selector(2, 8, 5)
    full = routing_attention(q, None, v, router)
    v[:, :, 30:] = torch.nan
    assert torch.equal(routing_attention(q, None, v, router)[:, :, :30], full[:, :, :30])


@pytest.mark.parametrize("causal", [True, False])
def test_padding_at_the_end_changes_nothing(causal):
    torch.manual_seed(0)
    layer = RoutingAttention(32, 2, 2, local_window=8, n_clusters=4, window=5, causal=causal).double().eval()
    x = normal(2, 50, 32)
    mask = torch.arange(50) < torch.tensor([[50], [37]])
    out = layer(x, mask=mask)
    torch.testing.assert_close(out[:1], layer(x[:1]), atol=1e-12, rtol=0)
    torch.testing.assert_close(out[1:, :37], layer(x[1:, :37]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("assignment", ["balanced", "nearest"])
def test_gradients(assignment):
    q, v = normal(1, 2, 9, 4).requires_grad_(), normal(1, 2, 9, 3, seed=1).requires_grad_()
    router = selector(2, 4, 3)
    run = lambda q, v: routing_attention(q, None, v, router, assignment=assignment)  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, v))


def test_bfloat16_strides_and_counts():
    q, v = normal(2, 2, 131, 16).float(), normal(2, 2, 131, 16, seed=1).float()
    router = selector(2, 16, 11).float()
    want = routing_attention(q, None, v, router)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, v)]
    torch.testing.assert_close(routing_attention(turned[0], None, turned[1], router), want)
    low = routing_attention(q, None, v.bfloat16(), router)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, atol=0.05, rtol=0)
    assert router(q, q).computed == 2 * 2 * 11 * 12 * 12


def test_local_heads_are_a_window():
    torch.manual_seed(0)
    layer = RoutingAttention(32, 4, 0, local_window=7).double()
    x, angles = normal(1, 40, 32), torch.arange(40)[:, None] / torch.tensor([1.0, 10.0, 100.0, 1000.0])
    q, k, v = (p(x).unflatten(2, (4, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = module.rotated(q, angles), module.rotated(k, angles)
    seen = torch.ones(40, 40, dtype=torch.bool).tril() & ~torch.ones(40, 40, dtype=torch.bool).tril(-7)
    want = layer.o_proj(fv.attention(q, k, v, seen).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, angles), want, atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------------------------- errors
def test_errors_name_the_argument():
    q, router = normal(1, 2, 9, 4), selector(2, 4, 3)
    for call, says in (
        (lambda: routing_attention(q, q, q, router), "k must be None exactly when the selector shares"),
        (lambda: routing_attention(q, None, q, selector(2, 4, 3, shared_qk=False)), "k must be None exactly"),
        (
            lambda: routing_attention(q, None, q[:, :1], router),
            r"heads are not grouped\); got \(1, 1, 9, 4\)",
        ),
        (lambda: router(q[..., :3], q), r"q must be \(B, 2 heads, N, 4\) like q, got \(1, 2, 9, 3\)"),
        (lambda: router(q, q[:, :, 1:]), "k must be"),
        (lambda: router(q, q, 0), "window must be an int >= 1 or None, got 0"),
        (lambda: router(q, q, 3, "best"), "assignment must be one of balanced, nearest, got 'best'"),
        (lambda: router(q, q, 3, "nearest", causal=False), "nearest is for causal attention .* causal=False"),
        (lambda: router(q, q, mask=torch.ones(1, 8, dtype=torch.bool)), r"mask must be bool \(1, 9\)"),
        (lambda: RoutingSelector(0, 4, 3), "heads must be an int >= 1, got 0"),
        (lambda: RoutingSelector(1, 4, 3, decay=1.5), r"decay must lie in \[0, 1\], got 1.5"),
        (
            lambda: RoutingSelector(1, 4, 3, shared_qk=False, see_self=False),
            "see_self=False needs shared_qk=True",
        ),
        (lambda: RoutingAttention(32, 2, 1), "add up to a divisor of d_model; got 2, 1 and 32"),
        (lambda: RoutingAttention(32, 2, 2, local_window=0), "local_window must be an int >= 1, got 0"),
        (
            lambda: RoutingAttention(32, 2, 2, causal=False, assignment="nearest"),
            "got 'nearest' with causal=False",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_groups_of_the_nearest_form_hold_every_token_once():
    q = normal(2, 3, 75, 8)
    for w in (1, 4, 75):
        groups = selector(3, 8, 6)(q, q, w, "nearest")
        for b, h in itertools.product(range(2), range(3)):
            at = groups.q_idx[b, h].flatten()
            assert sorted(at[at >= 0].tolist()) == list(range(75))
        assert groups.to_dense(75).sum(-1).max() <= w
