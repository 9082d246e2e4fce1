"""Neural memory: against a token loop in float64, gradients by hand against autograd, limits, streaming, errors."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.nn import functional as F

from foveate.linear import MemoryState, memorise, memory_read, surprise

ACT = {"silu": F.silu, "gelu": F.gelu}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(n, widths, *, batch=2, heads=3, dtype=torch.float64):
    """q, k (unit), v, eta, theta, alpha, start: a memory whose layers have these widths."""
    q, k = (F.normalize(normal(batch, heads, n, widths[0], seed=s, dtype=dtype), dim=-1) for s in (1, 2))
    v = normal(batch, heads, n, widths[-1], seed=3, dtype=dtype)
    eta, theta, alpha = (torch.sigmoid(normal(batch, heads, n, seed=s, dtype=dtype)) for s in (4, 5, 6))
    shapes = list(itertools.pairwise(widths))
    start = [normal(batch, heads, o, i, seed=7 + j, dtype=dtype) * i**-0.5 for j, (i, o) in enumerate(shapes)]
    return q, k, v, eta, 0.1 * theta, 0.3 * alpha, MemoryState.start(start)


def network(weights, x, activation="silu"):
    for number, w in enumerate(weights):
        x = w @ (x if number == 0 else ACT[activation](x))
    return x


def loop(q, k, v, eta, theta, alpha, state, *, chunk, clip=None, activation="silu"):
    """The recursion for one row and head, token by token; gradients by autograd, at weights of the chunk's start."""
    weights = [w.clone() for w in state]
    momentum = [torch.zeros_like(w) for w in weights]
    out = []
    for t in range(len(q)):
        if t % chunk == 0:
            base = [w.clone().requires_grad_() for w in weights]
        grads = torch.autograd.grad((network(base, k[t], activation) - v[t]).square().sum(), base)
        if clip is not None:
            norm = sum(g.square().sum() for g in grads).sqrt()
            grads = [g * min(1.0, clip / float(norm)) for g in grads]
        momentum = [eta[t] * s - theta[t] * g for s, g in zip(momentum, grads, strict=True)]
        weights = [(1 - alpha[t]) * w + s for w, s in zip(weights, momentum, strict=True)]
        out.append(network(weights, q[t], activation))
    return torch.stack(out), weights, momentum


def compare(args, **options):
    """The result for all rows and heads against the loop's."""
    *tensors, start = args
    y, state = memorise(*args, **options)
    for b, h in itertools.product(range(y.shape[0]), range(y.shape[1])):
        want, weights, momentum = loop(
            *(t[b, h] for t in tensors), [w[b, h] for w in start.weights], **options
        )
        torch.testing.assert_close(y[b, h], want, atol=1e-11, rtol=1e-9)
        for got, expected in zip((*state.weights, *state.momentum), (*weights, *momentum), strict=True):
            torch.testing.assert_close(got[b, h], expected, atol=1e-11, rtol=1e-9)
    assert state.position == y.shape[2]


# ----------------------------------------------------------------------------------------- the recursion
@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("widths", [(5, 5), (5, 7, 3), (4, 6, 5, 4)])
def test_equals_the_token_loop_with_gradients_at_the_chunks_start(widths, chunk):
    compare(inputs(13, widths, batch=1, heads=2), chunk=chunk)


def test_depth_1_and_chunk_1_is_the_written_out_recursion():
    q, k, v, eta, theta, alpha, start = inputs(17, (5, 5), batch=1, heads=1)
    w, s = start.weights[0][0, 0], torch.zeros(5, 5, dtype=torch.float64)
    y, _ = memorise(q, k, v, eta, theta, alpha, start, chunk=1)
    for t in range(17):
        key, value = k[0, 0, t], v[0, 0, t]
        s = eta[0, 0, t] * s - theta[0, 0, t] * 2 * torch.outer(w @ key - value, key)
        w = (1 - alpha[0, 0, t]) * w + s
        torch.testing.assert_close(y[0, 0, t], w @ q[0, 0, t], atol=1e-12, rtol=0)


