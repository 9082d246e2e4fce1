"""Key lists and gathered attention against loops over queries and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.core import gathered as module
from foveate.core.gathered import KeyLists, gathered_attention
from foveate.patterns import Causal, Full, SlidingWindow


def tensors(batch, heads, kv_heads, n, m, seed=0, dv=5):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return make(batch, heads, n, 8), make(batch, kv_heads, m, 8), make(batch, kv_heads, m, dv)


def drawn(batch, heads, lists, n, m, group, seed=0, most=9):
    """Random lists, some empty, in no order, of keys that no query of the group sees in a causal window of 3."""
    rng = np.random.default_rng(seed)
    first, last = (m - n) // group, (m - 1) // group
    positions = np.zeros((batch, lists, last - first + 1, most), np.int64)
    counts = np.zeros(positions.shape[:3], np.int64)
    for b, h, g in np.ndindex(counts.shape):
        found = rng.permutation(max((first + g) * group - 2, 0))[: rng.integers(0, most + 1)]
        counts[b, h, g] = len(found)
        positions[b, h, g, : len(found)] = found
    made = KeyLists.from_padded(
        torch.from_numpy(positions), n, m, group, counts=torch.from_numpy(counts), heads=heads
    )
    mask = np.zeros((batch, heads, n, m), bool)  # by loops
    for b, h, i in np.ndindex(batch, heads, n):
        mine = b, h // (heads // lists), (m - n + i) // group - first
        mask[b, h, i, positions[mine][: counts[mine]]] = True
    return made, torch.from_numpy(mask)


def dense(q, k, v, mask):
    """Definition, and lse; rows that see nothing give 0 and -inf."""
    rep = q.shape[1] // k.shape[1]
    logits = (q @ k.repeat_interleave(rep, 1).transpose(-1, -2) * 0.3).masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.where(lse[..., None].isneginf(), 0.0, (logits - lse[..., None]).exp())
    return weights @ v.repeat_interleave(rep, 1), lse


SHAPES = [
    # batch, heads, kv_heads, lists, n, m, group
    (2, 4, 2, 4, 331, 331, 64),
    (2, 4, 2, 2, 331, 331, 128),  # one list per key/value head
    (1, 8, 2, 4, 257, 257, 16),  # one list for two of the four query heads; groups smaller than a tile
    (2, 2, 1, 2, 131, 449, 64),  # a chunk whose first group is cut
    (1, 2, 1, 1, 131, 449, 8),
    (1, 2, 2, 2, 1, 300, 1),  # decoding
    (1, 2, 2, 2, 5, 300, 1),
    (1, 2, 1, 2, 157, 307, 128),  # a border between groups inside a tile
    (1, 1, 1, 1, 63, 500, 256),  # a cut group alone
]


@pytest.mark.parametrize("near", [Causal() & SlidingWindow(3), None, ~Full()])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, near, monkeypatch):
    batch, heads, kv_heads, lists, n, m, group = shape
    q, k, v = tensors(batch, heads, kv_heads, n, m)
    chosen, mask = drawn(batch, heads, lists, n, m, group)
    assert torch.equal(chosen.layout().to_dense(), mask)
    assert chosen.area == int(mask.sum())
    if near is not None:
        local = near.layout(n, m).to_dense()
        assert not (mask & local).any()
        mask = mask | local
    want, want_lse = dense(q, k, v, mask)
    for buffer in (1 << 22, 1 << 12, 1):
        monkeypatch.setattr(module, "BUFFER", buffer)
        got, lse = gathered_attention(q, k, v, chosen, near, scale=0.3, return_lse=True)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3]])
def test_gradients_are_the_definitions(shape, monkeypatch):
    batch, heads, kv_heads, lists, n, m, group = shape
    q, k, v = (t.requires_grad_() for t in tensors(batch, heads, kv_heads, n, m))
    chosen, mask = drawn(batch, heads, lists, n, m, group)
    monkeypatch.setattr(module, "BUFFER", 1 << 13)
    near = Causal() & SlidingWindow(3)
    want, want_lse = dense(q, k, v, mask | near.layout(n, m).to_dense())
    got, lse = gathered_attention(q, k, v, chosen, near, scale=0.3, return_lse=True)
    seed = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((got * seed).sum() + lse.sin().sum(), (q, k, v))
    wanted = torch.autograd.grad((want * seed).sum() + want_lse.sin().sum(), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_strides(engine, dtype):
    q, k, v = (t.to(dtype) for t in tensors(2, 4, 2, 331, 331))
    chosen, _ = drawn(2, 4, 4, 331, 331, 64, most=80)
    near = Causal() & SlidingWindow(3)
    both = near.layout(331) | chosen.layout()
    want = fv.attention(q.double(), k.double(), v.double(), both, engine="reference")
    eager = fv.attention(q, k, v, both, engine="reference")
    got = gathered_attention(q, k, v, chosen, near, engine=engine)
    assert got.dtype == dtype
    # three roundings to the dtype (two states and their merge) where the eager form has one
    assert (got - want).abs().max() <= 3 * (eager - want).abs().max()
    strided = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    assert torch.equal(gathered_attention(*strided, chosen, near, engine=engine), got)


def test_a_key_that_no_list_has_is_never_read():
    q, k, v = tensors(1, 2, 1, 331, 331)
    chosen, mask = drawn(1, 2, 2, 331, 331, 64)
    hidden = ~mask.any(2).any(1)[0]
    hidden[0] = False  # padding reads key 0
    want = gathered_attention(q, k, v, chosen)
    v[:, :, hidden] = torch.nan
    k[:, :, hidden] = torch.inf
    assert torch.equal(gathered_attention(q, k, v, chosen), want)
    assert hidden.any()


def test_padding_is_not_seen_whatever_it_holds():
    q, k, v = tensors(1, 2, 1, 200, 200)
    positions = torch.tensor([3, 0, 0]).expand(1, 2, 4, 3)
    counts = torch.tensor([0, 1, 1, 1]).expand(1, 2, 4)
    chosen = KeyLists.from_padded(positions, 200, 200, 64, counts=counts)
    v[:, :, 0] = torch.nan
    out = gathered_attention(q, k, v, chosen)
    assert (out[:, :, :64] == 0).all()
    torch.testing.assert_close(out[:, :, 64:], v[:, :, 3:4].expand(1, 2, 136, -1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": 48}, "group must be a multiple or a divisor of 64, got 48"),
        ({"group": 0}, "group must be"),
        ({"positions": torch.zeros(1, 2, 3, 4)}, r"positions must be \(B, L, 2, C\), got \(1, 2, 3, 4\)"),
        ({"positions": torch.full((1, 2, 2, 4), 128)}, r"idx must lie in \[0, 128\), got 128 to 128"),
        ({"positions": torch.full((1, 2, 2, 4), -1)}, r"idx must lie in \[0, 128\), got -1 to -1"),
        ({"counts": torch.full((1, 2, 2), 5)}, r"counts must lie in \[0, 4\], got 5 to 5"),
        ({"counts": torch.full((1, 2), 1)}, r"counts must be \(1, 2, 2\), got \(1, 2\)"),
        ({"heads": 3}, "heads must be a multiple of lists, got 3 and 2"),
    ],
)
def test_lists_are_checked(change, words):
    settings = {
        "positions": torch.zeros(1, 2, 2, 4, dtype=torch.int64),
        "q_len": 128,
        "k_len": 128,
        "group": 64,
    }
    with pytest.raises(ValueError, match=words):
        KeyLists.from_padded(**{**settings, **change})


def test_inputs_are_checked():
    q, k, v = tensors(1, 4, 2, 128, 128)
    chosen = KeyLists.from_padded(torch.zeros(1, 4, 2, 1, dtype=torch.int64), 128, 128, 64)
    with pytest.raises(TypeError, match="lists must be KeyLists, got Tensor"):
        gathered_attention(q, k, v, chosen.idx)
    with pytest.raises(ValueError, match="v must be a tensor"):
        gathered_attention(q, k, v[0], chosen)
    with pytest.raises(ValueError, match=r"lists are for q .* = \(1, 4, 128\)"):
        gathered_attention(q[:, :2], k, v, chosen)
    few = KeyLists.from_padded(torch.zeros(1, 1, 2, 1, dtype=torch.int64), 128, 128, 64, heads=4)
    with pytest.raises(ValueError, match="a multiple of k's 2 heads per batch row, got 1"):
        gathered_attention(q, k, v, few)
    with pytest.raises(ValueError, match="must have 3 entries that end in len"):
        KeyLists(128, 128, 64, 1, 1, 1, chosen.ptr, chosen.idx)
    with pytest.raises(ValueError, match="1 <= q_len <= k_len, got 129 and 128"):
        KeyLists(129, 128, 64, 1, 1, 1, chosen.ptr, chosen.idx)
