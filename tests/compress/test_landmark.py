"""Landmark attention against loops over tokens, and what must hold of its gates, its blocks and its cache."""

from __future__ import annotations

import math

import pytest
import torch

import foveate as fv
from foveate.compress import landmark as module
from foveate.compress.landmark import (
    LandmarkBlocks,
    LandmarkCache,
    insert_landmarks,
    landmark_attention,
    landmark_grouped_softmax,
)
from foveate.core.block_choice import choice_attention
from foveate.core.rotary import Rotary


def tensors(n, batch=1, heads=4, kv_heads=2, dim=8, dv=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dv))
    return tuple(torch.randn(batch, h, n, d, generator=g, dtype=torch.float64).to(dtype) for h, d in shapes)


def every(n, size):
    return torch.arange(1, n + 1) % size == 0


SOME = torch.tensor([c == "L" for c in "..L....L.L..L......"])  # blocks of 2, 4, 1 and 2, and six open tokens
EMPTY = torch.tensor(
    [c == "L" for c in "LL.LL..LL...L.."]
)  # some blocks without tokens, the first two among them


def oracle(z, landmark, offset=0, top=None):
    """Weights of one head, query by query; z (Nq, Nk). top: how many past blocks are read, or query -> their ends."""
    n, m = z.shape
    ends = [j for j in range(m) if landmark[j]]
    weights = torch.zeros_like(z)
    for i in range(n):
        place = i + offset
        if place < 0:
            continue
        past = [e for e in ends if e < place]
        start = past[-1] + 1 if past else 0
        own = [j for j in range(start, place + 1) if not landmark[j]]
        blocks = {}
        for e in past:
            first = max((f for f in past if f < e), default=-1) + 1
            if first < e:
                blocks[e] = range(first, e)
        if isinstance(top, int):
            kept = sorted(blocks, key=lambda e: -z[i, e].item())[:top]
        else:
            kept = list(blocks) if top is None else top[i]
        top_logits = {j: z[i, j].item() for j in [*own, *kept]}
        if not top_logits:
            continue
        most = max(top_logits.values())
        total = sum(math.exp(x - most) for x in top_logits.values())
        gate = {j: math.exp(x - most) / total for j, x in top_logits.items()}
        for j in own:
            weights[i, j] = gate[j]
        for e in kept:
            inside = [z[i, j].item() for j in blocks[e]]
            share = [math.exp(x - max(inside)) for x in inside]
            for j, x in zip(blocks[e], share, strict=True):
                weights[i, j] = gate[e] * x / sum(share)
    return weights


def logits(q, k, scale=None):
    return (
        q
        @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        * (q.shape[3] ** -0.5 if scale is None else scale)
    )


def kept_blocks(z, landmark, offset, top, group):
    """Ends of the blocks that each query of each key head reads: max over heads of softmax over past landmarks."""
    ends = [j for j in range(z.shape[2]) if landmark[j] and j and not landmark[j - 1]]
    found = []
    for h in range(0, len(z), group):
        rows = []
        for i in range(z.shape[1]):
            past = [e for e in ends if e < i + offset]
            score = {
                e: max(
                    math.exp(z[x, i, e]) / sum(math.exp(z[x, i, f]) for f in past)
                    for x in range(h, h + group)
                )
                for e in past
            }
            rows.append(sorted(past, key=lambda e: -score[e])[:top])
        found.append(rows)
    return found


# -------------------------------------------------------------------------------------------- grouped softmax
@pytest.mark.parametrize("landmark", [every(29, 4), SOME, every(13, 20), every(24, 2)])
@pytest.mark.parametrize("cut", [0, 5])
def test_weights_are_the_product_form(landmark, cut):
    m = len(landmark)
    z = 3 * torch.randn(2, 3, m - cut, m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    got = landmark_grouped_softmax(z, landmark, cut)
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(got[b, h], oracle(z[b, h], landmark, cut), atol=1e-12, rtol=0)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))
    assert (got[..., landmark] == 0).all()


