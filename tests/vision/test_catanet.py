"""CATANet: the sorted slices, the centres' average, two softmaxes, and the published sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate.vision.backbone import parameters_of
from foveate.vision.catanet import (
    CATANet,
    ConvFFN,
    OverlapPatchAttention,
    SortedClusters,
    TokenAggregationAttention,
    TokenAggregationBlock,
    TokenCentres,
    catanet_x2,
    catanet_x3,
    catanet_x4,
)


def tensor(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def noisy(module, seed=0):
    module.double()
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.copy_(0.4 * tensor(*p.shape, seed=100 * seed + number))
    return module


def layer(dim=12, heads=2, seed=0, **options) -> TokenAggregationAttention:
    made = noisy(TokenAggregationAttention(dim, heads, **{"qk_dim": 8, "m": 3, "group": 5, **options}), seed)
    made.centres.means.copy_(tensor(*made.centres.means.shape, seed=9))
    return made.eval()


def reflected(n: int, count: int) -> list[int]:
    """0 ... n - 1, n - 1 ... 0, 0 ... , count of them."""
    there = list(range(n))
    return (there + there[::-1]) * (count // (2 * n) + 1)


def sliced(q, k, v, order, group, span=2):
    """A loop over slices of one image and head, q, k, v (N, d); the tail of the sorted order is mirrored."""
    n = len(q)
    size = min(group, n)
    out = torch.zeros(n, v.shape[1], dtype=q.dtype)
    for start in range(0, n, size):
        keys = order[reflected(n, start + span * size)[start : start + span * size]]
        for i in order[start : start + size]:
            out[i] = ((k[keys] @ q[i]) * q.shape[1] ** -0.5).softmax(0) @ v[keys]
    return out


@pytest.mark.parametrize(("n", "group"), [(20, 5), (23, 5), (6, 5), (7, 4), (9, 100), (1, 3), (11, 8)])
@pytest.mark.parametrize("span", [1, 2, 3])
def test_slices_are_the_loop(n, group, span):
    q, k, v = tensor(2, 2, n, 4), tensor(2, 2, n, 4, seed=2), tensor(2, 2, n, 3, seed=3)
    order = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(b)) for b in range(2)])
    got = SortedClusters(group, span).attend(q, k, v, order)
    for b in range(2):
        for h in range(2):
            want = sliced(q[b, h], k[b, h], v[b, h], order[b], group, span)
            torch.testing.assert_close(got[b, h], want, rtol=0, atol=1e-12)


def test_the_tail_is_the_papers():
    """Where there are at least pad + group tokens: the sorted tokens, then the last pad + group of them reversed."""
    n, group = 23, 5
    pad = -n % group
    tail = list(range(n)) + list(range(n))[n - pad - group :][::-1]
    want = [tail[g * group : g * group + 2 * group] for g in range(-(-n // group))]
    assert SortedClusters(group).places(n).tolist() == want


def test_order_sorts_by_the_nearest_centre():
    x, centres = tensor(2, 17, 6), tensor(4, 6, seed=2)
    order = SortedClusters().order(x, centres)
    for b in range(2):
        near = [max(range(4), key=lambda c, t=t: float(F.cosine_similarity(t, centres[c], 0))) for t in x[b]]
        assert order[b].tolist() == sorted(range(17), key=lambda i: near[i])  # both sorts are stable


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (1, 5)])
def test_the_layer_is_the_formula(shape):
    made = layer()
    x = tensor(2, *shape, 12)
    tokens, centres = x.flatten(1, 2), made.centres.means
    order = made.slices.order(tokens, centres)
    out = torch.zeros_like(tokens)
    for b in range(2):
        q, k, v = (tokens[b] @ p.weight.T for p in (made.q_proj, made.k_proj, made.v_proj))
        k_m, v_m = centres @ made.centre_k.weight.T, centres @ made.centre_v.weight.T
        for h in range(2):
            a, c = slice(4 * h, 4 * h + 4), slice(6 * h, 6 * h + 6)
            near = sliced(q[:, a], k[:, a], v[:, c], order[b], 5)
            out[b, :, c] = near + (q[:, a] @ k_m[:, a].T / 2).softmax(1) @ v_m[:, c]
    torch.testing.assert_close(made(x), (out @ made.proj.weight.T).view_as(x), rtol=0, atol=1e-12)


def test_one_slice_is_full_attention():
    made = layer(group=64)
    with torch.no_grad():
        made.centre_v.weight.zero_()
    x = tensor(2, 5, 4, 12)
    split = lambda t: t.flatten(1, 2).unflatten(2, (2, -1)).transpose(1, 2)  # noqa: E731
    q, k, v = (split(p(x)) for p in (made.q_proj, made.k_proj, made.v_proj))
    want = made.proj(fv.attention(q, k, v).transpose(1, 2).flatten(2)).view_as(x)
    torch.testing.assert_close(made(x), want, rtol=0, atol=1e-7)


def test_the_two_softmaxes_are_normalised_by_themselves():
    x, terms = tensor(2, 5, 4, 12), []
    for name in ("centre_v", "v_proj"):
        made = layer()
        with torch.no_grad():
            getattr(made, name).weight.zero_()
        terms.append(made(x))
    whole = layer()
    torch.testing.assert_close(whole(x), terms[0] + terms[1], rtol=0, atol=1e-12)
    # values that are all one vector: each softmax gives it once
    with torch.no_grad():
        whole.v_proj.weight.copy_(whole.centre_v.weight)
        whole.centres.means.copy_(torch.ones(3, 12))
    got = whole(torch.ones_like(x))
    want = whole.proj(2 * whole.centre_v(torch.ones_like(x)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def clustered(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """One update, token by token."""
    sums = [torch.zeros_like(c) for c in centres]
    counts = [0] * len(centres)
    for token in x.flatten(0, 1):
        nearest = max(
            range(len(centres)), key=lambda c: float(F.cosine_similarity(token.detach(), centres[c], 0))
        )
        sums[nearest] = sums[nearest] + token / token.norm()
        counts[nearest] += 1
    found = [s / s.norm() if n else c / c.norm() for s, n, c in zip(sums, counts, centres, strict=True)]
    return torch.stack(found)


@pytest.mark.parametrize("m", [7, 60])
def test_centres_in_training(m):
    made = TokenCentres(m, 6, iters=2).double().train()
    x, y = tensor(2, 33, 6), tensor(2, 33, 6, seed=5)
    centres = made.first(x)
    if m == 7:  # means of runs of 33 // 7 + 1 tokens, mirrored at the end
        longer = torch.cat([x, x[:, -2:].flip(1)], 1)
        torch.testing.assert_close(centres, longer.view(2, m, -1, 6).mean((0, 2)))
    else:  # nearly as many centres as tokens: some stay empty
        centres = tensor(m, 6, seed=3)
        made.means.copy_(centres)
        made.started.fill_(True)
    steps = [clustered(x, centres)]
    steps.append(clustered(x, steps[0]))
    assert (clustered(x, steps[1]) - steps[1]).abs().max() > 1e-3  # not at rest: steps count
    got = made(x)
    torch.testing.assert_close(got, steps[1], rtol=0, atol=1e-12)
    started = bool(made.started)
    made.store(got)
    assert torch.equal(made.means, got) != started  # the first time, a copy
    before = made.means.clone()
    new = made(y)
    torch.testing.assert_close(new, clustered(y, clustered(y, before)), rtol=0, atol=1e-12)
    made.store(new)
    torch.testing.assert_close(made.means - before, 0.001 * (new - before), rtol=0, atol=1e-15)


def test_training_moves_the_centres_and_evaluation_does_not():
    made = layer()
    x = tensor(2, 5, 7, 12)
    before = made.centres.means.clone()
    out = made(x)
    assert torch.equal(made.centres.means, before)
    assert not made.centres.started
    assert torch.equal(out, made(x))
    made.train()
    made(x)
    assert made.centres.started
    first = made.centres.means.clone()
    new = made.centres(x.flatten(1, 2)).detach()
    made(x)
    torch.testing.assert_close(made.centres.means - first, 0.001 * (new - first), rtol=0, atol=1e-15)
    other = layer(seed=1)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.eval()(x), made.eval()(x))


def test_only_the_last_update_has_a_gradient():
    made = TokenCentres(3, 6, iters=4).double().train()
    x = tensor(2, 13, 6).requires_grad_()
    pull = tensor(3, 6, seed=2)
    (got,) = torch.autograd.grad((made(x) * pull).sum(), x)
    centres = made.first(x.detach())
    for _ in range(3):
        centres = clustered(x.detach(), centres)
    (want,) = torch.autograd.grad((clustered(x, centres) * pull).sum(), x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert want.abs().max() > 0


def patched(made: OverlapPatchAttention, x: torch.Tensor) -> torch.Tensor:
    """A loop over patches; their mean where they overlap."""
    _, height, width, _ = x.shape
    sums, counts = torch.zeros_like(x), torch.zeros(height, width, 1, dtype=x.dtype)
    step = made.patch - made.overlap

    def starts(side):
        found, at = [], 0
        while True:
            found.append(max(0, min(at, side - made.patch)))
            if at + made.patch >= side:
                return found
            at += step

    for top in starts(height):
        for left in starts(width):
            part = (slice(None), slice(top, top + made.patch), slice(left, left + made.patch))
            tokens = x[part].flatten(1, 2)
            split = lambda t: t.unflatten(2, (made.heads, -1)).transpose(1, 2)  # noqa: E731
            out = fv.attention(*(split(p(tokens)) for p in (made.q_proj, made.k_proj, made.v_proj)))
            out = made.proj(out.transpose(1, 2).flatten(2))
            sums[part] += out.view_as(x[part])
            counts[part[1:]] += 1
    return sums / counts


@pytest.mark.parametrize("shape", [(6, 6), (10, 14), (11, 7), (3, 5), (13, 6), (9, 1)])
@pytest.mark.parametrize("overlap", [2, 0, 5])
def test_patches_are_the_loop(shape, overlap):
    made = noisy(OverlapPatchAttention(12, 2, 6, qk_dim=8, overlap=overlap))
    x = tensor(2, *shape, 12)
    torch.testing.assert_close(made(x), patched(made, x), rtol=0, atol=1e-12)


def test_convolutional_ffn():
    made = noisy(ConvFFN(4, 6))
    x = tensor(2, 5, 3, 4)
    hidden = F.gelu(x @ made.fc1.weight.T + made.fc1.bias)
    near = F.conv2d(hidden.permute(0, 3, 1, 2), made.conv.weight, made.conv.bias, padding=2, groups=6)
    hidden = hidden + F.gelu(near.permute(0, 2, 3, 1))
    torch.testing.assert_close(made(x), hidden @ made.fc2.weight.T + made.fc2.bias)


@pytest.mark.parametrize(
    ("make", "scale", "parameters"),
    [(catanet_x2, 2, 477_435), (catanet_x3, 3, 549_635), (catanet_x4, 4, 535_195)],
)
def test_published_parameters(make, scale, parameters):
    with torch.device("meta"):
        model = make()
    assert (model.scale, parameters_of(model)) == (scale, parameters)


@pytest.mark.parametrize("aggregation", [True, False])
def test_a_network_of_two_blocks_at_any_size(aggregation):
    torch.manual_seed(0)
    model = CATANet(
        3, dim=8, qk_dim=8, hidden=16, heads=2, centres=(4, 8), groups=(16, 8), patches=(6, 8),
        aggregation=aggregation,
    )  # fmt: skip
    for size in ((1, 1), (7, 11), (16, 5)):
        x = torch.rand(2, 3, *size)
        assert model.eval()(x).shape == (2, 3, 3 * size[0], 3 * size[1])
        torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=0, atol=1e-6)
    with torch.no_grad():  # what is learned is added to the bilinear image
        model.last.weight.zero_()
        model.last.bias.zero_()
    plain = F.interpolate(x, scale_factor=3, mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(x), plain)
    model.train()(torch.rand(2, 3, 9, 9)).square().mean().backward()


def test_every_parameter_gets_a_gradient_in_training():
    made = noisy(TokenAggregationBlock(8, 2, qk_dim=4, hidden=6, m=3, group=7)).train()
    x = tensor(2, 4, 5, 8).requires_grad_()
    (made(x) * tensor(2, 4, 5, 8, seed=3)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (x, *made.parameters()))


def test_strides_and_gradients():
    made = layer()
    x = tensor(3, 12, 4, 5).permute(0, 2, 3, 1)
    torch.testing.assert_close(made(x), made(x.contiguous()), rtol=0, atol=1e-13)
    torch.testing.assert_close(made(x)[1:2], made(x[1:2]), rtol=0, atol=1e-13)
    small = layer(dim=4, qk_dim=2, m=2, group=2)
    assert torch.autograd.gradcheck(small, tensor(1, 2, 3, 4).requires_grad_(), atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="dim and qk_dim must be multiples of heads, got 12, 9 and 2"):
        TokenAggregationAttention(12, 2, qk_dim=9)
    with pytest.raises(ValueError, match="group must be an int >= 1, got 0"):
        TokenAggregationAttention(12, 2, group=0)
    with pytest.raises(ValueError, match="m must be an int >= 1, got 0"):
        TokenCentres(0, 4)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 2"):
        TokenCentres(3, 4, decay=2)
    with pytest.raises(ValueError, match=r"overlap must be in \[0, 6\), got 6"):
        OverlapPatchAttention(12, 2, 6, overlap=6)
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 12\), got \(1, 4, 12\)"):
        TokenAggregationAttention(12, 2)(torch.zeros(1, 4, 12))
    with pytest.raises(ValueError, match="scale must be 2, 3 or 4, got 5"):
        CATANet(5)
    with pytest.raises(ValueError, match="an entry for each block, got 8, 1 and 8"):
        CATANet(2, groups=(3,))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(1, 1, 4, 4\)"):
        CATANet(2, dim=8, qk_dim=8, hidden=8, heads=2, centres=(2,), groups=(4,), patches=(4,))(
            torch.zeros(1, 1, 4, 4)
        )
