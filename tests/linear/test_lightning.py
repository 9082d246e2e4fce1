"""Lightning attention: the definition, the written-out gradients, the state, and that nothing grows as N^2."""

from __future__ import annotations

import itertools

import pytest
import torch

from foveate.catalogue.lab.counting import multiply_adds
from foveate.linear import (
    LightningAttention,
    LightningFunction,
    alibi_decay,
    lightning_attention,
    lightning_step,
    linear_attention,
)
from foveate.linear.lightning import VARIANTS


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(n, heads=3, kv_heads=3, batch=2, d=5, e=7, dtype=torch.float64):
    return (
        normal(batch, heads, n, d, seed=1, dtype=dtype),
        normal(batch, kv_heads, n, d, seed=2, dtype=dtype),
        normal(batch, kv_heads, n, e, seed=3, dtype=dtype),
    )


DECAY = torch.tensor([0.0, 0.07, 1.3])


def definition(q, k, v, decay, state=None):
    """(out, state) by the sum, one query at a time; grouped heads by index."""
    k, v = (torch.stack([t[:, h * t.shape[1] // q.shape[1]] for h in range(q.shape[1])], 1) for t in (k, v))
    lam, n = torch.exp(-decay.double())[:, None], q.shape[2]  # (H, 1)
    rows = []
    for t in range(n):
        o = 0 if state is None else lam ** (t + 1) * torch.einsum("bhd,bhde->bhe", q[:, :, t], state)
        for j in range(t + 1):
            o = o + lam ** (t - j) * (q[:, :, t] * k[:, :, j]).sum(-1, keepdim=True) * v[:, :, j]
        rows.append(o)
    after = torch.einsum("hn,bhnd,bhne->bhde", lam ** (n - 1 - torch.arange(n)), k, v)
    return torch.stack(rows, 2), after if state is None else after + lam[..., None] ** n * state


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "block"), [(1, 64), (13, 1), (13, 7), (16, 8), (23, 23), (23, 500)])
def test_output_state_and_gradients_are_the_definition(n, block, variant):
    leaves = [t.requires_grad_() for t in (*inputs(n), normal(2, 3, 5, 7, seed=4))]
    q, k, v, start = leaves
    found = lightning_attention(
        q, k, v, DECAY, block=block, variant=variant, initial_state=start, return_state=True
    )
    want = definition(q, k, v, DECAY, start)
    up = (normal(2, 3, n, 7, seed=5), normal(2, 3, 5, 7, seed=6))
    grads = [torch.autograd.grad(pair, leaves, up) for pair in (found, want)]
    for got, right in zip((*found, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(got, right, atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_with_a_tail_and_the_state(variant):
    leaves = [t.requires_grad_() for t in (*inputs(11, batch=1, d=2, e=3), normal(1, 3, 2, 3, seed=4))]

    def run(q, k, v, s):
        return lightning_attention(
            q, k, v, DECAY, block=4, variant=variant, initial_state=s, return_state=True
        )

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_and_their_gradients(kv_heads, variant):
    q, k, v = leaves = [t.requires_grad_() for t in inputs(19, heads=4, kv_heads=kv_heads)]
    s = alibi_decay(4)
    found = lightning_attention(q, k, v, s, block=8, variant=variant)
    want = definition(q, k, v, s)[0]
    torch.testing.assert_close(found, want, atol=1e-9, rtol=0)
    up = normal(*want.shape, seed=5)
    for got, right in zip(*(torch.autograd.grad(o, leaves, up) for o in (found, want)), strict=True):
        torch.testing.assert_close(got, right, atol=1e-9, rtol=0)


@pytest.mark.parametrize("n", [64, 193])
def test_float32_blocks_and_variants_agree(n):
    q, k, v = inputs(n, dtype=torch.float32)
    want = lightning_attention(q.double(), k.double(), v.double(), DECAY, block=n)
    scale = want.abs().amax()
    for block, variant in itertools.product((1, 7, 16, 64, n), VARIANTS):
        out = lightning_attention(q, k, v, DECAY, block=block, variant=variant)
        assert (out - want).abs().max() < 1e-5 * scale


def test_limits_of_the_decay():
    q, k, v = inputs(21)
    plain = torch.tril(q @ k.transpose(2, 3)) @ v
    for decay in (None, torch.zeros(3)):
        torch.testing.assert_close(lightning_attention(q, k, v, decay, block=8), plain, atol=1e-10, rtol=0)
    own = (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(
        lightning_attention(q, k, v, torch.full((3,), 1e4), block=8), own, atol=1e-10, rtol=0
    )


def test_decays_are_the_published_slopes():
    for layers in (1, 2, 24):
        want = torch.tensor([2.0**-p for p in range(1, 9)]) * (1 + 1e-5)
        torch.testing.assert_close(alibi_decay(8, 0, layers), want, atol=0, rtol=1e-6)
    assert alibi_decay(8, 23, 24).max() < 1e-4
    torch.testing.assert_close(alibi_decay(4, 1, 3), 0.50001 * 2.0 ** -torch.tensor([2.0, 4, 6, 8]))
    first, second = (2.0 ** (-8 * (torch.arange(c) + 1) / c) for c in (4, 8))
    want = torch.cat([first, second[::2][:2]]) * (1 + 1e-5)
    torch.testing.assert_close(alibi_decay(6), want)
    text = alibi_decay(4, 1, 4, form="text")
    torch.testing.assert_close(text, torch.tensor([0.0, 1.5, 3.0, 4.5]))
    for heads in range(1, 20):
        assert alibi_decay(heads, 2, 5).shape == (heads,)


def test_fast_heads_and_long_sequences_stay_finite():
    q, k, v = (t.requires_grad_() for t in inputs(500, dtype=torch.float32))
    for variant in VARIANTS:
        out = lightning_attention(q, k, v, torch.tensor([0.0, 3.0, 300.0]), variant=variant)
        for t in (out, *torch.autograd.grad(out.square().sum(), (q, k, v))):
            assert t.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cut", [1, 16, 20])
def test_a_prefix_and_then_steps(cut, variant):
    q, k, v = inputs(29, heads=4, kv_heads=2)
    s = alibi_decay(4)
    full, final = lightning_attention(q, k, v, s, block=8, variant=variant, return_state=True)
    first = [t[:, :, :cut] for t in (q, k, v)]
    out, state = lightning_attention(*first, s, block=16, variant=variant, return_state=True)
    parts = [out]
    for t in range(cut, 29):
        o, state = lightning_step(state, q[:, :, t], k[:, :, t], v[:, :, t], s)
        parts.append(o.unsqueeze(2))
    torch.testing.assert_close(torch.cat(parts, 2), full, atol=1e-9, rtol=0)
    torch.testing.assert_close(state, final, atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_may_be_split(variant):
    q, k, v = inputs(40, d=6)
    whole = lightning_attention(q, k, v, DECAY, block=16, variant=variant)
    halves = [lightning_attention(q[..., h], k[..., h], v, DECAY, block=16, variant=variant)
              for h in (slice(0, 3), slice(3, 6))]  # fmt: skip
    torch.testing.assert_close(halves[0] + halves[1], whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_future_reaches_nobody(variant):
    q, k, v = (t.requires_grad_() for t in inputs(50, dtype=torch.float32))
    out = lightning_attention(q, k, v, DECAY, block=16, variant=variant)
    for t in (k, v):
        grad = torch.autograd.grad(out[:, :, :37].sum(), t, retain_graph=True)[0]
        assert not grad[:, :, 37:].any()
        assert grad[:, :, :37].any()
    moved = [torch.cat([t[:, :, :37], 1 - 2 * t[:, :, 37:]], 2) for t in (q, k, v)]
    assert torch.equal(
        lightning_attention(*moved, DECAY, block=16, variant=variant)[:, :, :37], out[:, :, :37]
    )


def test_bfloat16_is_summed_in_float32():
    q, k, v = (t.bfloat16().requires_grad_() for t in inputs(2000, d=16, e=16))
    for variant in VARIANTS:
        out, state = lightning_attention(q, k, v, DECAY, variant=variant, return_state=True)
        assert out.dtype == torch.bfloat16
        assert state.dtype == torch.float32
        exact, right = lightning_attention(*(t.double() for t in (q, k, v)), DECAY, return_state=True)
        assert (out - exact).norm() < 2**-8 * exact.norm()  # the rounding of the result alone
        assert (state - right).norm() < 1e-5 * right.norm()
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        want = torch.autograd.grad(lightning_attention(*wide, DECAY).sum(), wide)
        for got, g in zip(grads, want, strict=True):
            assert got.dtype == torch.bfloat16
            assert (got - g).norm() < 2**-8 * g.norm()


def test_strides_and_no_tokens():
    q, k, v = inputs(45)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    for variant in VARIANTS:
        want = lightning_attention(q, k, v, DECAY, variant=variant)
        torch.testing.assert_close(
            lightning_attention(*turned, DECAY, variant=variant), want, atol=1e-12, rtol=0
        )
        none, state = lightning_attention(*(t[:, :, :0] for t in (q, k, v)), DECAY, variant=variant,
                                          return_state=True)  # fmt: skip
        assert none.shape == (2, 3, 0, 7)
        assert not state.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_linear_attention_with_a_constant_decay(variant):
    q, k, v = inputs(150, heads=3, kv_heads=3)
    found = lightning_attention(q, k, v, DECAY, variant=variant, return_state=True)
    out, state = linear_attention(q, k, v, log_decay=-DECAY, return_state=True)
    torch.testing.assert_close(
        found, (out, state.kv.to(found[1])), atol=1e-4, rtol=1e-5
    )  # a float32 state there


# ------------------------------------------------------------------------------------------------ what it costs
def kept(make):
    """Bytes kept for the backward pass of make()."""
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        make()
    return sum(held.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_inputs_are_kept(variant):
    for n in (1024, 2048):
        q, k, v = (t.requires_grad_() for t in inputs(n, heads=2, kv_heads=2, batch=1, d=16, e=16))
        total = kept(lambda q=q, k=k, v=v: lightning_attention(q, k, v, DECAY[:2], variant=variant))
        assert total == 3 * q.nbytes + 2 * 16 * 16 * 8 + DECAY.nbytes  # q, k, v, the first state, the decays


@pytest.mark.parametrize("variant", VARIANTS)
def test_multiply_adds_grow_as_the_tokens(variant):
    found = []
    for n in (512, 2048):
        q, k, v = (t.requires_grad_() for t in inputs(n, heads=1, kv_heads=1, batch=1, d=16, e=16))
        run = lambda q=q, k=k, v=v: lightning_attention(q, k, v, DECAY[:1], variant=variant).sum().backward()  # noqa: E731
        found.append(multiply_adds(run) / n)
    assert found == [(8 * 64 * 16 + 7 * 16 * 16)] * 2  # eight products inside tiles, seven with the state


# ------------------------------------------------------------------------------------------------------- errors
def test_errors_name_the_argument():
    q, k, v = inputs(9)
    with pytest.raises(ValueError, match=r"shapes must be q \(B, H, N, D\)"):
        lightning_attention(q, k[:, :2], v[:, :2], DECAY)
    with pytest.raises(ValueError, match="shapes must be"):
        lightning_attention(q, k[:, :, 1:], v[:, :, 1:], DECAY)
    with pytest.raises(ValueError, match=r"one floating point dtype, got torch.float64, torch.float32"):
        lightning_attention(q, k.float(), v, DECAY)
    with pytest.raises(ValueError, match="variant must be one of chunk_loop, parallel, got 'fast'"):
        lightning_attention(q, k, v, DECAY, variant="fast")
    for block in (0, 2.0, True):
        with pytest.raises(ValueError, match="block must be an int >= 1, got"):
            lightning_attention(q, k, v, DECAY, block=block)
    for decay in (DECAY[:2], -DECAY, DECAY / 0, DECAY.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"decay must be \(3,\), one per head"):
            lightning_attention(q, k, v, decay)
    with pytest.raises(
        ValueError, match=r"the state must be \(B, H, D, E\) = \(2, 3, 5, 7\), got \(2, 3, 7, 5\)"
    ):
        lightning_attention(q, k, v, DECAY, initial_state=normal(2, 3, 7, 5))
    for arguments in ((0,), (4, 2, 2), (4, -1, 2)):
        with pytest.raises(ValueError, match="heads >= 1 and 0 <= layer < layers"):
            alibi_decay(*arguments)
    with pytest.raises(ValueError, match="form must be one of slopes, text, got 'x'"):
        LightningAttention(form="x")


def test_it_differentiates_once_only():
    q, k, v = (t.requires_grad_() for t in inputs(9))
    grad = torch.autograd.grad(lightning_attention(q, k, v, DECAY).square().sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    assert issubclass(LightningFunction, torch.autograd.Function)
