"""Hierarchical self-attention: the recursion node by node, its optimality, its limits, and trees of all shapes."""

from __future__ import annotations

import math
import re

import pytest
import torch

from foveate.compress import Hierarchy, hierarchical, hierarchical_attention, sibling_positions

TREES = {
    "windows": Hierarchy.from_windows(13, 3),
    "two levels": Hierarchy.from_windows(17, [4]),
    "flat": Hierarchy.from_windows(7, 9),
    "modalities": Hierarchy.from_modalities([3, 1, 5]),
    "deep and shallow": Hierarchy.from_modalities([9, 1, 4], 2),
    "scattered segments": Hierarchy.from_segments([[0, 1, 0, 1, 2, 2, 5], [1, 0, 1, 0, 0, 0, 1]]),
    "chains": Hierarchy([4, 5, 6, 6, 5, 7, 8, 8, -1], 4),  # 0 under 4 under 5 with 1, under 7 alone
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())


def inputs(n, heads=(4, 2, 2), dim=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, n, dim, generator=g).to(dtype) for h in heads]


def below(parent, node, tokens):
    """The tokens below a node, by a walk."""
    children = [c for c in range(len(parent)) if parent[c] == node]
    return [node] if node < tokens else [leaf for c in children for leaf in below(parent, c, tokens)]


def by_recursion(q, k, tree, eps=None, scale=None, logit=None):
    """theta (N, N) of one head, pair of siblings by pair of siblings; logits are means over pairs of tokens."""
    n, parent = tree.tokens, tree.parent.tolist()
    scale = q.shape[1] ** -0.5 if scale is None else scale
    products = (q @ k.T * scale).tolist()
    logit = logit or (lambda i, j: products[i][j])
    leaves = [below(parent, a, n) for a in range(len(parent))]
    children = [[c for c in range(len(parent)) if parent[c] == a] for a in range(len(parent))]

    def s(b, c):
        pairs = [logit(i, j) for i in leaves[b] for j in leaves[c]]
        return sum(pairs) / len(pairs) + (0.0 if eps is None else float(eps[b] @ eps[c]))

    g, z, theta = {}, {}, torch.zeros(n, n, dtype=torch.float64)

    def up(a):
        if a < n:
            g[a] = logit(a, a)
            return
        for b in children[a]:
            up(b)
        for b in children[a]:
            z[b] = math.exp(g[b]) + sum(len(leaves[c]) * math.exp(s(b, c)) for c in children[a] if c != b)
        g[a] = sum(len(leaves[b]) / len(leaves[a]) * math.log(z[b]) for b in children[a])

    def down(a, mass):
        if a < n:
            theta[a, a] = mass
            return
        for b in children[a]:
            for c in children[a]:
                if c != b:
                    theta[torch.tensor(leaves[b])[:, None], leaves[c]] = mass * math.exp(s(b, c)) / z[b]
            down(b, mass * math.exp(g[b]) / z[b])

    root = parent.index(-1)
    up(root)
    down(root, 1.0)
    return theta


def softmax(q, k):
    return (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[3] ** -0.5).softmax(-1)


def sibling_pairs(tree):
    """(tokens below B, tokens below C) of all ordered pairs of siblings."""
    parent = tree.parent.tolist()
    nodes = range(len(parent))
    return [(below(parent, b, tree.tokens), below(parent, c, tree.tokens))
            for b in nodes for c in nodes if b != c and parent[b] == parent[c] >= 0]  # fmt: skip


