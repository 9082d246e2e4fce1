"""Local linear attention against explicit least squares for every query, and what must hold of it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import foveate as fv
from foveate.linear import global_ridge, local_linear_attention
from foveate.patterns import Causal, SlidingWindow

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def inputs(n, m=None, heads=4, kv_heads=2, batch=2, d=5, dv=3, dtype=F64):
    m = n if m is None else m
    shapes = (batch, heads, n, d), (batch, kv_heads, m, d), (batch, kv_heads, m, dv)
    return [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes, 1)]


def least_squares(q, k, v, w, reg):
    """The intercept for one query: q (D,), k (M, D), v (M, Dv), w (M,), by lstsq on the stacked problem."""
    z, root = k - q, w.sqrt()[:, None]
    design = torch.cat([torch.ones(len(k), 1, dtype=F64), z], 1) * root
    ridge = torch.cat([torch.zeros(len(q), 1, dtype=F64), reg**0.5 * torch.eye(len(q), dtype=F64)], 1)
    target = torch.cat([v * root, torch.zeros(len(q), v.shape[1], dtype=F64)])
    return torch.linalg.lstsq(torch.cat([design, ridge]), target, driver="gelsd").solution[0]


def oracle(q, k, v, seen, reg, scale):
    """Everything by loops; seen bool (N, M)."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=F64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys, values = k[b, h // group, seen[i]], v[b, h // group, seen[i]]
                w = torch.softmax(scale * keys @ q[b, h, i], 0)
                if len(w):
                    out[b, h, i] = least_squares(q[b, h, i], keys, values, w, reg)
    return out


MASKS = {
    "full": lambda n, m: torch.ones(n, m, dtype=torch.bool),
    "causal": lambda n, m: torch.ones(n, m, dtype=torch.bool).tril(m - n),
    "random": lambda n, m: torch.rand(n, m, generator=torch.Generator().manual_seed(7)) < 0.4,
}


