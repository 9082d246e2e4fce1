"""Relative convolutional attention against loops over its formulas, its limits, bounded memory and states."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from foveate.layers import (
    RelativeConvAttention,
    SelfAttention,
    TransformerLM,
    relative_attention,
    relative_shift,
)
from foveate.layers import relative_conv as module
from foveate.patterns import SlidingWindow


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(reach, heads, dim):
    return (
        normal(2 * reach, heads, dim, seed=11),
        normal(2 * reach, heads, seed=12),
        normal(heads, dim, seed=13),
    )


def made(*args, seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = RelativeConvAttention(*args, **kwargs).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn(p.shape)
    return layer


def oracle(q, k, v, table, bias, content):
    """One head: q (N, D), k and v (M, D), table (2P, D), bias (2P,), content (D,)."""
    n, m, reach, out = len(q), len(k), len(table) // 2, []
    table, bias, content = table.detach(), bias.detach(), content.detach()
    q, k = q.detach(), k.detach()
    for i in range(n):
        at, logits = i + m - n, []
        for j in range(at + 1):
            o = reach - (at - j)
            logits.append(float((q[i] + content) @ k[j] + q[i] @ table[o] + bias[o]) / math.sqrt(q.shape[1]))
        out.append(torch.tensor(logits, dtype=torch.float64).softmax(0) @ v[: at + 1])
    return torch.stack(out)


# ------------------------------------------------------------------------------------------------ the shift
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (5, 5), (3, 11), (7, 2)])
def test_the_shift_gives_each_pair_its_table_row(n, m):
    reach = 16
    rows = torch.arange(reach - m + 1, reach + n)  # of the table
    scores = rows + 100 * torch.arange(n)[:, None]  # (N, N + M - 1): which row, which query
    got = relative_shift(scores.expand(2, 3, n, -1), m)
    assert got.shape == (2, 3, n, m)
    for i, j in itertools.product(range(n), range(m)):
        assert int(got[1, 2, i, j]) == 100 * i + reach - ((i + m - n) - j)


# -------------------------------------------------------------------------------------------- the operator
@pytest.mark.parametrize("buffer", [1, 500, 1 << 22])  # a query at a time, a few, all
@pytest.mark.parametrize(("n", "m"), [(1, 1), (13, 13), (5, 23), (16, 17)])
def test_it_is_the_formula_in_blocks_of_any_size(n, m, buffer, monkeypatch):
    monkeypatch.setattr(module, "BUFFER", buffer)
    q, k, v = normal(2, 3, n, 4, seed=1), normal(2, 3, m, 4, seed=2), normal(2, 3, m, 4, seed=3)
    held = tables(24, 3, 4)
    out = relative_attention(q, k, v, *held)
    for b, h in itertools.product(range(2), range(3)):
        table, bias, content = held[0][:, h], held[1][:, h], held[2][h]
        want = oracle(q[b, h], k[b, h], v[b, h], table, bias, content)
        torch.testing.assert_close(out[b, h], want, atol=1e-12, rtol=0)


def test_gradients_do_not_depend_on_the_blocks(monkeypatch):
    found = []
    for buffer in (1 << 22, 700):
        monkeypatch.setattr(module, "BUFFER", buffer)
        leaves = [normal(2, 3, 19, 4, seed=s).requires_grad_() for s in (1, 2, 3)]
        leaves += [t.requires_grad_() for t in tables(24, 3, 4)]
        out = relative_attention(*leaves)
        (out * normal(2, 3, 19, 4, seed=9)).sum().backward()
        found.append((out.detach(), *(t.grad for t in leaves)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        assert want.any()
    small = [normal(1, 2, 5, 3, seed=s).requires_grad_() for s in (1, 2, 3)]
    small += [t.requires_grad_() for t in tables(6, 2, 3)]
    assert torch.autograd.gradcheck(relative_attention, small, fast_mode=True)


def test_memory_follows_the_keys_and_not_the_pairs(monkeypatch):
    seen, shift = [], module.relative_shift

    def watched(scores, keys):
        seen.append(scores.numel())
        return shift(scores, keys)

    monkeypatch.setattr(module, "relative_shift", watched)
    monkeypatch.setattr(module, "BUFFER", 1 << 12)
    q = normal(1, 1, 300, 2, dtype=torch.float32)
    relative_attention(q, q, q, *(t.float() for t in tables(300, 1, 2)))
    assert len(seen) > 20
    assert max(seen) <= 1 << 12


def test_only_offsets_matter():
    """Tokens put before, beyond the reach of window and kernel, change nothing."""
    layer = made(24, 4, window=6, max_offset=64)
    x, prefix = normal(2, 21, 24, seed=1), normal(2, 9, 24, seed=2)
    moved = layer(torch.cat([prefix, x], 1))[:, 9:]
    plain = layer(x)
    torch.testing.assert_close(moved[:, 7:], plain[:, 7:], atol=1e-12, rtol=0)  # window - 1 + kernel - 1
    assert (moved[:, :7] - plain[:, :7]).abs().amax((0, 2)).min() > 1e-6
    q, k, v = (normal(1, 2, 20, 3, seed=s) for s in (1, 2, 3))
    held = tables(32, 2, 3)
    whole = relative_attention(q, k, v, *held, pattern=SlidingWindow(5))
    part = relative_attention(*(t[:, :, 6:] for t in (q, k, v)), *held, pattern=SlidingWindow(5))
    torch.testing.assert_close(part[:, :, 4:], whole[:, :, 10:], atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------------------------- the layer
def test_zero_tables_and_a_delta_kernel_are_plain_attention():
    torch.manual_seed(0)
    layer = RelativeConvAttention(24, 4, max_offset=64).double()
    for conv in layer.convs:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        conv.weight.data[:, -1] = 1.0  # the current step
    plain = SelfAttention(24, 4, rotary=False, bias=True).double()
    plain.load_state_dict({n: t for n, t in layer.state_dict().items() if "proj" in n}, strict=False)
    nn.init.zeros_(plain.q_proj.bias)
    nn.init.zeros_(plain.k_proj.bias)
    x = normal(2, 37, 24)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("conv", [True, False])
def test_the_layer_is_the_formula(conv, relative, share):
    layer = made(12, 3, conv=conv, relative=relative, share_conv=share, max_offset=16)
    x = normal(2, 11, 12, seed=5)
    projected = []
    for c, proj in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
        y = proj(x)
        if conv:
            z, filters = torch.zeros_like(y), layer.convs[c]
            for t, channel in itertools.product(range(11), range(12)):
                f = channel % 4 if share else channel
                z[:, t, channel] = filters.bias[f]
                for s in range(min(3, t + 1)):
                    z[:, t, channel] += filters.weight[f, 2 - s] * y[:, t - s, channel]
            y = z
        projected.append(y.unflatten(2, (3, 4)).transpose(1, 2))
    table, bias, content = (
        (layer.table, layer.bias, layer.content)
        if relative
        else (torch.zeros(32, 3, 4).double(), torch.zeros(32, 3).double(), torch.zeros(3, 4).double())
    )
    heads = torch.stack(
        [
            torch.stack(
                [oracle(*(y[b, h] for y in projected), table[:, h], bias[:, h], content[h]) for h in range(3)]
            )
            for b in range(2)
        ]
    )
    want = layer.o_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 5])
def test_decoding_equals_the_whole(window):
    for arguments in ({}, {"share_conv": False}, {"conv": False}, {"relative": False}, {"kernel": 1}):
        layer = made(24, 4, max_offset=32, window=window, **arguments)
        x = normal(2, 23, 24)
        full = layer(x)
        for cuts in ([0, 1, 12, 23], range(24)):
            state, parts = layer.initial_state(x), []
            for a, b in itertools.pairwise(cuts):
                out, state = layer(x[:, a:b], state=state)
                parts.append(out)
            torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-10, rtol=0)
            assert state.k.shape[2] == (23 if window is None else 4)
            assert state.before is None or all(
                t.shape == (2, layer.convs[0].kernel - 1, 24) for t in state.before
            )


def test_later_tokens_never_reach_earlier_ones():
    layer = made(24, 4, max_offset=32)
    x = normal(1, 20, 24).requires_grad_()
    layer(x)[:, 9].sum().backward()
    assert not x.grad[:, 10:].any()
    assert (x.grad[:, :10].abs().sum(-1) > 0).all()


def test_dropout_is_for_training():
    layer = made(24, 4, max_offset=32, dropout=0.5)
    x = normal(2, 20, 24)
    assert torch.equal(layer.eval()(x), layer(x))
    torch.manual_seed(1)
    one, other = layer.train()(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), one)
    assert not torch.equal(one, other)


def test_bfloat16_and_strides():
    layer = made(32, 4, max_offset=128).float()
    x = normal(2, 67, 32, dtype=torch.float32)
    want = layer(x).detach()
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(layer(turned), want, atol=1e-6, rtol=0)
    low = layer.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, atol=0.05 * float(want.abs().max()), rtol=0)


def test_in_a_language_model_every_parameter_learns():
    torch.manual_seed(0)
    model = TransformerLM(11, 32, 2, lambda layer: RelativeConvAttention(32, 4, max_offset=64))
    model(torch.arange(40).remainder(11)[None]).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_errors_name_the_argument():
    q, held = normal(1, 2, 9, 4), tables(8, 2, 4)
    with pytest.raises(ValueError, match=r"q at most 8 tokens .*; got q \(1, 2, 9, 4\)"):
        relative_attention(q, q, q, *held)
    with pytest.raises(ValueError, match="k must have 2 heads and 2 to 9 keys"):
        relative_attention(q[:, :, :2], normal(1, 2, 10, 4), normal(1, 2, 10, 4), *held)
    with pytest.raises(ValueError, match=r"table must be \(2 P, 2, 4\), .*got \(16, 2, 4\), \(16, 1\)"):
        relative_attention(q, q, q, held[0], held[1][:, :1], held[2])
    with pytest.raises(ValueError, match=r"scores must be \(..., N, N \+ keys - 1\), got \(3, 4\), 3"):
        relative_shift(torch.zeros(3, 4), 3)
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got dim=30, heads=4"):
        RelativeConvAttention(30, 4)
    with pytest.raises(ValueError, match="max_offset must be >= 1 and dropout in"):
        RelativeConvAttention(32, 4, dropout=1.0)