def test_rows_before_all_keys_empty_blocks_and_different_rows():
    z = torch.randn(2, 1, 7, 7, dtype=torch.float64)
    rows = torch.tensor([[True, True, False, True, True, False, False], [False] * 6 + [True]])
    got = landmark_grouped_softmax(z, rows)
    for b in range(2):
        torch.testing.assert_close(got[b, 0], oracle(z[b, 0], rows[b]), atol=1e-12, rtol=0)
    assert (got[0, 0, :2] == 0).all()  # landmarks of empty blocks, with nothing before
    assert (landmark_grouped_softmax(z, rows, -3)[:, :, :3] == 0).all()


def test_block_logits_shift_nothing_and_gate_logits_scale_the_block():
    z = torch.randn(1, 1, 19, 19, dtype=torch.float64)
    old, c = landmark_grouped_softmax(z, SOME), 1.7
    moved = z.clone()
    moved[..., 3:7] += c  # ordinary tokens of the second block
    new = landmark_grouped_softmax(moved, SOME)
    torch.testing.assert_close(new[0, 0, 8:], old[0, 0, 8:])
    moved = z.clone()
    moved[..., 7] += c  # its landmark
    new = landmark_grouped_softmax(moved, SOME)[0, 0, 8:]
    old = old[0, 0, 8:]
    mass = old[:, 3:7].sum(1)
    torch.testing.assert_close(new[:, 3:7].sum(1), mass * math.exp(c) / (1 - mass + mass * math.exp(c)))
    torch.testing.assert_close(new[:, :3], old[:, :3] / (1 - mass + mass * math.exp(c))[:, None])


# -------------------------------------------------------------------------------------------- engine form
@pytest.mark.parametrize("landmark", [every(29, 4), SOME, EMPTY, every(24, 2)])
@pytest.mark.parametrize("cut", [0, 5])
@pytest.mark.parametrize("chunk", [1 << 22, 40])
def test_equals_the_grouped_softmax(landmark, cut, chunk, monkeypatch):
    monkeypatch.setattr(module, "GATES", chunk)
    q, k, v = tensors(len(landmark), batch=2)
    q = q[:, :, cut:]
    want = landmark_grouped_softmax(logits(q, k), landmark, cut) @ v.repeat_interleave(2, 1)
    for top_k in (None, int(landmark.sum()), 100):
        got = landmark_attention(q, k, v, landmark, top_k=top_k)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("chunk", [1 << 22, 30])