@pytest.mark.parametrize("solver", ["dense", "cg"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("n", "m"), [(13, 13), (3, 31), (1, 1)])
def test_is_the_intercept_of_a_weighted_ridge(n, m, kind, solver):
    q, k, v = inputs(n, m, batch=1)
    seen = MASKS[kind](n, m)
    mask = seen if kind == "random" else None
    out = local_linear_attention(q, k, v, reg=0.03, mask=mask, causal=kind == "causal", solver=solver,
                                 cg_iters=40, tol=1e-14, block_q=4, block_k=6)  # fmt: skip
    torch.testing.assert_close(out, oracle(q, k, v, seen, 0.03, 5**-0.5), atol=1e-8, rtol=0)


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_weights_sum_to_one_and_may_be_negative(solver):
    q, k, _ = inputs(31, 31)
    eye = torch.eye(31, dtype=F64).expand(2, 2, 31, 31)
    s = local_linear_attention(
        3 * q, k, eye, solver=solver, cg_iters=3, tol=0.0
    )  # even far from the solution
    torch.testing.assert_close(s.sum(-1), torch.ones_like(s[..., 0]), atol=1e-10, rtol=0)
    assert (s < -0.01).any()


@pytest.mark.parametrize("causal", [False, True])
def test_large_reg_is_softmax_attention(causal):
    q, k, v = inputs(61)
    out = local_linear_attention(q, k, v, reg=1e12, causal=causal)
    torch.testing.assert_close(out, fv.attention(q, k, v, is_causal=causal), atol=1e-9, rtol=0)


def test_affine_values_are_fitted_outside_the_hull():
    q, k, _ = inputs(11, 97, kv_heads=4)
    q, slope, shift = 6 * q, normal(5, 3, seed=8), normal(3, seed=9)
    v, want = k @ slope + shift, q @ slope + shift
    out = local_linear_attention(q, k, v, reg=1e-10, scale=0.2)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    assert (fv.attention(q, k, v) - want).abs().max() > 1  # softmax cannot leave the hull
    torch.testing.assert_close(global_ridge(q, k, v, reg=1e-12), want, atol=1e-8, rtol=0)


def test_equal_weights_are_the_global_ridge():
    q, k, v = inputs(23, 41)
    reg = torch.tensor([0.1, 0.3, 1.0, 2.0], dtype=F64)
    want = global_ridge(q, k, v, reg=reg)
    torch.testing.assert_close(local_linear_attention(q, k, v, reg=reg, scale=0.0), want, atol=1e-12, rtol=0)


def test_d_steps_of_conjugate_gradients_solve_it():
    q, k, v = inputs(67, d=8)
    want = local_linear_attention(q, k, v)
    found = [
        (local_linear_attention(q, k, v, solver="cg", cg_iters=t, tol=0.0) - want).abs().max()
        for t in (2, 4, 8)
    ]
    assert found[2] < 1e-5 < found[1] < found[0]


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_blocks_do_not_matter(solver):
    q, k, v = inputs(61, 89)
    grads = []
    for block_q, block_k in ((61, 89), (1, 7), (16, 200), (64, 32)):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = local_linear_attention(*leaves, causal=True, solver=solver, block_q=block_q, block_k=block_k)
        grads.append([out.detach(), *torch.autograd.grad((out * normal(*out.shape, seed=5)).sum(), leaves)])
    for found in grads[1:]:
        for got, want in zip(found, grads[0], strict=True):
            torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_a_constant_on_all_logits_changes_nothing():
    """A key coordinate that is the same everywhere adds a constant to a row, and no spread."""
    q, k, v = inputs(31)
    more = [torch.cat([t, torch.full_like(t[..., :1], c)], -1) for t, c in ((q, 3.0), (k, 3.0))]
    out = local_linear_attention(*more, v, scale=0.4)
    torch.testing.assert_close(out, local_linear_attention(q, k, v, scale=0.4), atol=1e-11, rtol=0)


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_patterns_are_masks(solver):
    q, k, v = inputs(41)
    pattern = Causal() & SlidingWindow(9)
    dense = pattern.layout(41).to_dense()
    one = local_linear_attention(q, k, v, mask=pattern, solver=solver, block_q=8, block_k=8)
    want = local_linear_attention(q, k, v, mask=dense, solver=solver)
    torch.testing.assert_close(one, want, atol=1e-10, rtol=0)
    window = local_linear_attention(q[:, :, 30:31], k[:, :, 22:31], v[:, :, 22:31], solver=solver)
    torch.testing.assert_close(one[:, :, 30:31], window, atol=1e-10, rtol=0)


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_rows_that_see_nothing_give_nothing(solver):
    q, k, v = (t.requires_grad_() for t in inputs(9))
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[4] = False
    out, lse = local_linear_attention(q, k, v, mask=mask, solver=solver, return_lse=True)
    assert not out[:, :, 4].any()
    assert (lse[:, :, 4] == -torch.inf).all()
    out.square().sum().backward()
    assert not q.grad[:, :, 4].any()
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor):
                self.most = max(self.most, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_nothing_is_quadratic_forward_or_backward(solver):
    leaves = [t.requires_grad_() for t in inputs(401, heads=1, kv_heads=1, batch=1, d=4)]
    with Largest() as seen:
        out = local_linear_attention(*leaves, causal=True, solver=solver, cg_iters=2, block_q=64, block_k=64)
        out.sum().backward()
    assert 0 < seen.most <= 64 * 64


def test_more_queries_than_keys():
    q, k, v = inputs(19, 7)
    out = local_linear_attention(q, k, v, causal=True, block_q=4, block_k=2)
    assert not out[:, :, :12].any()
    torch.testing.assert_close(out[:, :, 12:], local_linear_attention(q[:, :, 12:], k, v, causal=True))


def test_lse_is_that_of_softmax_attention():
    q, k, v = inputs(37)
    _, lse = local_linear_attention(q, k, v, causal=True, return_lse=True, block_k=8)
    torch.testing.assert_close(lse, fv.attention(q, k, v, is_causal=True, return_lse=True)[1])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": MASKS["random"](7, 7)}, {"scale": 0.0}])
@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_gradients_are_finite_differences(solver, options):
    q, k, v = (t.requires_grad_() for t in inputs(7, batch=1, heads=2, kv_heads=1, d=3, dv=2))
    reg = torch.tensor([0.2, 0.5], dtype=F64, requires_grad=True)

    def run(q, k, v, reg):
        return local_linear_attention(
            q, k, v, reg=reg, solver=solver, cg_iters=30, tol=1e-14, block_q=3, block_k=2, **options
        )

    assert torch.autograd.gradcheck(run, (q, k, v, reg), fast_mode=True)


def test_gradients_of_few_steps_are_centred():
    """A coordinate that all queries and keys share only shifts logits: gradient 0, also far from the solution."""
    q, k, v = inputs(31, d=16)
    more = [torch.cat([t, torch.full_like(t[..., :1], 3.0)], -1) for t in (q, k)]
    leaf = more[0].requires_grad_()
    out = local_linear_attention(leaf, more[1], v, reg=1e-3, scale=0.4, solver="cg", cg_iters=2, tol=0.0)
    (grad,) = torch.autograd.grad((out * normal(*out.shape, seed=6)).sum(), leaf)
    assert grad[..., -1].abs().max() < 1e-10 < grad.abs().max()


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_low_precision(solver):
    q, k, v = inputs(131, d=16, dtype=torch.float32)
    want = local_linear_attention(*(t.double() for t in (q, k, v)), reg=0.1, solver=solver)
    one = local_linear_attention(q, k, v, reg=0.1, solver=solver)
    assert one.dtype == torch.float32
    torch.testing.assert_close(one.double(), want, atol=2e-4, rtol=0)
    low = [t.bfloat16() for t in (q, k, v)]
    found = local_linear_attention(*low, reg=0.1, solver=solver)
    assert found.dtype == torch.bfloat16
    near = local_linear_attention(*(t.double() for t in low), reg=0.1, solver=solver)
    torch.testing.assert_close(found.double(), near, atol=2e-3, rtol=1e-2)


def test_errors_name_the_argument():
    q, k, v = inputs(9)
    for options, says in (
        ({"solver": "lu"}, "solver must be one of dense, cg, got 'lu'"),
        ({"cg_iters": 0}, "cg_iters must be an int >= 1, got 0"),
        ({"block_q": 2.0}, r"block_q must be an int >= 1, got 2\.0"),
        ({"reg": 0.0}, "reg must be > 0, got 0"),
        ({"reg": torch.ones(3)}, r"reg must be a number or a tensor \(4,\), got shape \(3,\)"),
        (
            {"mask": torch.ones(9, 8, dtype=torch.bool)},
            r"mask must broadcast to \(2, 4, 9, 9\), got \(9, 8\)",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            local_linear_attention(q, k, v, **options)
    with pytest.raises(TypeError, match=r"mask must be a Pattern or a bool tensor, got torch.float64"):
        local_linear_attention(q, k, v, mask=torch.ones(9, 9, dtype=F64))
    with pytest.raises(ValueError, match=r"heads H a multiple of Hkv; got \(2, 3, 9, 5\)"):
        local_linear_attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="reg is too small for these keys"):
        local_linear_attention(q, 1e9 * k, v, reg=1e-9, scale=0.0, causal=True)