def test_other_activations_and_clipping():
    args = inputs(11, (4, 6, 4), batch=1, heads=2)
    compare(args, chunk=4, activation="gelu")
    compare(args, chunk=4, clip=1.0)
    free = memorise(*args, chunk=4)[0]
    assert not torch.allclose(memorise(*args, chunk=4, clip=1.0)[0], free, atol=1e-3)
    assert torch.equal(memorise(*args, chunk=4, clip=1e6)[0], free)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("widths", [(5, 3), (5, 7, 3), (4, 6, 5, 3)])
def test_the_gradient_by_hand_is_autograds(widths, activation):
    _, k, v, *_, start = inputs(7, widths)
    found = surprise(start.weights, k, v, activation=activation)
    for t in range(7):
        leaves = [w.clone().requires_grad_() for w in start.weights]
        loss = (
            (memory_read(leaves, k[:, :, t : t + 1], activation=activation) - v[:, :, t : t + 1])
            .square()
            .sum()
        )
        for (u, z), want in zip(found, torch.autograd.grad(loss, leaves), strict=True):
            torch.testing.assert_close(
                u[:, :, t, :, None] * z[:, :, t, None, :], want, atol=1e-12, rtol=1e-10
            )


# ------------------------------------------------------------------------------------------------ limits
def test_without_forgetting_and_momentum_a_frozen_base_is_linear_attention():
    q, k, v, _, theta, alpha, _ = inputs(23, (5, 4))
    start = MemoryState.start([torch.zeros(2, 3, 4, 5, dtype=torch.float64)])
    none = torch.zeros_like(alpha)
    y, _ = memorise(q, k, v, none, theta, none, start, chunk=23)
    want = 2 * ((q @ k.transpose(-1, -2)).tril() * theta.unsqueeze(-2)) @ v
    torch.testing.assert_close(y, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_full_forgetting_leaves_the_momentum(chunk):
    q, k, v, eta, theta, alpha, start = inputs(19, (5, 6, 5))
    y, state = memorise(q, k, v, eta, theta, torch.ones_like(alpha), start, chunk=chunk)
    for w, s in zip(state.weights, state.momentum, strict=True):
        torch.testing.assert_close(w, s, atol=1e-12, rtol=0)
    torch.testing.assert_close(y[:, :, -1:], memory_read(state.momentum, q[:, :, -1:]), atol=1e-12, rtol=0)
    assert not torch.allclose(state.weights[0], start.weights[0], atol=1e-3)


def test_without_momentum_s_is_the_last_tokens():
    q, k, v, eta, theta, alpha, start = inputs(13, (5, 6, 5))
    _, state = memorise(q, k, v, torch.zeros_like(eta), theta, alpha, start, chunk=4)
    u, z = surprise(state.base, k[:, :, -1:], v[:, :, -1:])[0]
    want = -theta[:, :, -1:, None] * u.transpose(-1, -2) @ z
    torch.testing.assert_close(state.momentum[0], want, atol=1e-12, rtol=0)


def test_no_step_no_change():
    q, k, v, eta, *_, start = inputs(13, (5, 6, 5))
    none = torch.zeros_like(eta)
    y, state = memorise(q, k, v, eta, none, none, start, chunk=4)
    torch.testing.assert_close(y, memory_read(start.weights, q), atol=1e-12, rtol=0)
    assert torch.equal(state.weights[0], start.weights[0])


# --------------------------------------------------------------------------------------------- streaming
@pytest.mark.parametrize("ends", [range(1, 32), (31,), (3, 4, 11, 24, 31), (8, 16, 31)])
def test_any_pieces_give_what_one_call_gives(ends):
    *tensors, start = inputs(31, (5, 7, 5))
    whole, last = memorise(*tensors, start, chunk=8)
    state, parts, begin = start, [], 0
    before = [w.clone() for w in start.weights]
    for end in ends:
        y, state = memorise(*(t[:, :, begin:end] for t in tensors), state, chunk=8)
        parts.append(y)
        begin = end
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-11, rtol=0)
    for name in ("weights", "momentum", "base"):
        for got, want in zip(getattr(state, name), getattr(last, name), strict=True):
            torch.testing.assert_close(got, want, atol=1e-11, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, start.weights, strict=True))
    assert state.position == last.position == 31