def test_reads_the_blocks_of_the_largest_gates(top_k, heads, kv_heads, chunk, monkeypatch):
    monkeypatch.setattr(module, "GATES", chunk)
    for landmark, cut in ((every(43, 5), 0), (SOME, 4)):
        q, k, v = tensors(len(landmark), heads=heads, kv_heads=kv_heads, seed=top_k)
        q = q[:, :, cut:]
        z, group = logits(q, k)[0], heads // kv_heads
        kept = kept_blocks(z, landmark, cut, top_k, group)
        got = landmark_attention(q, k, v, landmark, top_k=top_k)[0]
        for h in range(heads):
            weights = oracle(z[h], landmark, cut, kept[h // group])
            if group == 1:
                torch.testing.assert_close(weights, oracle(z[h], landmark, cut, top_k))
            torch.testing.assert_close(got[h], weights @ v[0, h // group], atol=1e-12, rtol=0)


def test_top_k_zero_is_the_own_block_and_no_landmark_is_causal():
    q, k, v = tensors(31)
    landmark = every(31, 6)
    block = landmark.cumsum(0) - landmark.long()
    own = (block[:, None] == block) & torch.ones(31, 31).tril().bool() & ~landmark
    torch.testing.assert_close(landmark_attention(q, k, v, landmark, top_k=0), fv.attention(q, k, v, own))
    none = torch.zeros(31, dtype=torch.bool)
    for top_k in (None, 0, 3):
        got = landmark_attention(q[:, :, 2:], k, v, none, top_k=top_k)
        torch.testing.assert_close(got, fv.attention(q[:, :, 2:], k, v, is_causal=True))


def test_rows_of_a_batch_may_have_other_landmarks():
    q, k, v = tensors(19, batch=2)
    rows = torch.stack([SOME, every(19, 3)])
    got = landmark_attention(q, k, v, rows, top_k=2)
    for b in range(2):
        alone = landmark_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], rows[b], top_k=2)
        torch.testing.assert_close(got[b : b + 1], alone)


def test_native_engine_and_strides():
    q, k, v = tensors(203, dtype=torch.float32)
    landmark = every(203, 16)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    low = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    for top_k in (None, 2):
        want = landmark_attention(*wide, landmark, top_k=top_k)
        got = landmark_attention(*low, landmark, top_k=top_k, engine="native")
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
        weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ours = torch.autograd.grad((got * weight.float()).sum(), low)
        for a, b in zip(ours, torch.autograd.grad((want * weight).sum(), wide), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("top_k", [None, 1])
def test_gradients(top_k):
    q, k, v = tensors(13, heads=2, kv_heads=1, dim=4, dv=3)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(
        lambda q, k, v: landmark_attention(q, k, v, every(13, 3), top_k=top_k), leaves, fast_mode=True
    )
    z = torch.randn(1, 1, 9, 9, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z: landmark_grouped_softmax(z, every(9, 3)), z, fast_mode=True)
    rows = torch.tensor([True, True, False, True, False, False, True, True, False])  # rows that see nothing
    grad = torch.autograd.grad(landmark_grouped_softmax(z, rows).square().sum(), z)[0]
    assert grad.isfinite().all()


def test_gates_of_chosen_blocks():
    """The gathered attention with gates is a softmax over blocks of a softmax inside each."""
    q, k, v = tensors(12)
    g = torch.Generator().manual_seed(5)
    block = torch.randint(4, (12,), generator=g)
    choice = torch.rand(1, 4, 12, 4, generator=g) < 0.6
    gates = torch.randn(1, 4, 12, 4, generator=g, dtype=torch.float64)
    got, z = choice_attention(q, k, v, choice, block, gates=gates), logits(q, k)
    for h in range(4):
        for i in range(12):
            blocks = [c for c in range(4) if choice[0, h, i, c] and (block == c).any()]
            want = torch.zeros(6, dtype=torch.float64)
            share = torch.softmax(gates[0, h, i, blocks], 0)
            for s, c in zip(share, blocks, strict=True):
                members = (block == c).nonzero()[:, 0]
                want += s * (torch.softmax(z[0, h, i, members], 0) @ v[0, h // 2, members])
            torch.testing.assert_close(got[0, h, i], want)
    with pytest.raises(ValueError, match="gates must have the shape"):
        choice_attention(q, k, v, choice, block, gates=gates[:, :1])


# -------------------------------------------------------------------------------------------- the cache
@pytest.mark.parametrize("top_k", [None, 0, 1, 2, 50])
@pytest.mark.parametrize("rope", [None, Rotary()])
def test_block_by_block_is_the_parallel_form(top_k, rope):
    n, size = 41, 5
    q, k, v = tensors(n, batch=2)
    place = torch.arange(n)
    turn = (lambda x: x) if rope is None else (lambda x: rope(x, place))
    want = landmark_attention(turn(q), turn(k), v, every(n, size), top_k=top_k)
    for steps in ([size] * 8 + [1], [1] * n, [3, 2, 5, 1, 1, 1, 2]):
        cache, at, parts = LandmarkCache(size - 1, rope=rope, positions="true"), 0, []
        for step in steps:
            part = slice(at, at + step)
            parts.append(
                cache.step(q[:, :, part], k[:, :, part], v[:, :, part], every(n, size)[part], top_k=top_k)
            )
            at += step
        torch.testing.assert_close(torch.cat(parts, 2), want[:, :, :at], atol=1e-12, rtol=0)
        assert (cache.length, cache.blocks) == (at, at // size)


def test_the_open_block_does_not_hold_on_to_the_rest():
    _, k, v = tensors(43)
    cache = LandmarkCache(3)
    cache.append(k, v)
    assert sum(x.untyped_storage().nbytes() for x in cache.open) == 3 * 2 * (8 + 6) * 8


def test_chunks_of_several_blocks_read_all_of_themselves():
    q, k, v = tensors(30)
    cache = LandmarkCache(3)
    cache.append(k[:, :, :12], v[:, :, :12])
    other = cache.copy()
    got = cache.step(q[:, :, 12:], k[:, :, 12:], v[:, :, 12:], top_k=1)
    z = logits(q[:, :, 12:], k)[0]
    score = torch.softmax(z[..., 3:12:4], -1).unflatten(0, (2, 2)).amax(1)  # (Hkv, n, 3)
    for h in range(4):
        best = (score[h // 2].argmax(-1) * 4 + 3).tolist()
        kept = [[best[i], *range(15, 12 + i, 4)] for i in range(18)]
        weights = oracle(z[h], every(30, 4), 12, kept)
        torch.testing.assert_close(got[0, h], weights @ v[0, h // 2], atol=1e-12, rtol=0)
    assert (other.length, cache.length) == (12, 30)
    assert cache.nbytes == 30 * 2 * (8 + 6) * 8


@pytest.mark.parametrize("aggregate", ["token", "max_over_tokens"])
def test_retrieve_fetches_whole_blocks_in_their_slots(aggregate):
    """Slots of the fetched blocks and of the landmarks when they are scored, in words of the paper, by a loop."""
    size, blocks, top_k, rope = 4, 6, 2, Rotary(50.0)
    q, k, v = tensors(size * blocks, seed=3)
    cache = LandmarkCache(size - 1, rope=rope)
    cache.append(k, v)
    now = size * blocks
    queries = rope(q[:, :, :3], torch.arange(now, now + 3))
    got_k, got_v, places = cache.retrieve(queries, top_k, aggregate)
    slot_start = [
        now - (top_k + 1 - s) * size for s in range(top_k + 1)
    ]  # slots 0 .. k end where the queries begin
    score = torch.zeros(2, 3, blocks, dtype=torch.float64)
    for h in range(4):
        for i in range(3):
            z = []
            for c in range(blocks):
                slot = max(0, c - (blocks - top_k) + 1)
                key = rope(
                    k[0, h // 2, c * size + size - 1][None], torch.tensor([slot_start[slot] + size - 1])
                )[0]
                z.append(queries[0, h, i] @ key / 8**0.5)
            score[h // 2, i] = torch.maximum(score[h // 2, i], torch.softmax(torch.stack(z), 0))
    if aggregate == "max_over_tokens":
        score = score.amax(1, keepdim=True)
    seen = set()
    for h in range(2):
        for i in range(score.shape[1]):
            chosen = sorted(sorted(range(blocks), key=lambda c: -score[h, i, c])[:top_k])
            seen.add(tuple(c >= blocks - top_k for c in chosen))
            index = [j for c in chosen for j in range(c * size, (c + 1) * size)]
            torch.testing.assert_close(got_k[0, h, i], k[0, h, index])
            torch.testing.assert_close(got_v[0, h, i], v[0, h, index])
            slots = [r + (c >= blocks - top_k) for r, c in enumerate(chosen)]
            want = [slot_start[s] + j for s in slots for j in range(size)]
            assert places[0, h, i].tolist() == want
    assert len(seen) > 1 or aggregate != "token"  # old ones and late ones were among them
    assert places.shape[2] == (3 if aggregate == "token" else 1)


def test_stingy_positions_are_the_true_ones_while_all_blocks_are_late_and_never_far():
    q, k, v = tensors(44)
    for blocks, top_k, same in ((2, 2, True), (3, 5, True), (8, 2, False)):
        outs = []
        for positions in ("true", "stingy"):
            cache = LandmarkCache(3, rope=Rotary(), positions=positions)
            cache.append(k[:, :, : 4 * blocks], v[:, :, : 4 * blocks])
            part = slice(4 * blocks, 4 * blocks + 3)
            places = cache.retrieve(q[:, :, part], top_k)[2]
            if positions == "stingy":
                assert int(places.min()) >= 4 * (blocks - min(top_k, blocks) - 1)
                assert int(places.max()) < 4 * blocks
            outs.append(cache.step(q[:, :, part], k[:, :, part], v[:, :, part], top_k=top_k))
        assert torch.allclose(*outs, atol=1e-12) == same


def test_max_over_tokens_fetches_once_for_the_chunk():
    q, k, v = tensors(30, heads=2, kv_heads=2)
    cache = LandmarkCache(3, positions="true")
    cache.append(k[:, :, :24], v[:, :, :24])
    got = cache.step(q[:, :, 24:27], k[:, :, 24:27], v[:, :, 24:27], top_k=2, aggregate="max_over_tokens")
    z = logits(q[:, :, 24:27], k[:, :, :27])[0]
    for h in range(2):
        best = torch.softmax(z[h][:, 3:24:4], -1).amax(0).topk(2).indices
        kept = [(best * 4 + 3).tolist()] * 3
        torch.testing.assert_close(got[0, h], oracle(z[h], every(27, 4), 24, kept) @ v[0, h, :27])


# -------------------------------------------------------------------------------------------- the rest
def test_operator_with_regular_landmarks():
    q, k, v = tensors(23)
    attend = LandmarkBlocks(4, top_k=1)
    want = landmark_attention(q, k, v, every(23, 5), top_k=1)
    torch.testing.assert_close(attend(q, k, v), want)
    state, parts = attend.initial_state(q, k, v), []
    for i in range(23):
        out, state = attend(*(x[:, :, i : i + 1] for x in (q, k, v)), state=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), want)


@pytest.mark.parametrize("n", [0, 2, 3, 8, 9])
def test_insert_landmarks(n):
    ids = torch.arange(2 * n).view(2, n)
    got = insert_landmarks(ids, -7, 3)
    for b in range(2):
        want = []
        for i in range(n):
            want.append(int(ids[b, i]))
            if (i + 1) % 3 == 0:
                want.append(-7)
        assert got[b].tolist() == want
    assert torch.equal(got == -7, every(got.shape[1], 4).expand(2, -1))
    assert insert_landmarks(ids[0], -7, 3).tolist() == got[0].tolist()


def test_errors_name_what_came():
    q, k, v = tensors(10)
    landmark = every(10, 4)
    with pytest.raises(TypeError, match="is_landmark must be a bool tensor, got torch"):
        landmark_attention(q, k, v, landmark.long())
    with pytest.raises(ValueError, match=r"is_landmark must have shape \(10,\) or \(1, 10\), got \(9,\)"):
        landmark_attention(q, k, v, landmark[1:])
    with pytest.raises(ValueError, match="at most as many queries as keys"):
        landmark_attention(q, k[:, :, 1:], v[:, :, 1:], landmark[1:])
    with pytest.raises(ValueError, match="top_k must be an int >= 0, got -1"):
        landmark_attention(q, k, v, landmark, top_k=-1)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        landmark_attention(q[:, :3], k, v, landmark)
    with pytest.raises(ValueError, match="causal_offset must be an int and <= 0, got 1"):
        landmark_grouped_softmax(torch.zeros(1, 1, 10, 10), landmark, 1)
    with pytest.raises(ValueError, match="logits must be a tensor"):
        landmark_grouped_softmax(torch.zeros(10, 10), landmark)
    with pytest.raises(ValueError, match="every must be an int >= 1, got 0"):
        insert_landmarks(torch.zeros(1, 3), 0, 0)
    with pytest.raises(ValueError, match="positions must be one of true, stingy, got 'near'"):
        LandmarkCache(3, positions="near")
    cache = LandmarkCache(3)
    with pytest.raises(ValueError, match="no whole block"):
        cache.retrieve(q, 1)
    with pytest.raises(ValueError, match="is_landmark must hold at every 4th token"):
        cache.append(k, v, every(10, 5))
    cache.append(k, v, landmark)
    with pytest.raises(ValueError, match="aggregate must be one of token, max_over_tokens, got 'mean'"):
        cache.retrieve(q, 1, "mean")
    with pytest.raises(ValueError, match="it holds keys"):
        cache.append(k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="q and k_pre of the same tokens"):
        cache.step(q, k[:, :, 1:], v[:, :, 1:], top_k=1)