# --------------------------------------------------------------------------------------------- the definition
@every_tree
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_two_passes_are_the_recursion(tree, with_bias):
    q, k, v = inputs(tree.tokens)
    eps = (
        torch.randn(2, tree.nodes, 3, generator=torch.Generator().manual_seed(5)).double()
        if with_bias
        else None
    )
    out, weights = hierarchical_attention(q, k, v, tree, sibling_bias=eps, return_weights=True)
    for b, h in ((0, 0), (1, 3), (0, 2)):
        theta = by_recursion(q[b, h], k[b, h // 2], tree, None if eps is None else eps[h // 2])
        torch.testing.assert_close(weights[b, h], theta, atol=1e-12, rtol=0)
        torch.testing.assert_close(out[b, h], theta @ v[b, h // 2], atol=1e-12, rtol=0)


@every_tree
def test_squared_distances(tree):
    q, k, v = inputs(tree.tokens, seed=3)
    weights = hierarchical_attention(q, k, v, tree, energy="sqdist", return_weights=True)[1]
    a, b = q[1, 2], k[1, 1]
    theta = by_recursion(
        a, b, tree, logit=lambda i, j: -float((a[i] - b[j]).square().sum()) / 2 / math.sqrt(6)
    )
    torch.testing.assert_close(weights[1, 2], theta, atol=1e-12, rtol=0)


def test_squared_distances_of_keys_of_one_norm_are_dot_products():
    tree = TREES["windows"]
    q, k, v = inputs(tree.tokens)
    k = k / k.norm(dim=-1, keepdim=True)
    one, other = (hierarchical_attention(q, k, v, tree, energy=e) for e in ("dot", "sqdist"))
    torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_scale_is_applied_once():
    tree = TREES["windows"]
    q, k, v = inputs(tree.tokens)
    weights = hierarchical_attention(q, k, v, tree, scale=0.9, return_weights=True)[1]
    torch.testing.assert_close(
        weights[0, 1], by_recursion(q[0, 1], k[0, 0], tree, scale=0.9), atol=1e-12, rtol=0
    )


# ------------------------------------------------------------------------------------------------- invariants
@pytest.mark.parametrize("n", [1, 2, 7, 131, 300])  # from 129 on through the engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flat_tree_is_softmax_attention(n, dtype):
    q, k, v = inputs(n, dtype=dtype)
    out = hierarchical_attention(q, k, v, Hierarchy.from_windows(n, max(n, 2)))
    want = softmax(q, k) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, want, atol=1e-6 if dtype == torch.float32 else 1e-12, rtol=0)


@every_tree
def test_rows_sum_to_one_and_siblings_share_one_weight(tree):
    q, k, v = inputs(tree.tokens)
    weights = hierarchical_attention(q, k, v, tree, return_weights=True)[1]
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-12, rtol=0)
    for b, c in sibling_pairs(tree):
        block = weights[:, :, b][..., c]
        assert (block - block[..., :1, :1]).abs().max() < 1e-14


def divergence(theta, softmax):
    return (theta * (theta / softmax).log()).sum()


def shared(free, tree):
    """The matrix with one free logit per ordered pair of siblings and one per token, rows normalised by hand.

    The weight left inside a node is what its siblings' weights leave: masses multiply along the path, so that every
    choice of free logits is feasible.
    """
    parent, n = tree.parent.tolist(), tree.tokens
    leaves = [below(parent, a, n) for a in range(len(parent))]
    theta = free.new_zeros(n, n)
    mass = {parent.index(-1): free.new_ones(())}
    for a in sorted(range(n, len(parent)), key=lambda a: tree._depths[a]):
        children = [c for c in range(len(parent)) if parent[c] == a]
        for b in children:
            others = [c for c in children if c != b]
            # the first free logit is the mass that stays inside b, |C| tokens share each of the others
            parts = torch.stack(
                [free[b, b], *(free[b, c] + math.log(len(leaves[c])) for c in others)]
            ).softmax(0)
            for c, part in zip(others, parts[1:], strict=True):
                block = torch.zeros(n, n, dtype=torch.bool)
                block[torch.tensor(leaves[b])[:, None], leaves[c]] = True
                theta = theta + block * (mass[a] * part / len(leaves[c]))
            mass[b] = mass[a] * parts[0]
    return theta + torch.diag(torch.stack([mass[i] for i in range(n)]))


@pytest.mark.parametrize("name", ["windows", "deep and shallow", "scattered segments"])
def test_nothing_with_the_same_shared_weights_is_closer_to_softmax(name):
    tree = TREES[name]
    q, k, v = inputs(tree.tokens, heads=(1, 1, 1), seed=1)
    weights = hierarchical_attention(q, k, v, tree, return_weights=True)[1][0, 0]
    target = softmax(q, k)[0, 0]
    best = divergence(weights, target)
    g = torch.Generator().manual_seed(2)
    free = torch.zeros(tree.nodes, tree.nodes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=50, line_search_fn="strong_wolfe", tolerance_change=1e-13)

    def closure():
        optimizer.zero_grad()
        loss = divergence(shared(free, tree), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = free.detach()
    optimum = divergence(shared(found, tree), target)
    assert (
        best - 1e-12 <= optimum < best + 1e-6
    )  # an optimiser that knows nothing of the recursion ends at it
    torch.testing.assert_close(shared(found, tree), weights, atol=2e-4, rtol=0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(5):
            moved = found + size * torch.randn(found.shape, generator=g).double()
            assert divergence(shared(moved, tree), target) >= best - 1e-12
    assert divergence(shared(found + torch.randn(found.shape, generator=g), tree), target) > best + 1e-3


@pytest.mark.parametrize("name", ["windows", "two levels", "deep and shallow", "scattered segments"])
def test_constant_subtrees_give_softmax_exactly(name):
    tree = TREES[name]
    q, k, v = inputs(tree.tokens)
    child = torch.arange(tree.tokens)  # the child of the root above each token
    for _ in range(tree.depth):
        child = torch.where(tree.parent[tree.parent[child]] < 0, child, tree.parent[child])
    first = (child == child[:, None]).int().argmax(1)
    q, k = q[:, :, first], k[:, :, first]
    weights = hierarchical_attention(q, k, v, tree, return_weights=True)[1]
    torch.testing.assert_close(weights, softmax(q, k), atol=1e-12, rtol=0)


def test_not_constant_subtrees_do_not():
    tree = TREES["windows"]
    q, k, v = inputs(tree.tokens)
    weights = hierarchical_attention(q, k, v, tree, return_weights=True)[1]
    assert (weights - softmax(q, k)).abs().max() > 0.05


def test_leaves_of_a_subtree_may_be_permuted():
    tree = Hierarchy.from_modalities([5, 3, 4])
    q, k, v = inputs(12)
    order = torch.tensor([3, 0, 4, 1, 2, 5, 6, 7, 10, 8, 11, 9])
    moved = hierarchical_attention(q[:, :, order], k[:, :, order], v[:, :, order], tree)
    torch.testing.assert_close(moved, hierarchical_attention(q, k, v, tree)[:, :, order], atol=1e-12, rtol=0)


def test_siblings_may_be_permuted():
    lengths, order = (5, 3, 4), (2, 0, 1)
    q, k, v = inputs(12)
    out = hierarchical_attention(q, k, v, Hierarchy.from_modalities(lengths)).split(lengths, 2)
    moved = [torch.cat([t.split(lengths, 2)[i] for i in order], 2) for t in (q, k, v)]
    tree = Hierarchy.from_modalities([lengths[i] for i in order])
    again = hierarchical_attention(*moved, tree).split([lengths[i] for i in order], 2)
    for place, i in enumerate(order):
        torch.testing.assert_close(again[place], out[i], atol=1e-12, rtol=0)


def test_the_numbers_of_inner_nodes_do_not_matter():
    q, k, v = inputs(4)
    one = hierarchical_attention(q, k, v, Hierarchy([4, 4, 5, 5, 6, 6, -1], 4))
    other = hierarchical_attention(q, k, v, Hierarchy([6, 6, 5, 5, -1, 4, 4], 4))
    torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_nodes_with_one_child_change_nothing():
    q, k, v = inputs(4)
    plain = Hierarchy([4, 4, 5, 5, 5, -1], 4)  # ((0 1) 2 3)
    chained = Hierarchy([4, 4, 8, 6, 5, 6, 7, -1, 6], 4)
    torch.testing.assert_close(
        hierarchical_attention(q, k, v, chained), hierarchical_attention(q, k, v, plain), atol=1e-12, rtol=0
    )


# --------------------------------------------------------------------------------- how it is computed, gradients
def test_wide_families_are_the_narrow_ones(monkeypatch):
    tree = Hierarchy.from_modalities([140, 3, 17, 140])
    leaves = [t.requires_grad_() for t in inputs(300)]
    eps = torch.randn(tree.nodes, 3, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    found = []
    for wide in (128, 1000, 2):
        monkeypatch.setattr(hierarchical, "WIDE", wide)
        again = Hierarchy(tree.parent, 300)  # the grouping is kept with a tree
        out = hierarchical_attention(*leaves, again, sibling_bias=eps)
        found.append((out, *torch.autograd.grad(out.sin().sum(), (*leaves, eps))))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_gradients():
    tree = TREES["deep and shallow"]
    leaves = [t[:1].requires_grad_() for t in inputs(tree.tokens, heads=(2, 1, 1), dim=3)]
    eps = torch.randn(tree.nodes, 2, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    run = lambda q, k, v, e: hierarchical_attention(q, k, v, tree, sibling_bias=e, energy="sqdist")  # noqa: E731
    torch.autograd.gradcheck(run, (*leaves, eps), fast_mode=True)


def test_low_precision_and_strides():
    tree = TREES["windows"]
    q, k, v = inputs(tree.tokens, dtype=torch.bfloat16)
    out = hierarchical_attention(q, k, v, tree)
    exact = hierarchical_attention(q.double(), k.double(), v.double(), tree)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, atol=0.01, rtol=0.01)
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert torch.equal(hierarchical_attention(*turned, tree), out)


def test_extreme_logits_stay_finite():
    tree = TREES["windows"]
    q, k, v = inputs(tree.tokens, dtype=torch.float32)
    leaves = [(1e4 * q).requires_grad_(), (1e4 * k).requires_grad_(), v.requires_grad_()]
    out = hierarchical_attention(*leaves, tree)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in leaves)


# ------------------------------------------------------------------------------------------------------- trees
def test_trees_of_windows():
    tree = Hierarchy.from_windows(10, 3)
    assert tree.parent.tolist() == [10, 10, 10, 11, 11, 11, 12, 12, 12, 13, 14, 14, 14, 15, 16, 16, -1]
    assert tree.depth == 3
    assert tree.sizes.tolist() == [1] * 10 + [3, 3, 3, 1, 9, 1, 10]
    assert tree.scores == 10 + 3 * 6 + 6 + 2
    assert Hierarchy.from_windows(9, 3).depth == 2
    assert Hierarchy.from_windows(1, 3).parent.tolist() == [-1]
    assert Hierarchy.from_windows(27, [3, 3]).parent.tolist() == Hierarchy.from_windows(27, 3).parent.tolist()
    assert tree.subtree(14).tolist() == [True] * 9 + [False]
    assert tree.subtree(4).sum() == 1
    for n in (2, 3, 64, 243, 1000):
        for b in (2, 3, 7):
            tree = Hierarchy.from_windows(n, b)
            children = torch.bincount(tree.parent[tree.parent >= 0])
            assert children.max() <= b
            assert tree.sizes.max() == n
            assert children[-1] > 1


def test_scores_are_the_distinct_weights():
    for tree in TREES.values():
        assert tree.scores == tree.tokens + len(sibling_pairs(tree))
    tree = Hierarchy.from_windows(256, 16)
    assert tree.scores == 256 + 17 * 16 * 15
    assert Hierarchy.from_windows(32768, 32).scores < 32768 * 34


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Hierarchy([2, 2, 3], 2), "one root"),
        (lambda: Hierarchy([2, -1, -1], 2), "one root; got 3 nodes, 2 roots"),
        (lambda: Hierarchy([7, 2, -1], 2), "largest parent 7"),
        (lambda: Hierarchy([1, 2, -1], 2), "token 1 has children"),
        (lambda: Hierarchy([3, 3, 3, -1], 2), "inner node 2 has no children"),
        (lambda: Hierarchy([4, 2, 3, 2, -1], 2), "node 1 lies on a cycle"),
        (lambda: Hierarchy([0.5, -1.0], 1), "parent must be integers"),
        (lambda: Hierarchy.from_windows(0, 2), "tokens must be an int >= 1, got 0"),
        (lambda: Hierarchy.from_windows(5, 1), "branching must be an int >= 2, got 1"),
        (lambda: Hierarchy.from_windows(5, [4, 1]), "branching must be an int >= 2, got 1"),
        (lambda: Hierarchy.from_modalities([3, 0]), "lengths must be an int >= 1, got 0"),
        (lambda: Hierarchy.from_segments([[0, 0, 1], [0, 1, 1]]), "a segment of level 0 lies in two segments"),
        (lambda: Hierarchy.from_segments([[0, 0, 1], [0, 1]]), "ids must be lists of one length"),
        (lambda: Hierarchy.from_segments([]), "ids must be lists of one length"),
    ],
)  # fmt: skip
def test_trees_that_are_refused(make, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        make()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(1, 3, 9, 4)}, "multiple of Hkv"),
        ({"k": torch.zeros(1, 2, 8, 4), "v": torch.zeros(1, 2, 8, 4)}, "a tree of 9 tokens needs as many"),
        ({"v": torch.zeros(9, 4)}, "v must be a float tensor"),
        ({"q": torch.zeros(1, 2, 9, 4).double()}, "share B, D, dtype"),
        ({"tree": [1, 2]}, "tree must be a Hierarchy, got list"),
        ({"energy": "cosine"}, "energy must be one of dot, sqdist, got 'cosine'"),
        ({"sibling_bias": torch.zeros(9, 2)}, "sibling_bias must be (13, E) or (2, 13, E)"),
        ({"sibling_bias": torch.zeros(3, 13, 2)}, "sibling_bias must be (13, E) or (2, 13, E)"),
    ],
)  # fmt: skip
def test_inputs_that_are_refused(change, says):
    given = (
        {name: torch.zeros(1, 2, 9, 4) for name in "qkv"} | {"tree": Hierarchy.from_windows(9, 3)} | change
    )
    with pytest.raises((ValueError, TypeError), match=re.escape(says)):
        hierarchical_attention(**given)


def test_positions_among_siblings():
    tree = Hierarchy.from_segments([[0, 1, 0, 1, 0]])
    eps = sibling_positions(tree, 6)
    products = eps @ eps.T
    assert eps.shape == (8, 6)
    torch.testing.assert_close(eps[0], eps[1])  # the first of each segment
    torch.testing.assert_close(eps[2], eps[3])
    torch.testing.assert_close(products[0, 2], products[2, 4])
    torch.testing.assert_close(products.diagonal(), torch.ones(8))
    assert products[0, 4] < products[0, 2] < 1
    with pytest.raises(ValueError, match="dim must be even, got 3"):
        sibling_positions(tree, 3)
