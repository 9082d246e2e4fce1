"""Chosen blocks of keys: the layout pair by pair, and gathered attention against one masked softmax."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.core import block_choice as module
from foveate.core.block_choice import choice_attention, choice_layout
from foveate.core.layout import BlockLayout


def case(batch, heads, n, m, blocks, seed=0, share=0.4, ordered=False):
    """A random choice and a random partition of the keys."""
    g = torch.Generator().manual_seed(seed)
    block = torch.randint(blocks, (m,), generator=g)
    choice = torch.rand(batch, heads, n, blocks, generator=g) < share
    return choice, block.sort().values if ordered else block


def qkv(batch, heads, kv_heads, n, m, dim=8, v_dim=5, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, m, dim, generator=g, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, m, v_dim, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def dense(q, k, v, choice, block, scale=None):
    """One softmax over the chosen keys, in plain torch; 0 where nothing is chosen."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = choice[..., block]
    logits = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~mask, -1e30)
    weights = torch.softmax(logits, -1) * mask
    return weights @ v


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "blocks"), [(1, 1, 1), (7, 5, 3), (63, 75, 2), (111, 500, 13), (131, 131, 131)]
)
def test_the_layout_holds_the_chosen_pairs(n, m, blocks, ordered):
    choice, block = case(2, 3, n, m, blocks, seed=n, ordered=ordered)
    layout = choice_layout(choice, block)
    held = block.tolist()
    want = torch.tensor(
        [[[[row[c] for c in held] for row in head] for head in one] for one in choice.tolist()]
    )
    assert torch.equal(layout.to_dense(), want)
    assert layout == BlockLayout.from_mask(want)
    layout._validate()


def test_nothing_and_everything():
    block = torch.arange(75) // 10
    for value in (False, True):
        layout = choice_layout(torch.full((1, 2, 70, 8), value), block)
        assert layout.area == 2 * 70 * 75 * value
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 1, 70, 75))
    out = choice_attention(q, k, v, torch.zeros(1, 2, 70, 8, dtype=torch.bool), block)
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("rows", [1, 1 << 18])  # one head per call of the engine, and all together
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "n", "m", "blocks"),
    [(1, 1, 1, 1, 3, 1), (2, 4, 2, 63, 75, 5), (1, 3, 1, 111, 131, 13), (2, 2, 2, 131, 67, 40)],
)
def test_gathered_attention_is_one_softmax_with_its_gradients(
    batch, heads, kv_heads, n, m, blocks, rows, monkeypatch
):
    monkeypatch.setattr(module, "ROWS", rows)
    choice, block = case(batch, heads, n, m, blocks, seed=n)
    choice[:, :, n // 2] = False  # a query that sees nothing
    leaves = [t.requires_grad_() for t in qkv(batch, heads, kv_heads, n, m)]
    out = choice_attention(*leaves, choice, block, scale=0.7)
    want = dense(*leaves, choice, block, scale=0.7)
    torch.testing.assert_close(out, want, atol=1e-10, rtol=0)
    towards = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for got, exact in zip(
        torch.autograd.grad(out, leaves, towards), torch.autograd.grad(want, leaves, towards), strict=True
    ):
        torch.testing.assert_close(got, exact, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_on_the_native_engine(dtype):
    choice, block = case(2, 4, 300, 300, 7, share=0.5)
    choice[..., 0] = True
    leaves = [t.requires_grad_() for t in qkv(2, 4, 2, 300, 300, dim=16, v_dim=16, dtype=dtype)]
    out = choice_attention(*leaves, choice, block, engine="native")
    layout = choice_layout(choice, block)
    whole = fv.attention(*leaves, layout, engine="native")
    exact = [t.detach().double().requires_grad_() for t in leaves]
    gold = dense(*exact, choice, block)
    assert out.dtype == dtype
    # no further from the definition than twice the engine's own single call over the same pairs
    assert (out.double() - gold).abs().max() <= 2 * (whole.double() - gold).abs().max() + 1e-7
    got, one, want = (
        torch.autograd.grad(o.sum(), i) for o, i in ((out, leaves), (whole, leaves), (gold, exact))
    )
    for a, b, c in zip(got, one, want, strict=True):
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_an_empty_block_and_masked_nan_do_not_matter():
    choice, block = case(1, 2, 70, 75, 4)
    block[block == 2] = 3  # block 2 has no keys
    choice[..., 2] = True
    q, k, v = qkv(1, 2, 2, 70, 75)
    torch.testing.assert_close(choice_attention(q, k, v, choice, block), dense(q, k, v, choice, block))
    choice[..., 1] = False
    want = choice_attention(q, k, v, choice, block)
    k[:, :, block == 1], v[:, :, block == 1] = torch.nan, torch.nan
    assert torch.equal(choice_attention(q, k, v, choice, block), want)


def test_inputs_are_checked():
    choice, block = case(1, 2, 7, 9, 3)
    q, k, v = qkv(1, 2, 1, 7, 9)
    with pytest.raises(TypeError, match="choice must be a bool tensor"):
        choice_layout(choice.int(), block)
    with pytest.raises(TypeError, match="block must be an int64 tensor"):
        choice_layout(choice, block.int())
    with pytest.raises(ValueError, match=r"below 3.*got 0 to 5"):
        choice_layout(choice, torch.tensor([0, 5]))
    for a, b, c in (
        (q[:, :1], k, v),
        (q, k[:, :, :8], v),
        (q, k, v[:, :, :8]),
        (q[0], k, v),
        (q, k[:, :0], v),
    ):
        with pytest.raises(ValueError, match="needs q"):
            choice_attention(a, b, c, choice, block)


def test_second_derivatives_are_refused():
    choice, block = case(1, 2, 7, 9, 3)
    q, k, v = qkv(1, 2, 1, 7, 9)
    q.requires_grad_()
    out = choice_attention(q, k, v, choice, block).square().sum()
    (grad,) = torch.autograd.grad(out, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