def test_state_is_fixed_in_size_and_shared_by_rows():
    *tensors, _ = inputs(37, (5, 7, 5), dtype=torch.float32)
    first = [normal(3, 7, 5, dtype=torch.float32), normal(3, 5, 7, dtype=torch.float32)]
    start = MemoryState.start(first, batch=2)
    assert start.nbytes == 3 * 2 * 3 * 2 * 35 * 4
    y, state = memorise(*tensors, start, chunk=8)
    assert state.nbytes == start.nbytes
    alone = MemoryState.start(first, batch=1)
    torch.testing.assert_close(y[1:], memorise(*(t[1:] for t in tensors), alone, chunk=8)[0])


def test_later_tokens_do_not_change_earlier_reads():
    *tensors, start = inputs(29, (5, 7, 5))
    y, _ = memorise(*tensors, start, chunk=8)
    for t in (3, 8, 20):
        other = [torch.cat([x[:, :, :t], x[:, :, t:].flip(2)], 2) for x in tensors]
        changed, _ = memorise(*other, start, chunk=8)
        torch.testing.assert_close(changed[:, :, :t], y[:, :, :t], atol=1e-12, rtol=0)
        assert not torch.allclose(changed[:, :, t:], y[:, :, t:], atol=1e-3)


# --------------------------------------------------------------------------------- gradients, precision
@pytest.mark.parametrize("exact", [False, True])
def test_gradients_of_everything(exact):
    *tensors, start = inputs(7, (3, 4, 3), batch=1, heads=1)
    if exact:  # factors of 0 and 1
        tensors[3][..., 2], tensors[5][..., 4], tensors[5][..., 5] = 0.0, 1.0, 0.0

    def run(*leaves):
        state = dataclasses.replace(start, weights=leaves[6:])
        y, after = memorise(*leaves[:6], state, chunk=3, clip=2.0)
        return y, *after.momentum

    leaves = [t.requires_grad_() for t in (*tensors, *start.weights)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_strides_and_low_precision():
    *tensors, start = inputs(37, (8, 16, 8), dtype=torch.float32)
    want, _ = memorise(*tensors, start, chunk=16)
    turned = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in tensors]
    torch.testing.assert_close(memorise(*turned, start, chunk=16)[0], want, atol=1e-5, rtol=0)
    low, state = memorise(*(t.bfloat16() for t in tensors), start, chunk=16)
    assert low.dtype == torch.bfloat16
    assert state.weights[0].dtype == torch.float32
    torch.testing.assert_close(low.float(), want, atol=0.05, rtol=0.05)


def test_errors_name_the_argument():
    q, k, v, eta, theta, alpha, start = inputs(5, (4, 6, 4))
    with pytest.raises(ValueError, match=r"q, k must be \(B, H, N, D\) and v .* D=4, E=4 of the memory; got"):
        memorise(q[..., 1:], k, v, eta, theta, alpha, start)
    with pytest.raises(ValueError, match=r"theta must be \(B, H, N\) = \(2, 3, 5\), got \(2, 3, 4\)"):
        memorise(q, k, v, eta, theta[..., 1:], alpha, start)
    for chunk in (0, 2.0, True):
        with pytest.raises(ValueError, match="chunk must be an int >= 1, got"):
            memorise(q, k, v, eta, theta, alpha, start, chunk=chunk)
    with pytest.raises(ValueError, match="clip must be > 0 or None, got 0"):
        memorise(q, k, v, eta, theta, alpha, start, clip=0)
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, got 'relu'"):
        memorise(q, k, v, eta, theta, alpha, start, activation="relu")
    with pytest.raises(ValueError, match=r"weights must be \(B, H, out, in\), or .* got \[\(6, 4\)\]"):
        MemoryState.start([torch.zeros(6, 4)])
    with pytest.raises(ValueError, match="each layer must take what the one before gives"):
        MemoryState.start([torch.zeros(1, 6, 4), torch.zeros(1, 4, 5)], 1)
