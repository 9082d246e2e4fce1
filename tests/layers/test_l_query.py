"""MQSA-TED: the windowed query, the block as plain formulas, padding, towers, and the distillation of transitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from foveate.layers import (
    LQueryBlock,
    MultiQueryRecommender,
    transition_distillation_loss,
    transition_matrix,
    transition_targets,
    windowed_mean_query,
)


def histories(seed=0, n=13, batch=3, items=30):
    ids = torch.randint(1, items + 1, (batch, n), generator=torch.Generator().manual_seed(seed))
    ids[1, :5] = 0
    ids[2, : n - 1] = 0
    return ids


def model(**arguments):
    torch.manual_seed(2)
    made = MultiQueryRecommender(30, 12, **{"max_len": 20, "heads": 2, **arguments}).double().eval()
    for p in made.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return made


# -------------------------------------------------------------------------------------------------------- the query
@pytest.mark.parametrize("window", [1, 2, 4, 13, 50])
def test_the_query_is_the_mean_of_the_last_items(window):
    x, mask = torch.randn(3, 5, 13, dtype=torch.float64).transpose(1, 2), histories() != 0
    found = windowed_mean_query(x, mask, window)
    for b in range(3):
        for t in range(13):
            at = [j for j in range(max(0, t - window + 1), t + 1) if mask[b, j]]
            before = int(mask[b, : t + 1].sum())
            if mask[b, t]:  # left padding: the items up to t are those right before it
                assert len(at) == min(window, before)
            want = x[b, at].mean(0) if at else torch.zeros(5, dtype=torch.float64)
            torch.testing.assert_close(found[b, t], want)
    later = x.clone()
    later[:, 7:] += 1
    assert torch.equal(windowed_mean_query(later, mask, window)[:, :7], found[:, :7])


# -------------------------------------------------------------------------------------------------------- the block
def by_formula(block, x, mask):
    """The block with dense attention, query by query."""
    dim, heads = x.shape[2], block.heads
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            if not mask[b, t]:
                continue
            mine = [j for j in range(max(0, t - block.window + 1), t + 1) if mask[b, j]]
            q = F.layer_norm(x[b, mine].mean(0), (dim,), block.query_norm.weight, block.query_norm.bias)
            seen = [j for j in range(t + 1) if mask[b, j]]
            a, k, v = block.q_proj(q), block.k_proj(x[b, seen]), block.v_proj(x[b, seen])
            mixed = []
            for h in range(heads):
                own = slice(h * dim // heads, (h + 1) * dim // heads)
                mixed.append((k[:, own] @ a[own] / math.sqrt(dim // heads)).softmax(0) @ v[:, own])
            y = F.layer_norm(q + torch.cat(mixed), (dim,), block.norm.weight, block.norm.bias)
            out[b, t] = y + block.outer(block.inner(y).relu())
    return out


@pytest.mark.parametrize(("heads", "window"), [(1, 1), (2, 1), (2, 3), (1, 40)])
def test_the_block_is_the_formula(heads, window):
    torch.manual_seed(0)
    block = LQueryBlock(8, heads, window).double().eval()
    for p in block.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x, mask = torch.randn(3, 8, 13, dtype=torch.float64).transpose(1, 2), histories() != 0
    torch.testing.assert_close(block(x, mask), by_formula(block, x, mask))
    torch.testing.assert_close(block(x), by_formula(block, x, torch.ones(3, 13).bool()))


def test_window_one_asks_with_the_item_itself():
    """The attention of SASRec with the same weights, here torch's own."""
    torch.manual_seed(0)
    block, x = LQueryBlock(8, 2).eval(), torch.randn(2, 9, 8)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([m.weight for m in (block.q_proj, block.k_proj, block.v_proj)])
    theirs.in_proj_bias.data = torch.cat([m.bias for m in (block.q_proj, block.k_proj, block.v_proj)])
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = torch.eye(8), torch.zeros(8)
    q = block.query_norm(x)
    y = block.norm(q + theirs(q, x, x, attn_mask=torch.ones(9, 9).triu(1).bool(), need_weights=False)[0])
    torch.testing.assert_close(block(x), y + block.outer(block.inner(y).relu()), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("blocks", [1, 2])
def test_left_padding_of_any_length_changes_nothing(blocks):
    made, ids = model(blocks=blocks, window=3), histories()[:1]
    want = made(ids)
    for more in (1, 4, 7):
        padded = torch.cat([torch.zeros(1, more, dtype=torch.int64), ids], 1)
        torch.testing.assert_close(made(padded)[:, more:], want)


def test_later_items_change_nothing_before():
    made, ids = model(blocks=2, window=5), histories()
    other = ids.clone()
    other[:, 9:] = 30
    assert torch.equal(made(other)[:, :9], made(ids)[:, :9])


def test_alpha_blends_the_towers():
    made, ids = model(), histories()
    short, long = made.towers(ids)
    table = made.items.weight.T
    torch.testing.assert_close(made(ids)[..., 1:], ((0.5 * short + 0.5 * long) @ table)[..., 1:])
    made.alpha = 1.0
    before = made(ids)
    for p in (*made.long.parameters(), *made.long_norm.parameters()):
        p.data.zero_()
    assert torch.equal(made(ids), before)
    assert not torch.allclose(short, long)


def test_other_item_numbers_give_permuted_logits():
    made, ids = model(), histories()
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(30)])  # new number -> old number
    want = made(ids)
    made.items.weight.data = made.items.weight.data[order]
    torch.testing.assert_close(made(order.argsort()[ids]), want[..., order])


