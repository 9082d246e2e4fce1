"""Recycled attention, step by step against lists of positions."""

from __future__ import annotations

import pytest
import torch

from foveate.cache import Budget, Geometry, LayerCache, Recycled, recycled_mask

SCALE = 0.8


def tensors(n=60, batch=2, heads=4, hkv=2, dim=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g) * 1.5
    k, v = (torch.randn(batch, hkv, n, dim, generator=g) for _ in range(2))
    return q, k, v


def started(policy, keep, prompt=21, pads=(0, 5), **sizes):
    q, k, v = tensors(**sizes)
    cache = LayerCache(policy, Budget(keep, "head", 0, 1), "prefill", 0)
    real = torch.arange(prompt)[None] >= torch.tensor(pads)[:, None]
    first = (slice(None), slice(None), slice(0, prompt))
    cache.prefill(q[first], k[first], v[first], q[first], real, Geometry(SCALE))
    return cache, q, k, v


def step(cache, q, k, v, at):
    one = (slice(None), slice(None), slice(at, at + 1))
    return cache.extend(
        q[one], k[one], v[one], torch.ones(q.shape[0], 1, dtype=torch.bool), Geometry(SCALE), lambda *_: None
    )


def recycled(cache, pads=(0, 5)):
    """Positions in C_r per row and KV head: slots of an append-only store are positions minus padding."""
    slots = cache.state.slots
    return [[{int(s) + pads[b] for s in slots[b, h] if s >= 0} for h in range(2)] for b in range(2)]


def weights(q, k, b, head, i, js):
    x = torch.stack([q[b, head, i].double() @ k[b, head // 2, j].double() * SCALE for j in js])
    return dict(zip(js, torch.softmax(x, 0).tolist(), strict=True))


def full_top(q, k, b, h, i, pad, keep):
    js = list(range(pad, i + 1))
    a = [weights(q, k, b, head, i, js) for head in (2 * h, 2 * h + 1)]
    return set(sorted(js, key=lambda j: -max(a[0][j], a[1][j]))[:keep])


@pytest.mark.parametrize("stride", [3, 7])
def test_steps_equal_the_definition(stride):
    """Outputs, sets and who leaves, for 20 steps of a padded batch."""
    keep = 6
    cache, q, k, v = started(Recycled(stride), keep)
    sets = [[full_top(q, k, b, h, 20, pad, keep) for h in range(2)] for b, pad in enumerate((0, 5))]
    assert recycled(cache) == sets
    for t in range(1, 21):
        at = 20 + t
        out = step(cache, q, k, v, at)
        for b, pad in enumerate((0, 5)):
            for h in range(2):
                js = list(range(pad, at + 1)) if t % stride == 0 else sorted(sets[b][h] | {at})
                a = [weights(q, k, b, head, at, js) for head in (2 * h, 2 * h + 1)]
                for g in range(2):
                    wanted = sum(a[g][j] * v[b, h, j].double() for j in js)
                    torch.testing.assert_close(out[b, 2 * h + g, 0].double(), wanted, atol=1e-5, rtol=1e-5)
                if t % stride == 0:
                    sets[b][h] = full_top(q, k, b, h, at, pad, keep)
                else:
                    gone = min((j for j in js if j != at), key=lambda j: max(a[0][j], a[1][j]))
                    sets[b][h] = set(js) - {gone}
        assert recycled(cache) == sets
        assert all(len(s) == keep for row in recycled(cache) for s in row)


@pytest.mark.parametrize(("policy", "keep"), [(Recycled(1), 3), (Recycled(9), 60), (Recycled(60), 60)])
def test_stride_one_or_enough_keys_is_full_decoding(policy, keep):
    cache, q, k, v = started(policy, keep)
    for at in range(21, 41):
        out = step(cache, q, k, v, at)
        for b, pad in enumerate((0, 5)):
            for head in range(4):
                a = weights(q, k, b, head, at, list(range(pad, at + 1)))
                wanted = sum(w * v[b, head // 2, j].double() for j, w in a.items())
                torch.testing.assert_close(out[b, head, 0].double(), wanted, atol=1e-5, rtol=1e-5)


def test_nothing_is_evicted_for_good():
    """A token that left the recycled set is in the store, and back after the next full step if it leads again."""
    cache, q, k, v = started(Recycled(5), 4, pads=(0, 0))
    q[:, :, 25] = 50 * k[:, :, 3].repeat_interleave(2, 1)  # the first full step asks for token 3 alone
    back = []
    for t in range(1, 6):
        step(cache, q, k, v, 20 + t)
        back.append(all(3 in s for row in recycled(cache, (0, 0)) for s in row))
    assert not all(back[:4])
    assert back[4]
    assert cache.store is not None
    assert cache.store.count.tolist() == [26] * 4


def test_keys_read():
    """ceil(T / S) full steps read everything, the others K + 1."""
    cache, q, k, v = started(Recycled(5), 4, pads=(0, 0))
    for t in range(1, 21):
        step(cache, q, k, v, 20 + t)
    full = sum(21 + t for t in range(1, 21) if t % 5 == 0)
    assert cache.keys_read == 4 * (full + 16 * 5)


def test_dynamic_steps_follow_the_similarity():
    for threshold, every_check_full in ((1.1, True), (-1.1, False)):
        policy = Recycled(when="dynamic", check_every=3, similarity=threshold)
        cache, q, k, v = started(policy, 4, pads=(0, 0))
        for t in range(1, 13):
            step(cache, q, k, v, 20 + t)
        full = [t for t in range(1, 13) if t % 3 == 0] if every_check_full else []
        assert cache.keys_read == 4 * (sum(21 + t for t in full) + (12 - len(full)) * 5)


def test_mean_over_the_group():
    cache, q, k, _ = started(Recycled(5, gqa="mean"), 6, pads=(0, 0))
    for b in range(2):
        for h in range(2):
            a = [weights(q, k, b, head, 20, list(range(21))) for head in (2 * h, 2 * h + 1)]
            wanted = set(sorted(range(21), key=lambda j: -(a[0][j] + a[1][j]))[:6])
            assert recycled(cache, (0, 0))[b][h] == wanted


def test_rows_can_be_reordered():
    cache, q, k, v = started(Recycled(5), 4, pads=(0, 0))
    step(cache, q, k, v, 21)
    before = recycled(cache, (0, 0))
    cache.select_rows(torch.tensor([1, 1]))
    assert recycled(cache, (0, 0)) == [before[1], before[1]]


def test_the_mask_of_the_training_form():
    q, k, _ = tensors(n=23)
    mask = recycled_mask(q, k, 4, 5, scale=SCALE)
    for b in range(2):
        for head in range(4):
            for i in range(23):
                last = i // 5 * 5
                if i == last:
                    wanted = set(range(i + 1))
                else:
                    a = weights(q, k, b, head, last, list(range(last + 1)))
                    wanted = set(sorted(a, key=lambda j: -a[j])[:4]) | set(range(last + 1, i + 1))
                assert set(mask[b, head, i].nonzero()[:, 0].tolist()) == wanted
    assert (
        recycled_mask(q, k, 4, 1)
        .tril()
        .equal(torch.ones(23, 23, dtype=torch.bool).tril().expand(2, 4, 23, 23))
    )


def test_errors():
    with pytest.raises(ValueError, match="stride must be >= 1, got 0"):
        Recycled(0)
    with pytest.raises(ValueError, match="when must be 'fixed' or 'dynamic', got 'often'"):
        Recycled(when="often")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="gqa must be"):
        Recycled(gqa="sum")  # pyright: ignore[reportArgumentType]
