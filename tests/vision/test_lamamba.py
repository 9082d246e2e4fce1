"""LaMamba-Diff: snake orders, the scan against a loop, the identity at the start, windows, the U-Net's sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from foveate.vision import LaMambaBlock, LaMambaUNet, PatchExpand, SelectiveScan2D, lamamba_unet, snake_orders
from foveate.vision.lamamba import scan

GRIDS = [(4, 4), (8, 8), (5, 5), (7, 3), (2, 6), (1, 5), (5, 1)]


def made(kind, *arguments, seed=0, std=0.3, **options):
    """A module in float64 and eval mode with random weights."""
    torch.manual_seed(seed)
    module = kind(*arguments, **options).double().eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std)
    return module


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS)
def test_consecutive_cells_of_every_order_touch(grid):
    orders, inverse = snake_orders(*grid)
    n = grid[0] * grid[1]
    y, x = orders // grid[1], orders % grid[1]
    assert ((y.diff(dim=1).abs() + x.diff(dim=1).abs()) == 1).all()
    for k in range(4):
        assert orders[k].sort().values.tolist() == list(range(n))
        assert orders[k][inverse[k]].tolist() == list(range(n))
    assert orders[1].tolist() == orders[0].tolist()[::-1]
    assert orders[3].tolist() == orders[2].tolist()[::-1]
    assert orders[0, 0] == 0
    assert orders[2, 0] == (grid[0] - 1) * grid[1]  # bottom left


def test_orders_of_a_small_map():
    assert snake_orders(2, 2)[0].tolist() == [[0, 1, 3, 2], [2, 3, 1, 0], [2, 0, 1, 3], [3, 1, 0, 2]]
    with pytest.raises(ValueError, match="sides must be >= 1, got 0 and 3"):
        snake_orders(0, 3)


def looped(layer, x):
    """The scan step by step, cell by cell."""
    (b, h, w, _), inner, s = x.shape, layer.inner, layer.state
    u, z = layer.in_proj(x).split(inner, -1)
    u = F.silu(layer.conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, Ci)
    total = torch.zeros_like(u)
    for k, order in enumerate(snake_orders(h, w)[0].tolist()):
        state = torch.zeros(b, inner, s, dtype=x.dtype)
        for cell in order:
            r, into, out = (u[:, cell] @ layer.x_proj[k].T).split([layer.rank, s, s], 1)
            delta = torch.log1p(torch.exp(r @ layer.delta_proj[k].T + layer.delta_bias[k]))  # (B, Ci)
            keep = torch.exp(-delta[..., None] * torch.exp(layer.log_decay[k]))
            state = keep * state + delta[..., None] * into[:, None] * u[:, cell, :, None]
            y = (state * out[:, None]).sum(2) + layer.skip[k] * u[:, cell]
            total = total + F.one_hot(torch.tensor(cell), h * w)[None, :, None] * y[:, None]
    y = F.layer_norm(total, (inner,), layer.norm.weight, layer.norm.bias)
    return layer.out_proj(y.view(b, h, w, inner) * F.silu(z))


@pytest.mark.parametrize(("grid", "state"), [((4, 4), 1), ((3, 5), 3), ((1, 1), 2), ((7, 3), 1)])
def test_the_scan_is_its_loop(grid, state):
    layer, x = made(SelectiveScan2D, 6, state=state, rank=2), normal(2, *grid, 6)
    torch.testing.assert_close(layer(x), looped(layer, x), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 131])
def test_the_chunked_recurrence_is_its_loop(n):
    a, b = torch.sigmoid(normal(2, 3, n)), normal(2, 3, n, seed=1)
    a[0, 0, n // 2] = 0.0
    h, want = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(n):
        h = a[..., t] * h + b[..., t]
        want.append(h)
    torch.testing.assert_close(scan(a, b), torch.stack(want, -1), atol=1e-13, rtol=0)


def test_an_impulse_without_the_skip():
    layer = made(SelectiveScan2D, 4, rank=1)
    with torch.no_grad():
        layer.skip.zero_()
    x = torch.zeros(1, 5, 4, 4, dtype=torch.float64)
    x[0, 2, 1] = normal(4)
    torch.testing.assert_close(layer(x), looped(layer, x), atol=1e-12, rtol=1e-12)
    again = made(SelectiveScan2D, 4, rank=1).float()
    assert torch.allclose(again(x.float()), made(SelectiveScan2D, 4, rank=1)(x).float(), atol=1e-5)


def test_every_cell_reads_every_other():
    layer = SelectiveScan2D(8).double()
    x = normal(1, 5, 6, 8).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0, 4, 1].sum(), x)
    assert (grad.abs().sum(-1) > 0).all()


def test_how_the_scan_starts():
    torch.manual_seed(0)
    layer = SelectiveScan2D(64, state=3)
    steps = F.softplus(layer.delta_bias.detach())
    assert 0.00099 < float(steps.min()) < 0.0015
    assert 0.06 < float(steps.max()) < 0.1001
    assert torch.allclose(layer.log_decay.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(4, 128, 3))
    assert (layer.skip == 1).all()
    assert layer.rank == 4


@pytest.mark.parametrize("cond_dim", [16, 5])
def test_a_block_is_the_identity_at_the_start(cond_dim):
    block, x = LaMambaBlock(16, 2, cond_dim=cond_dim, window=3), torch.randn(2, 5, 7, 16)
    assert torch.equal(block(x, torch.randn(2, cond_dim)), x)


@pytest.mark.parametrize("project", [None, True])
def test_the_block_is_its_formula(project):
    block, x, c = (
        made(LaMambaBlock, 8, 2, cond_dim=8, window=3, shift=1, project=project),
        normal(2, 5, 4, 8),
        normal(2, 8),
    )
    given = c if project is None else c @ block.cond_proj.weight.T + block.cond_proj.bias
    vectors = block.modulation(given * torch.sigmoid(given)).view(2, 9, 1, 1, 8)
    y = x
    for i, (norm, branch) in enumerate(zip(block.norms, block.branches, strict=True)):
        shift, scale, gate = vectors[:, 3 * i], vectors[:, 3 * i + 1], vectors[:, 3 * i + 2]
        y = y + gate * branch(F.layer_norm(y, (8,), norm.weight, norm.bias) * (1 + scale) + shift)
    torch.testing.assert_close(block(x, c), y, atol=1e-12, rtol=1e-12)
    assert [type(branch).__name__ for branch in block.branches] == [
        "SelectiveScan2D",
        "ShiftedWindowAttention",
        "Mlp",
    ]


def seen(blocks, x, c, cell):
    """bool (H, W): which cells move one."""
    y = x.clone().requires_grad_()
    out = y
    for block in blocks:
        out = block(out, c)
    (grad,) = torch.autograd.grad((out[0, cell[0], cell[1]] * normal(x.shape[3], seed=9)).sum(), y)
    return grad[0].abs().sum(-1) > 0


def test_windows_are_crossed_by_a_shift_or_by_the_scan():
    x, c = normal(1, 8, 8, 8), normal(1, 8)
    make = lambda shift, scan: made(  # noqa: E731
        LaMambaBlock, 8, 2, cond_dim=8, window=4, shift=shift, scan=scan, seed=shift
    )
    own = torch.zeros(8, 8, dtype=torch.bool)
    own[:4, :4] = True
    assert torch.equal(seen([make(0, False)], x, c, (1, 1)), own)
    assert torch.equal(seen([make(0, False), make(0, False)], x, c, (1, 1)), own)
    crossed = seen([make(2, False), make(0, False)], x, c, (1, 1))
    assert bool((crossed & ~own).any())
    assert not bool(crossed.all())
    assert bool(seen([make(0, True)], x, c, (1, 1)).all())


def test_expanding_is_its_formula():
    layer, x = made(PatchExpand, 8), normal(2, 3, 2, 8)
    wide, out = x @ layer.expand.weight.T, layer(x)
    for i in range(2):
        for j in range(2):
            part = wide[..., 4 * (2 * i + j) : 4 * (2 * i + j) + 4]
            want = F.layer_norm(part, (4,), layer.norm.weight, layer.norm.bias)
            torch.testing.assert_close(out[:, i::2, j::2], want, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("base", "parameters"), [(320, 652_484_648), (96, 59_573_000), (128, 105_352_424), (256, 418_210_920)]
)
def test_parameters(base, parameters):
    with torch.device("meta"):
        model = lamamba_unet(base=base)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [len(level) for level in model.down] == [2, 2, 2, 2]
    assert [len(level) for level in model.up] == [3, 3, 3, 3]
    assert [block.branches[1].shift for block in model.up[0]] == [(0, 0), (4, 4), (0, 0)]


def small(**options):
    given = {"depths": (1, 1, 1, 1), "middle": 1, "heads": 2, "window": 3, "num_classes": 4, "side": 6}
    return LaMambaUNet(8, **{**given, **options})


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (1, 3), (11, 4)])
def test_any_size_and_a_gradient_for_every_parameter(size):
    model, x = made(small), normal(2, 4, *size).requires_grad_()
    out = model(x, torch.tensor([1, 900]), torch.tensor([0, 4]))
    assert out.shape == (2, 8, *size)
    out.square().sum().backward()
    assert x.grad is not None
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
    alone = model(x[1:], torch.tensor([900]), torch.tensor([4]))
    torch.testing.assert_close(alone, out[1:].detach(), atol=1e-10, rtol=1e-9, check_device=False)


def test_the_start_of_the_denoiser():
    torch.manual_seed(0)
    model, x, y = small().eval(), torch.randn(1, 4, 6, 6), torch.tensor([2])
    outs = [model(x, torch.tensor([t]), y) for t in (3, 800)]
    assert torch.equal(*outs)  # no condition reaches anything while all modulations are zero
    assert torch.equal(outs[0], model(x, torch.tensor([3]), torch.tensor([4])))
    skip = model.embed_norm(model.embed(x).permute(0, 2, 3, 1)) + model.positions
    assert torch.equal(model.down[0][0](skip, model.condition(torch.tensor([3]), y)), skip)


def test_classes_are_dropped_in_train_mode_alone():
    model, t = small(class_dropout=0.5), torch.zeros(200)
    y = torch.zeros(200, dtype=torch.int64)
    found = model.train().condition(t, y)
    none = model.eval().condition(t, torch.full_like(y, 4))
    share = float((found == none).all(1).float().mean())
    assert 0.35 < share < 0.65
    assert torch.equal(model.condition(t, y)[0], model.condition(t, y)[-1])


def test_guidance():
    model, x, t, y = made(small), normal(2, 4, 6, 6), torch.tensor([5, 80]), torch.tensor([1, 3])
    given, none = model(x, t, y), model(x, t, torch.tensor([4, 4]))
    out = model.guided(x, t, y, 3.0)
    torch.testing.assert_close(out[:, :4], none[:, :4] + 3 * (given - none)[:, :4], atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(out[:, 4:], given[:, 4:], atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(model.guided(x, t, y, 1.0), given, atol=1e-10, rtol=1e-9)


def test_gradients_and_strides():
    layer, x = made(SelectiveScan2D, 4, expand=1, rank=1), normal(1, 3, 2, 4)
    assert torch.autograd.gradcheck(layer, (x.clone().requires_grad_(),))
    strided = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    torch.testing.assert_close(layer(strided), layer(x), atol=1e-13, rtol=0)


def test_errors_name_the_argument():
    x, t = torch.zeros(2, 4, 6, 6), torch.zeros(2)
    for call, says in (
        (lambda: SelectiveScan2D(8, state=0), "state must be an int >= 1, got 0"),
        (lambda: SelectiveScan2D(8)(torch.zeros(1, 5, 8)), r"x must be \(B, H, W, 8\), got \(1, 5, 8\)"),
        (
            lambda: LaMambaBlock(8, 2, cond_dim=4, project=False),
            "project=False needs cond_dim = dim, got 4 and 8",
        ),
        (lambda: LaMambaBlock(8, 3, cond_dim=4), "dim must be a multiple of heads, got 8 and 3"),
        (lambda: small(depths=(1, 1)), r"depths must have four values, got \(1, 1\)"),
        (lambda: LaMambaUNet(10, heads=2), "base must be a multiple of 4 and of heads 2, got 10"),
        (lambda: small(class_dropout=1.0), r"class_dropout must be in \[0, 1\), got 1.0"),
        (lambda: small()(x[:, :3], t, t.long()), r"x must be \(B, 4, H, W\)"),
        (lambda: small()(x, t[:1], t.long()), r"t and y must be \(2,\), got \(1,\), \(2,\)"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_the_unet_is_its_formula():
    model, x, t, y = made(small), normal(2, 4, 6, 6), torch.tensor([5, 80]), torch.tensor([1, 3])
    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)  # float32
    waves = torch.cat([angles.cos(), angles.sin()], 1).double()
    c = model.time[2](F.silu(model.time[0](waves))) + model.classes.weight[y]
    a = model.embed_norm(model.embed(x).permute(0, 2, 3, 1)) + model.positions
    a = model.down[0][0](a, c)  # 6 x 6
    b = model.down[1][0](model.merges[0](a), c)  # 3 x 3
    d = model.down[2][0](model.merges[1](b), c)  # 2 x 2
    e = model.down[3][0](d, c)
    z = e + model.middle[0](e, c)
    for level, skip, expand in zip(model.up, (e, d, b, a), (None, None, *model.expands), strict=True):
        z = z if expand is None else expand(z)[:, : skip.shape[1], : skip.shape[2]]
        z = level[1](level[0](z + skip, c), c)
    shift, scale = model.last_modulation(F.silu(model.last_cond(c))).unflatten(1, (2, 1, 1, 8)).unbind(1)
    z = F.layer_norm(model.last_norm(model.last(z)), (8,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(model(x, t, y), model.out(z).permute(0, 3, 1, 2), atol=1e-9, rtol=1e-9)
