"""What each policy keeps, against brute force over one row and head at a time."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.cache import H2O, Budget, Geometry, LayerCache, RandomKeep, SnapKV, Streaming, load, make
from foveate.cache.budget import share, top
from foveate.cache.view import received

GEOMETRY = Geometry(scale=0.6)


def case(batch=2, heads=4, hkv=2, n=23, dim=5, pads=(0, 6), seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g) * 2
    k = torch.randn(batch, hkv, n, dim, generator=g)
    v = torch.randn(batch, hkv, n, 3, generator=g)
    real = torch.arange(n)[None] >= torch.tensor(pads)[:, None]
    return q, k, v, real


def softmax_rows(q, k, real, scale=0.6):
    """(B, H, N, N) float64 causal softmax among real tokens; rows of padding 0."""
    batch, heads, n, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, heads, n, n, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                if not real[b, i]:
                    continue
                js = [j for j in range(i + 1) if real[b, j]]
                x = torch.tensor(
                    [float(q[b, h, i].double() @ k[b, h // group, j].double()) * scale for j in js]
                )
                out[b, h, i, js] = torch.softmax(x.double(), 0)
    return out


def prefilled(policy, amount, *, per="head", sinks=2, recent=3, evict="prefill", seed=0, **sizes):
    q, k, v, real = case(seed=seed, **sizes)
    cache = LayerCache(policy, Budget(amount, per, sinks, recent), evict, 0)
    cache.prefill(q, k, v, q[..., :3], real, GEOMETRY)
    return cache, q, k, v, real


def kept(cache):
    store = cache.store
    return [
        [store.tokens(b * store.heads + h).tolist() for h in range(store.heads)] for b in range(store.batch)
    ]


def best(scores, real, amount, sinks, recent):
    """Per row and head: sinks, recent, then the best scores up to the amount."""
    batch, heads, n = scores.shape
    out = []
    for b in range(batch):
        there = [j for j in range(n) if real[b, j]]
        row = []
        for h in range(heads):
            sure = set(there[:sinks]) | (set(there[-recent:]) if recent else set())
            rest = sorted((j for j in there if j not in sure), key=lambda j: -scores[b, h, j])
            row.append(sorted(sure | set(rest[: max(0, amount - len(sure))])))
        out.append(row)
    return out


def test_streaming_keeps_the_first_and_the_last_real_tokens():
    cache, *_ = prefilled(Streaming(), 9, recent=1, evict=1)
    assert kept(cache) == [
        [[0, 1, *range(16, 23)]] * 2,
        [[6, 7, *range(16, 23)]] * 2,  # sinks are tokens, not padding
    ]


def test_streaming_slides_one_token_at_a_time():
    cache, q, k, v, _ = prefilled(Streaming(), 9, recent=1, evict=1)
    for step in range(5):
        one = (slice(None), slice(None), slice(step, step + 1))
        cache.extend(q[one], k[one], v[one], torch.ones(2, 1, dtype=torch.bool), GEOMETRY, lambda *_: None)
        end = 23 + step + 1
        assert kept(cache) == [[[0, 1, *range(end - 7, end)]] * 2, [[6, 7, *range(end - 7, end)]] * 2]
    assert cache.store is not None
    assert int(cache.store.capacity.max()) == 10  # no room is taken beyond the budget and the new token


def test_sinks_of_a_prompt_shorter_than_them_are_the_first_tokens_all_the_same():
    cache, q, k, v, _ = prefilled(Streaming(), 9, n=23, sinks=3, recent=1, evict=1, pads=(22, 22))
    for step in range(12):
        one = (slice(None), slice(None), slice(step, step + 1))
        cache.extend(q[one], k[one], v[one], torch.ones(2, 1, dtype=torch.bool), GEOMETRY, lambda *_: None)
    assert kept(cache) == [[[22, 23, 24, *range(29, 35)]] * 2] * 2


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("kernel", [1, 5])
def test_snapkv_scores_are_pooled_votes_of_the_last_queries(pooling, kernel):
    window = 4
    cache, q, k, _, real = prefilled(SnapKV(window, kernel, pooling), 11)
    rows = softmax_rows(q, k, real)
    batch, _, n, _ = rows.shape
    votes = rows[:, :, -window:].mean(2).view(batch, 2, 2, n).mean(2)  # (B, Hkv, N): mean over the group
    scores = torch.zeros_like(votes)
    half = kernel // 2
    for b in range(batch):
        first = int(real[b].to(torch.int8).argmax())
        for j in range(first, n):
            near = [votes[b, :, i] for i in range(max(first, j - half), min(n, j + half + 1))]
            near = torch.stack(near)
            scores[b, :, j] = near.amax(0) if pooling == "max" else near.sum(0) / kernel
    assert kept(cache) == best(scores, real, 11, 2, 3)


def test_h2o_keeps_what_received_most_from_all_queries():
    cache, q, k, _, real = prefilled(H2O(), 11)
    rows = softmax_rows(q, k, real)
    scores = rows.sum(2).view(2, 2, 2, 23).mean(2)
    torch.testing.assert_close(received(q, k, real, 0.6).double(), scores, atol=1e-5, rtol=1e-5)
    assert kept(cache) == best(scores, real, 11, 2, 3)


def test_h2o_goes_on_adding_while_it_decodes():
    """Masses after three steps equal a loop that only knows the kept tokens; the least of them goes."""
    cache, q, k, _, real = prefilled(H2O(), 11, evict=1)
    rows = softmax_rows(q, k, real).sum(2).view(2, 2, 2, 23).mean(2)
    held = [
        [{j: [k[b, h, j].double(), float(rows[b, h, j])] for j in kept(cache)[b][h]} for h in range(2)]
        for b in range(2)
    ]
    g = torch.Generator().manual_seed(9)
    for step in range(10):
        new_q, new_k = torch.randn(2, 4, 1, 5, generator=g) * 2, torch.randn(2, 2, 1, 5, generator=g)
        cache.extend(
            new_q, new_k, new_k[..., :3], torch.ones(2, 1, dtype=torch.bool), GEOMETRY, lambda *_: None
        )
        at = 23 + step
        for b in range(2):
            for h in range(2):
                mine = held[b][h]
                mine[at] = [new_k[b, h, 0].double(), 0.0]
                js = sorted(mine)
                for head in (2 * h, 2 * h + 1):
                    x = torch.stack([new_q[b, head, 0].double() @ mine[j][0] * 0.6 for j in js])
                    for j, p in zip(js, torch.softmax(x, 0), strict=True):
                        mine[j][1] += float(p) / 2
                sure = set(range(at - 2, at + 1)) | {0 + 6 * b, 1 + 6 * b}
                victim = min((j for j in js if j not in sure), key=lambda j: mine[j][1])
                del mine[victim]
        assert kept(cache) == [[sorted(held[b][h]) for h in range(2)] for b in range(2)]


def test_random_is_fair_repeatable_and_steady():
    cache, *_ = prefilled(RandomKeep(3), 11)
    again, *_ = prefilled(RandomKeep(3), 11)
    other, *_ = prefilled(RandomKeep(4), 11)
    assert kept(cache) == kept(again)
    assert kept(cache) != kept(other)
    chosen = torch.zeros(40)
    for seed in range(200):
        one, *_ = prefilled(RandomKeep(seed), 12, n=40, pads=(0, 0), sinks=0, recent=1)
        for row in kept(one):
            for head in row:
                chosen[head] += 1
    share_of = chosen[:39] / (200 * 4)
    assert abs(float(share_of.mean()) - 11 / 39) < 1e-6
    assert float(share_of.std()) < 0.03  # each about sqrt(p (1 - p) / 800) = 0.016


def test_fewer_tokens_than_the_budget_stay_all():
    for policy in (Streaming(), SnapKV(4, 3), H2O(), RandomKeep()):
        cache, *_ = prefilled(policy, 64)
        assert kept(cache) == [[list(range(23))] * 2, [list(range(6, 23))] * 2]


def test_a_fraction_counts_real_tokens_and_grows_with_them():
    cache, q, k, v, _ = prefilled(SnapKV(4, 3), 0.5, evict=1)
    assert [[len(h) for h in row] for row in kept(cache)] == [[12, 12], [9, 9]]  # of 23 and of 17
    one = (slice(None), slice(None), slice(0, 1))
    for _ in range(4):
        cache.extend(q[one], k[one], v[one], torch.ones(2, 1, dtype=torch.bool), GEOMETRY, lambda *_: None)
    assert [[len(h) for h in row] for row in kept(cache)] == [[14, 14], [11, 11]]  # of 27 and of 21


def test_padding_in_later_calls_is_not_stored_and_not_counted():
    """A second turn of a batch: one row gets three tokens, the other two and a hole."""
    cache, q, k, v, _ = prefilled(SnapKV(4, 3), 0.5, pads=(0, 0), n=20)
    more = (slice(None), slice(None), slice(0, 3))
    real = torch.tensor([[True, True, True], [False, True, True]])
    cache.extend(
        q[more],
        k[more],
        v[more],
        real,
        GEOMETRY,
        lambda store, a, b: store.padded("positions")[:, :, None] <= torch.arange(20 + a, 20 + b)[:, None],
    )
    assert cache.real.tolist() == [23, 22]
    assert [[len(h) for h in row] for row in kept(cache)] == [[12, 12], [11, 11]]
    assert all(20 not in head for head in kept(cache)[1])


def test_heads_share_a_layer_by_score_and_none_falls_below_the_floor():
    q, k, v, real = case(n=40, pads=(0, 0))
    q[:, :2] = 1000 * q[:, :1, -1:]  # all votes of the first KV head go to one key or two
    q[:, 2:] *= 0.05
    cache = LayerCache(SnapKV(8, 1), Budget(16, "layer", 2, 4, floor=0.5), "prefill", 0)
    cache.prefill(q, k, v, v.repeat(1, 2, 1, 1), real, GEOMETRY)
    counts = [[len(h) for h in row] for row in kept(cache)]
    assert all(sum(row) == 32 and min(row) >= 8 for row in counts)
    assert counts == [[8, 24], [8, 24]]


def test_sharing_equals_brute_force():
    g = torch.Generator().manual_seed(2)
    for _ in range(20):
        scores = torch.rand(1, 3, 9, generator=g)
        valid = torch.rand(1, 3, 9, generator=g) < 0.8
        sure = valid & (torch.rand(1, 3, 9, generator=g) < 0.2)
        got = share(scores, sure, valid, torch.tensor([12]), torch.tensor([2]))[0]
        wanted = {(h, s) for h in range(3) for s in range(9) if sure[0, h, s]}
        for h in range(3):  # the floor first
            mine = [(h, s) for s in range(9) if sure[0, h, s]]
            rest = sorted(
                ((h, s) for s in range(9) if valid[0, h, s] and not sure[0, h, s]),
                key=lambda x: -scores[0, x[0], x[1]],
            )
            wanted |= set(rest[: max(0, 2 - len(mine))])
        rest = [(h, s) for h in range(3) for s in range(9) if valid[0, h, s] and (h, s) not in wanted]
        rest.sort(key=lambda x: -scores[0, x[0], x[1]])
        wanted |= set(rest[: max(0, 12 - len(wanted))])
        assert {(int(h), int(s)) for h, s in got.nonzero()} == wanted


def test_nan_scores_are_the_first_to_go():
    scores = torch.tensor([[[math.nan, 1.0, 2.0, -math.inf]]])
    true = torch.ones(1, 1, 4, dtype=torch.bool)
    assert top(scores, ~true, true, torch.tensor([2]))[0, 0].tolist() == [False, True, True, False]


def test_append_only_never_takes_back_a_decision():
    q, k, v, real = case(n=60, pads=(0, 0))
    cache = LayerCache(SnapKV(8, 3), Budget(0.5, "head", 2, 8), "append", 0)
    cache.prefill(q, k, v, v.repeat(1, 2, 1, 1), real, GEOMETRY)
    g = torch.Generator().manual_seed(3)
    decided = kept(cache)
    for step in range(100):
        end = 60 + step + 1
        a, b = torch.randn(2, 4, 1, 5, generator=g), torch.randn(2, 2, 1, 5, generator=g)
        cache.extend(a, b, b[..., :3], torch.ones(2, 1, dtype=torch.bool), GEOMETRY, lambda *_: None)
        now = kept(cache)
        for r in range(2):
            for h in range(2):
                old = set(decided[r][h])
                frontier = max(x for x in range(end) if x < end)  # everything decided before stays decided
                settled = {j for j in old if j < 60 + (step // 32) * 32 - 8}
                assert settled <= set(now[r][h]), frontier
        decided = now
    sizes = [len(h) for row in now for h in row]
    assert all(abs(n - 80) <= 45 for n in sizes)  # about half of 160, and what is not decided yet
    assert min(sizes) < 110


@pytest.mark.parametrize("policy", [Streaming(), SnapKV(4, 3, "mean"), H2O(), RandomKeep(5)])
def test_policies_survive_saving(policy, tmp_path):
    policy.save(tmp_path / "p")
    assert load(tmp_path / "p") == policy
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == ["policy.json"]


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match=r"unknown policy 'lru'; accepted: .*h2o.*streaming"):
        make("lru")
    with pytest.raises(ValueError, match=r"has no setting depth; accepted: window, kernel, pooling"):
        make("snapkv", {"depth": 3})
    for kwargs, text in (
        ({"amount": 0}, "budget in tokens must be >= 1, got 0"),
        ({"amount": 1.5}, r"must lie in \(0, 1\], got 1.5"),
        ({"amount": "many"}, "tokens .int. or a fraction .float., got 'many'"),
        ({"amount": 10, "sinks": 4, "recent": 8}, "less than sinks"),
        ({"amount": 64, "per": "row"}, "per must be one of head, layer, model; got 'row'"),
        ({"amount": 64, "sinks": -1}, "sinks must be >= 0, got -1"),
        ({"amount": 64, "floor": 2.0}, "floor must lie in"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            Budget(**kwargs)
    with pytest.raises(ValueError, match="kernel must be odd"):
        SnapKV(kernel=4)
