"""AutoInt: embeddings of fields, the interacting layer as loops in both forms, the model, and which fields combine."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.layers import AutoInt, FieldEmbedding, InteractingLayer, field_affinity


def noisy(module):
    """In float64, with every parameter moved away from where it starts."""
    g = torch.Generator().manual_seed(3)
    module = module.double().eval()
    for p in module.parameters():
        p.data += 0.5 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    return module


def records(n, sizes=(3, 7, 2), numeric=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    cat = torch.stack([torch.randint(size, (n,), generator=g) for size in sizes], 1)
    return cat, torch.randn(n, numeric, generator=g, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- the fields
def test_embeddings_are_rows_means_and_multiples():
    embed = noisy(FieldEmbedding([3, 7], 2, 5))
    tables = embed.table[:3], embed.table[3:]
    out = embed(torch.tensor([[2, 6], [0, 1]]), torch.tensor([[0.0, 2.0], [1.0, -3.0]]))
    assert out.shape == (2, 4, 5)
    torch.testing.assert_close(out[0, 0], tables[0][2])
    torch.testing.assert_close(out[1, 1], tables[1][1])
    assert not out[0, 2].any()  # a value of 0
    torch.testing.assert_close(out[0, 3], 2 * embed.numeric[1])
    torch.testing.assert_close(out[1, 3], -1.5 * out[0, 3])  # linear in the value
    several = embed(torch.tensor([[[1, 2, -1], [4, -1, -1]], [[-1, -1, -1], [5, 0, 5]]]), torch.zeros(2, 2))
    torch.testing.assert_close(several[0, 0], (tables[0][1] + tables[0][2]) / 2)
    torch.testing.assert_close(several[0, 1], tables[1][4])
    assert not several[1, 0].any()
    torch.testing.assert_close(several[1, 1], (2 * tables[1][5] + tables[1][0]) / 3)


def test_embeddings_start_small():
    torch.manual_seed(0)
    embed = FieldEmbedding([5000], 0, 16)
    assert abs(float(embed.table.detach().std()) - 0.01) < 2e-4


# -------------------------------------------------------------------------------------------------------- the layer
def by_loops(layer, e):
    """The layer written out, one record, field, head and channel at a time."""
    heads, paper = layer.heads, layer.paper

    def linear(proj, x):
        bias = [0.0] * len(proj.weight) if proj.bias is None else proj.bias.tolist()
        out = [math.fsum(a * b for a, b in zip(row, x, strict=True)) + c
               for row, c in zip(proj.weight.tolist(), bias, strict=True)]  # fmt: skip
        return out if paper else [max(0.0, y) for y in out]

    result = []
    for record in e.tolist():
        q, k, v, rest = (
            [linear(p, x) for x in record] for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.res_proj)
        )
        width = len(q[0]) // heads
        rows = []
        for m in range(len(record)):
            out = []
            for h in range(heads):
                own = range(h * width, (h + 1) * width)
                z = [math.fsum(q[m][c] * k[j][c] for c in own) / (1 if paper else math.sqrt(width))
                     for j in range(len(record))]  # fmt: skip
                weight = [math.exp(x) for x in z]
                total = math.fsum(weight)
                out += [math.fsum(w * x[c] for w, x in zip(weight, v, strict=True)) / total for c in own]
            u = [max(0.0, a + b) for a, b in zip(out, rest[m], strict=True)]
            if not paper:
                mean = math.fsum(u) / len(u)
                spread = math.sqrt(math.fsum((x - mean) ** 2 for x in u) / len(u) + 1e-8)
                a, b = layer.norm.weight.tolist(), layer.norm.bias.tolist()
                u = [(u[c] - mean) / spread * a[c] + b[c] for c in range(len(u))]
            rows.append(u)
        result.append(rows)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize(("fields", "heads"), [(1, 1), (2, 2), (7, 3), (13, 2)])
def test_the_layer_is_the_formula(paper, fields, heads):
    torch.manual_seed(fields)
    layer = noisy(InteractingLayer(5, 6, heads, paper=paper))
    e = torch.randn(2, 5, fields, dtype=torch.float64).transpose(1, 2)  # any strides
    out, weights = layer(e, return_weights=True)
    torch.testing.assert_close(out, by_loops(layer, e), atol=1e-12, rtol=1e-10)
    assert torch.equal(out, layer(e))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, fields, dtype=torch.float64))
    v = layer.v_proj(e) if paper else layer.v_proj(e).relu()
    mixed = (weights @ v.unflatten(2, (heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    u = (mixed + (layer.res_proj(e) if paper else layer.res_proj(e).relu())).relu()
    torch.testing.assert_close(out, u if paper else layer.norm(u))  # the weights are those of the result


@pytest.mark.parametrize("paper", [True, False])
def test_permuted_fields_are_permuted_results(paper):
    layer, order = noisy(InteractingLayer(5, 8, paper=paper)), torch.randperm(11)
    e = torch.randn(3, 11, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(e[:, order]), layer(e)[:, order])
    model = noisy(AutoInt([3] * 4, dim=5, layers=(8,), paper=paper))
    cat = torch.tensor([[0, 1, 2, 1]])
    assert not torch.allclose(model(cat), model(cat.flip(1)))  # only the last unit knows which field is which


def test_without_queries_every_field_gets_the_mean():
    layer = noisy(InteractingLayer(5, 6, paper=True))
    layer.q_proj.weight.data.zero_()
    e = torch.randn(2, 7, 5, dtype=torch.float64)
    want = (layer.v_proj(e).mean(1, keepdim=True) + layer.res_proj(e)).relu()
    torch.testing.assert_close(layer(e), want)


def test_one_field_reads_itself():
    layer = noisy(InteractingLayer(5, 6, paper=True))
    e = torch.randn(2, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(e), (layer.v_proj(e) + layer.res_proj(e)).relu())


def test_dropout_is_on_the_weights_in_training_alone():
    torch.manual_seed(0)
    layer = InteractingLayer(5, 6, paper=True, dropout=0.5)
    e = torch.randn(2, 7, 5)
    assert not torch.allclose(layer(e), layer(e))
    assert torch.equal(layer.eval()(e), layer(e))
    one = e[:, :1].expand(-1, 7, -1)  # equal fields: dropout keeps a multiple of their one value
    v, rest = layer.v_proj(one[:, :1]), layer.res_proj(one[:, :1])
    layer.res_proj.weight.data.copy_(10 * layer.v_proj.weight)  # as large, so that no ReLU cuts
    v, rest = layer.v_proj(one[:, :1]), layer.res_proj(one[:, :1])
    keep = v > 0.05
    share = ((layer.train()(one) - rest) / v).unflatten(2, (2, 3))[
        keep.expand(-1, 7, -1).unflatten(2, (2, 3))
    ]
    assert (share * 3.5 - (share * 3.5).round()).abs().max() < 1e-3  # k of 7 kept, each 2 / 7


# -------------------------------------------------------------------------------------------------------- the model
def test_the_model_is_its_parts():
    model = noisy(AutoInt([3, 7, 2], 2, dim=4, layers=(6, 8), mlp=(5, 3)))
    cat, num = records(9)
    e = model.embed(cat, num)
    u = model.layers[1](model.layers[0](e))
    hidden = (model.mlp[2].weight @ (model.mlp[0].weight @ e.flatten(1).T + model.mlp[0].bias[:, None]).relu()
              + model.mlp[2].bias[:, None]).relu()  # fmt: skip
    want = (
        u.flatten(1) @ model.out.weight[0]
        + model.out.bias
        + (model.mlp[4].weight @ hidden + model.mlp[4].bias)[0]
    )
    torch.testing.assert_close(model(cat, num), want)


def test_affinity_is_the_mean_over_records():
    model = noisy(AutoInt([3, 7, 2], 2, dim=4, layers=(6, 8), dropout=0.5)).train()
    cat, num = records(11)
    got = field_affinity(model, [(cat[:4], num[:4], None), (cat[4:], num[4:], None)])
    assert model.training
    model.eval()
    u, want = model.embed(cat, num), []
    for layer in model.layers:
        u, a = layer(u, return_weights=True)
        want.append(a.mean(0))
    torch.testing.assert_close(got, torch.stack(want).float())
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 2, 5))


def test_gradients():
    model = noisy(AutoInt([3, 7, 2], 2, dim=4, layers=(6, 4), mlp=(5,)))
    cat, num = records(5)
    num.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(cat, x), (num,), fast_mode=True)
    model(cat, num).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_it_learns_a_cross_that_no_single_field_has():
    torch.manual_seed(0)
    cat, _ = records(128, sizes=(2, 2), numeric=0)
    model = AutoInt([2, 2], layers=(16, 16))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(50):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            model(cat), (cat[:, 0] ^ cat[:, 1]).float()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


# ----------------------------------------------------------------------------------------------------------- errors
def test_errors_name_the_argument():
    for sizes, numeric in (([], 0), ([3, 0], 0), ([3], -1)):
        with pytest.raises(ValueError, match="cardinalities must be >= 1 each and num_numeric >= 0"):
            FieldEmbedding(sizes, numeric, 4)
    embed = FieldEmbedding([3, 7], 1, 4)
    cat, num = torch.tensor([[2, 6]]), torch.zeros(1, 1)
    embed(cat, num)
    for bad, says in (
        ((cat, None), r"num must have 1 fields \(B, 1\), got None"),
        ((None, num), "cat must have 2 fields"),
        ((cat[:, :1], num), r"cat must have 2 fields \(B, 2\), got \(1, 1\)"),
        ((cat, torch.zeros(1, 2)), r"num must have 1 fields \(B, 1\), got \(1, 2\)"),
        ((torch.tensor([[3, 6]]), num), r"cat must be below \[3, 7\] and not negative, got up to \[3, 6\]"),
        ((torch.tensor([[-1, 6]]), num), "down to -1"),
    ):
        with pytest.raises(ValueError, match=says):
            embed(*bad)
    with pytest.raises(ValueError, match="out_dim must be a multiple of heads, got 64 and 3"):
        InteractingLayer(16, 64, 3)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        InteractingLayer(16, dropout=1.0)
    with pytest.raises(ValueError, match="layers must name the width"):
        AutoInt([3], layers=())
    with pytest.raises(ValueError, match="loader gave no batch"):
        field_affinity(AutoInt([3]), [])
