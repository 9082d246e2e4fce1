"""Task-KV: the split of the heads, and what each kind keeps."""

from __future__ import annotations

import pytest
import torch

from foveate.cache import Budget, Geometry, LayerCache, TaskKV, load, semantic_distances

POLICY = TaskKV(obs_window=5, n_sink=2, n_recent=4, n_mid=3, mode="fraction", head_fraction=0.5)
W_O = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(11))  # (H, Dv, d_model)


def prefilled(policy=POLICY, n=31, pads=(0, 8), w_o=W_O, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, n, 5, generator=g)
    k, v = torch.randn(2, 2, n, 5, generator=g), torch.randn(2, 2, n, 3, generator=g)
    out = torch.randn(2, 4, n, 3, generator=g)
    real = torch.arange(n)[None] >= torch.tensor(pads)[:, None]
    cache = LayerCache(policy, Budget(1.0), 1, 0)
    cache.prefill(q, k, v, out, real, Geometry(0.7, out_weight=w_o))
    return cache, q, k, v, out


def sets(cache):
    store = cache.store
    return [[store.tokens(b * 2 + h).tolist() for h in range(2)] for b in range(2)]


def far_by_loop(out, window=5):
    """(B, Hkv) farthest first, from the definition."""
    rows = []
    for b in range(2):
        s = [out[b, h, -window:].mean(0).double() @ W_O[h].double() for h in range(4)]
        centre = sum(s) / 4
        d = [float((x - centre).norm()) for x in s]
        rows.append([max(d[0], d[1]), max(d[2], d[3])])
    return rows


def test_one_head_keeps_everything_the_other_its_cut():
    cache, q, k, _, out = prefilled()
    far = far_by_loop(out)
    for b, pad in enumerate((0, 8)):
        full = 0 if far[b][0] >= far[b][1] else 1
        there = list(range(pad, 31))
        assert sets(cache)[b][full] == there
        other = 1 - full
        mass = torch.zeros(31, dtype=torch.float64)
        for h in (2 * other, 2 * other + 1):
            for i in range(26, 31):
                x = torch.tensor(
                    [float(q[b, h, i].double() @ k[b, other, j].double()) * 0.7 for j in range(pad, i + 1)]
                )
                mass[pad : i + 1] += torch.softmax(x.double(), 0)
        between = [j for j in there if j >= pad + 2 and j <= 26]
        middle = sorted(between, key=lambda j: -mass[j])[:3]
        assert sets(cache)[b][other] == sorted([pad, pad + 1, *middle, 27, 28, 29, 30])


def test_recent_tokens_slide_sinks_and_middle_stay():
    cache, q, k, v, _ = prefilled()
    before = sets(cache)
    for step in range(6):
        one = (slice(None), slice(None), slice(step, step + 1))
        cache.extend(
            q[one], k[one], v[one], torch.ones(2, 1, dtype=torch.bool), Geometry(0.7), lambda *_: None
        )
        end = 31 + step
        for b in range(2):
            for h in range(2):
                now, then = sets(cache)[b][h], before[b][h]
                if len(then) > 9:
                    assert now == [*then, *range(31, end + 1)]
                else:
                    assert now == [*then[:5], *range(end - 3, end + 1)]


