"""Streamed and distributed attention against attention in one place."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import foveate as fv
from foveate.dist import distributed_attention, ring_bytes, run_workers, streamed_attention
from foveate.dist.streamed import _Ring


def inputs(n, m=None, dtype=torch.float64, dv=6):
    g = torch.Generator().manual_seed(0)
    shapes = (2, 4, n, 8), (2, 2, m or n, 8), (2, 2, m or n, dv)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(61, 61), (17, 89), (61, 23), (1, 1)])
def test_streamed_is_attention_whatever_the_blocks(n, m, causal):
    q, k, v = inputs(n, m)
    want = fv.attention(q, k, v, is_causal=causal)
    for block_q, block_k in ((1, 7), (16, 16), (13, 100), (100, 5)):
        got = streamed_attention(q, k, v, block_q=block_q, block_k=block_k, causal=causal)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_streamed_in_low_precision_merges_in_float32():
    q, k, v = inputs(131, dtype=torch.bfloat16)
    got = streamed_attention(q, k, v, block_k=8)
    assert got.dtype == torch.bfloat16
    want = fv.attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(got.double(), want, atol=4e-3, rtol=8e-3)


def test_only_blocks_travel(monkeypatch):
    """What is sent at a time does not grow with the length."""
    seen = []
    monkeypatch.setattr(
        fv.dist.streamed, "attention", lambda *a, **o: seen.append(a) or fv.attention(*a, **o)
    )
    for n in (200, 400):
        streamed_attention(*inputs(n), block_q=32, block_k=64, causal=True)
    assert max(a[0].shape[2] for a in seen) == 32
    assert max(a[1].shape[2] for a in seen) == 64


def test_alone_without_a_group():
    leaves = [t.requires_grad_() for t in inputs(11)]
    assert torch.autograd.gradcheck(
        lambda *a: distributed_attention(*a, causal=True, block=4), leaves, fast_mode=True
    )


def piece(rank, lengths):
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])


def work(rank, size, cases):
    """Every case on the first so many processes: output, gradients, bytes sent of this one's rows."""
    found = []
    groups = {w: dist.new_group(list(range(w))) for w in range(2, size + 1)}
    sent = []
    turn = _Ring.turn

    def counted(self, x):
        out = turn(self, x)
        sent.append(x.nbytes if self.size > 1 else 0)
        return out

    _Ring.turn = counted
    for lengths, causal, block in cases:
        if rank >= len(lengths):
            found.append(None)
            continue
        rows = piece(rank, lengths)
        q, k, v = (t[:, :, rows].clone().requires_grad_() for t in inputs(sum(lengths)))
        sent.clear()
        out = distributed_attention(q, k, v, groups[len(lengths)], causal=causal, block=block)
        forward = sum(sent)
        (out * torch.arange(out.shape[3])).sum().backward()
        found.append((out.detach(), q.grad, k.grad, v.grad, forward))
    return found


def test_rows_on_two_and_three_workers():
    cases = [
        ((7, 6), False, 4),
        ((7, 6), True, 100),
        ((5, 4, 4), True, 3),
        ((5, 4, 4), False, 5),
        ((1, 9, 3), True, 2),
    ]
    found = run_workers(work, 3, cases)
    for at, (lengths, causal, _) in enumerate(cases):
        q, k, v = (t.requires_grad_() for t in inputs(sum(lengths)))
        out = fv.attention(q, k, v, is_causal=causal, engine="reference")
        (out * torch.arange(out.shape[3])).sum().backward()
        for rank in range(len(lengths)):
            rows = piece(rank, lengths)
            for got, want in zip(found[rank][at][:4], (out, q.grad, k.grad, v.grad), strict=True):
                torch.testing.assert_close(got, want[:, :, rows], atol=1e-11, rtol=0)
            # keys 8 wide and values 6: as many numbers as two of 7
            assert found[rank][at][4] == ring_bytes(lengths, 2, 7, element=8, batch=2)[rank]
        assert all(found[rank][at] is None for rank in range(len(lengths), 3))


def fails(rank, size):
    raise OSError("on purpose")


def test_errors():
    q, k, v = inputs(9)
    with pytest.raises(ValueError, match=r"heads H a multiple of Hkv; got \(2, 3, 9, 8\)"):
        distributed_attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="block must be an int >= 1, got 0"):
        distributed_attention(q, k, v, block=0)
    with pytest.raises(ValueError, match="block_k must be an int >= 1, got 0"):
        streamed_attention(q, k, v, block_k=0)
    with pytest.raises(RuntimeError, match=r"\(rank, exit code\) \[\(0, 1\)"):
        run_workers(fails, 1)