def test_recommendations_are_new():
    made, ids = model(), histories()
    best = made.recommend(ids, 5)
    logits = made(ids)[:, -1]
    for row, seen, scores in zip(best.tolist(), ids.tolist(), logits, strict=True):
        assert not set(row) & set(seen)
        assert row == [i for i in scores.argsort(descending=True).tolist() if i not in seen and i][:5]


def test_gradients_reach_everything():
    made, ids = model(blocks=2, dropout=0.1).train(), histories()
    F.cross_entropy(made(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0).backward()
    used = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert used == {name for name, _ in made.named_parameters()}


# --------------------------------------------------------------------------------------------------- the transitions
def test_transitions_are_counted():
    sequences = [[1, 2, 3, 1, 2], [0, 0, 2, 3], [4]]
    one, two = (transition_matrix(sequences, 5, hops).to_dense() for hops in (1, 2))
    want = torch.zeros(6, 6)
    for a, b in ((1, 2), (2, 3), (3, 1), (1, 2), (2, 3)):
        want[a, b] += 1
    assert torch.equal(one, want)
    for a, b in ((1, 3), (2, 1), (3, 2)):
        want[a, b] += 1
    assert torch.equal(two, want)
    assert not transition_matrix([[1]], 5).to_dense().any()


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_targets_keep_the_order_of_the_counts(tau):
    counts = torch.zeros(5, 5)
    counts[2] = torch.tensor([0.0, 4.0, 1.0, 0.0, 2.0])
    p = transition_targets(counts, torch.tensor([2, 3]), tau)
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    want = torch.tensor([4.0, 1.0, 0.0, 2.0]) / 4 / tau
    torch.testing.assert_close(p[0], want.exp() / want.exp().sum())
    torch.testing.assert_close(p[1], torch.full((4,), 0.25))
    torch.testing.assert_close(transition_targets(counts.to_sparse(), torch.tensor([2, 3]), tau), p)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_the_loss_is_least_at_the_targets(tau):
    g = torch.Generator().manual_seed(0)
    counts, items = torch.zeros(5, 5), torch.tensor([1, 2, 3, 4])
    counts[1:, 1:] = torch.randint(5, (4, 4), generator=g).float() + torch.eye(4)
    p = transition_targets(counts, items, tau).double()
    entropy = -(p * p.log()).sum(1).mean()
    wanted = counts[1:, 1:] / counts[1:, 1:].amax(1, keepdim=True)  # logits of the targets, times tau
    own = torch.zeros(
        5, 8, dtype=torch.float64
    )  # E_i of an item: it asks with the first half, is asked by the second
    own[1:, 4:] = torch.eye(4)
    heads = torch.zeros(5, 8, dtype=torch.float64)
    heads[1:, 4:] = (wanted + 3.0) / 8**0.5
    logits = 8**0.5 / tau * heads[items] @ own[1:].T
    torch.testing.assert_close(F.cross_entropy(logits, p), entropy)
    emb = torch.randn(5, 8, generator=g, dtype=torch.float64).requires_grad_()
    loss = transition_distillation_loss(emb, counts, items, tau)
    z = 8**0.5 / tau * emb[items] @ emb[1:].T
    torch.testing.assert_close(loss, -(p * z.log_softmax(1)).sum(1).mean(), atol=1e-6, rtol=1e-6)
    assert loss > entropy
    loss.backward()
    assert not emb.grad[0].any()
    assert emb.grad[1:].any()


def test_errors_name_the_argument():
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5).bool()
    for bad in ((x, mask, 0), (x, mask[:, 1:], 2), (x, mask.float(), 2)):
        with pytest.raises(ValueError, match=r"window must be >= 1 and mask bool \(2, 5\), got"):
            windowed_mean_query(*bad)
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got 8 and 3"):
        LQueryBlock(8, 3)
    with pytest.raises(ValueError, match="window must be >= 1, got 0"):
        LQueryBlock(8, 2, 0)
    for bad in ({"alpha": 1.5}, {"blocks": 0}):
        with pytest.raises(ValueError, match=r"num_items and blocks must be >= 1 and alpha in \[0, 1\]"):
            MultiQueryRecommender(9, **bad)
    with pytest.raises(ValueError, match="at most 4 columns, got 5"):
        MultiQueryRecommender(9, max_len=4)(torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="hops must be >= 1, got 0"):
        transition_matrix([[1, 2]], 3, 0)
    with pytest.raises(ValueError, match="items must be 1 to 3, got 1 to 4"):
        transition_matrix([[1, 4]], 3)
    with pytest.raises(ValueError, match="tau must be > 0, got 0"):
        transition_distillation_loss(torch.zeros(4, 8), torch.zeros(4, 4), torch.tensor([1]), 0.0)