def test_every_head_whole_is_the_full_cache():
    """head_fraction = 1: after any number of steps the output is that of attention to everything."""
    policy = TaskKV(obs_window=5, n_sink=2, n_recent=4, n_mid=3, mode="fraction", head_fraction=1.0)
    cache, q, k, v, _ = prefilled(policy, pads=(0, 0))
    keys, values = k, v
    for step in range(9):
        one = (slice(None), slice(None), slice(step, step + 1))
        keys, values = torch.cat([keys, k[one]], 2), torch.cat([values, v[one]], 2)
        out = cache.extend(
            q[one], k[one], v[one], torch.ones(2, 1, dtype=torch.bool), Geometry(0.7), lambda *_: None
        )
        rows = q[one] @ keys.repeat_interleave(2, 1).transpose(2, 3) * 0.7
        wanted = torch.softmax(rows, -1) @ values.repeat_interleave(2, 1)
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_the_plan_follows_the_question():
    """The same prompt with other outputs of its last tokens gives another split; earlier outputs do not matter."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 31, 5, generator=g) for heads in (4, 2, 2))
    plans = []
    for loud, where in ((0, slice(26, 31)), (3, slice(26, 31)), (3, slice(0, 20))):
        out = torch.zeros(1, 4, 31, 3)
        out[:, 0, 26:] = 1.0
        out[:, loud, where] = 10.0
        cache = LayerCache(POLICY, Budget(1.0), 1, 0)
        cache.prefill(q, k, v, out, torch.ones(1, 31, dtype=torch.bool), Geometry(0.7, out_weight=W_O))
        plans.append([n == 31 for n in cache.store.count.tolist()])
    assert plans == [[True, False], [False, True], [True, False]]


def test_middle_sets_are_one_set_for_all_cut_heads():
    policy = TaskKV(obs_window=5, n_sink=2, n_recent=4, n_mid=3, mode="fraction", head_fraction=0.0)
    cache, *_ = prefilled(policy)
    for row in sets(cache):
        assert row[0] == row[1]
        assert len(row[0]) == 9


def test_a_prompt_shorter_than_the_cut_stays_whole():
    cache, *_ = prefilled(n=7, pads=(0, 2))
    assert sets(cache) == [[list(range(7))] * 2, [list(range(2, 7))] * 2]


def test_distances_ignore_a_common_vector_and_scale_with_the_heads():
    g = torch.Generator().manual_seed(0)
    out = torch.randn(2, 4, 6, 3, generator=g)
    base = semantic_distances(out, W_O)
    eye = torch.eye(3).expand(4, 3, 3)
    shifted = semantic_distances(out + torch.randn(3, generator=g), eye)
    torch.testing.assert_close(shifted, semantic_distances(out, eye), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(semantic_distances(3 * out, W_O), 3 * base, atol=1e-5, rtol=1e-5)
    for mode in ("cumulative", "fraction"):
        policy = TaskKV(mode=mode)
        assert torch.equal(policy.split(base), policy.split(5 * base))


def test_the_projection_is_part_of_the_distance():
    """Heads with equal outputs and different slices of W_O lie apart; raw outputs would say 0."""
    out = torch.ones(1, 4, 2, 3)
    assert semantic_distances(out, W_O).min() > 0.1
    assert semantic_distances(out, torch.ones(4, 3, 7)).abs().max() == 0


@pytest.mark.parametrize("mode", ["cumulative", "fraction", "gap"])
def test_equal_heads_fall_back_to_the_fraction(mode):
    policy = TaskKV(mode=mode, head_fraction=0.25)
    assert policy.split(torch.zeros(2, 4)).sum(1).tolist() == [1, 1]


def test_the_three_separators():
    d = torch.tensor([[1.0, 9.0, 2.0, 8.0]])
    assert TaskKV(beta=0.4).split(d).tolist() == [[False, True, False, False]]  # 9 of 20
    assert TaskKV(beta=0.5).split(d).tolist() == [[False, True, False, True]]  # 9 + 8
    assert TaskKV(beta=0.0).split(d).tolist() == [[False] * 4]
    assert TaskKV(beta=1.0).split(d).tolist() == [[True] * 4]
    assert TaskKV(mode="gap").split(d).tolist() == [[False, True, False, True]]
    assert TaskKV(mode="fraction", head_fraction=0.75).split(d).tolist() == [[False, True, True, True]]


def test_a_kv_head_is_as_far_as_its_farthest_query_head():
    """One query head of the first group stands far out and its partner at the centre; both of the other group half
    as far: the maximum chooses the first group, the mean the second."""
    eye = torch.eye(4).reshape(4, 1, 4)  # each head adds along an axis of its own
    out = torch.zeros(1, 4, 3, 1)
    out[:, 0], out[:, 1], out[:, 2], out[:, 3] = 10.0, 0.0, 8.0, 8.0
    d = semantic_distances(out, eye)[0]
    assert d[0] == d.max()
    assert d[:2].mean() < d[2:].mean()
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 31, 5, generator=g), torch.randn(1, 2, 31, 5, generator=g)
    policy = TaskKV(obs_window=5, n_sink=2, n_recent=4, n_mid=3, mode="fraction", head_fraction=0.5)
    cache = LayerCache(policy, Budget(1.0), 1, 0)
    whole = out[:, :, :1].expand(1, 4, 31, 1)
    real = torch.ones(1, 31, dtype=torch.bool)
    cache.prefill(q, k, k[..., :1], whole, real, Geometry(0.7, out_weight=eye))
    assert cache.store.count.tolist() == [31, 9]


def test_padding_is_not_observed():
    """A prompt shorter than the window: only its own positions enter the mean."""
    out = torch.randn(1, 4, 5, 3)
    there = torch.tensor([[False, False, True, True, True]])
    torch.testing.assert_close(semantic_distances(out, W_O, there), semantic_distances(out[:, :, 2:], W_O))


def test_errors_and_saving(tmp_path):
    POLICY.save(tmp_path)
    assert load(tmp_path) == POLICY
    with pytest.raises(ValueError, match="needs the layer's output projection"):
        prefilled(w_o=None)
    for kwargs, text in (
        ({"mode": "best"}, "mode must be 'cumulative', 'fraction' or 'gap', got 'best'"),
        ({"beta": 1.5}, r"beta must lie in \[0, 1\], got 1.5"),
        ({"obs_window": 0}, "obs_window must be >= 1, got 0"),
        ({"n_mid": -1}, "n_mid must be >= 0, got -1"),
        ({"n_recent": 0}, "n_recent must be >= 1"),
    ):
        with pytest.raises(ValueError, match=text):
            TaskKV(**kwargs)
