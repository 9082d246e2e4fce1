"""AgentSD: matched and merged tokens against a loop, and the attention that uses them as agents."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from foveate.compress import agent_sd_attention, match_tokens


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def looped(x, grid, stride, count):
    """One row: (groups of tokens, target first; the targets' groups last) by sorting every source's best cosine."""
    h, w = grid
    cells = [(y, c) for y in range(h // stride[0]) for c in range(w // stride[1])]
    targets = [y * stride[0] * w + c * stride[1] for y, c in cells]
    sources = [i for i in range(h * w) if i not in targets]
    best = {}
    for i in sources:
        cosines = [float(F.cosine_similarity(x[i], x[j], 0)) for j in targets]
        best[i] = max(range(len(targets)), key=lambda j: (cosines[j], -j)), max(cosines)
    order = sorted(sources, key=lambda i: (-best[i][1], i))
    groups = [[i] for i in order[count:]] + [[j] for j in targets]
    for i in order[:count]:
        groups[len(order) - count + best[i][0]].append(i)
    return groups


@pytest.mark.parametrize(
    ("grid", "stride", "count"),
    [((8, 8), (4, 4), 50), ((7, 9), (2, 4), 20), ((6, 5), (3, 2), 0), ((4, 4), (4, 4), 15)],
)
def test_merging_is_a_mean_over_groups_and_unmerging_copies_it_back(grid, stride, count):
    x, y = normal(2, grid[0] * grid[1], 5), normal(2, grid[0] * grid[1], 3, seed=1)
    matching = match_tokens(x, grid, stride)
    merged = matching.merge(y, count)
    back = matching.unmerge(merged, count)
    for b in range(2):
        groups = looped(x[b], grid, stride, count)
        assert merged.shape[1] == len(groups)
        for at, group in enumerate(groups):
            torch.testing.assert_close(merged[b, at], y[b, group].mean(0), atol=1e-14, rtol=0)
            for token in group:
                assert torch.equal(back[b, token], merged[b, at])


def test_targets_are_drawn_within_their_cells_for_even_batches():
    x, g = normal(2, 144, 4), torch.Generator().manual_seed(3)
    drawn = {tuple(match_tokens(x, (12, 12), (4, 3), generator=g).target.tolist()) for _ in range(20)}
    assert len(drawn) == 20
    for targets in drawn:
        cells = [(t // 12 // 4, t % 12 // 3) for t in targets]
        assert cells == [(a, b) for a in range(3) for b in range(4)]
    first = match_tokens(x, (12, 12), (4, 3)).target
    assert torch.equal(match_tokens(x[:1], (12, 12), (4, 3), generator=g).target, first)
    assert torch.equal(match_tokens(normal(3, 144, 4), (12, 12), (4, 3), generator=g).target, first)


def test_zero_tokens_are_matched_and_merged():
    matching = match_tokens(torch.zeros(1, 16, 4), (4, 4), (2, 2))
    assert torch.isfinite(matching.merge(torch.ones(1, 16, 2), 12)).all()


# ---------------------------------------------------------------------------------------------------- attention
def maps(dim=24, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Linear(dim, dim, bias=False).double() for _ in range(3)]


def heads_of(x, heads=4):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def test_few_agents_are_two_softmaxes_of_two_scales_and_a_shortcut():
    x, hidden = normal(2, 144, 24), normal(2, 144, 24, seed=1)
    to = maps()
    matching = match_tokens(hidden, (12, 12))
    y, agents = (
        matching.merge(x, 57),
        heads_of(to[0](matching.merge(x, 135))),
    )  # of 144: 0.4, 0.95 but 9 targets
    q, k, v = (heads_of(f(y)) for f in to)
    read = torch.softmax(agents @ k.mT * 6**-0.5, -1) @ v
    out = torch.softmax(q @ agents.mT * 6 ** (-0.5 * 0.3), -1) @ read + 0.075 * v
    want = matching.unmerge(out.transpose(1, 2).flatten(2), 57)
    torch.testing.assert_close(agent_sd_attention(x, *to, 4, matching), want, atol=1e-12, rtol=0)
    out = torch.softmax(q @ agents.mT * 6 ** (-0.5 * 0.5), -1) @ read + 0.2 * v
    want = matching.unmerge(out.transpose(1, 2).flatten(2), 57)
    got = agent_sd_attention(x, *to, 4, matching, k2=0.5, shortcut=0.2)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("stride", "agent_ratio"), [((2, 2), 0.5), ((2, 2), 0.95), ((4, 4), 0.7)])
def test_with_half_as_many_agents_or_more_it_is_full_attention_of_the_merged_tokens(stride, agent_ratio):
    x, to = normal(1, 64, 24), maps(seed=1)
    matching = match_tokens(x, (8, 8), stride)
    ratio = 0.5 if stride == (2, 2) else 0.4
    count = int(64 * ratio)
    q, k, v = (heads_of(f(matching.merge(x, count))) for f in to)
    full = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    got = agent_sd_attention(x, *to, 4, matching, ratio=ratio, agent_ratio=agent_ratio)
    torch.testing.assert_close(got, matching.unmerge(full, count), atol=1e-12, rtol=0)


def test_nothing_merged_and_no_agents_is_the_models_own_attention():
    x, to = normal(3, 49, 24), maps(seed=2)
    full = F.scaled_dot_product_attention(*(heads_of(f(x)) for f in to)).transpose(1, 2).flatten(2)
    got = agent_sd_attention(x, *to, 4, match_tokens(x, (7, 7)), ratio=0.0, agent_ratio=0.0)
    torch.testing.assert_close(got, full, atol=1e-12, rtol=0)


def test_errors_name_the_argument():
    x = normal(1, 16, 4)
    matching = match_tokens(x, (4, 4), (2, 2))
    with pytest.raises(
        ValueError, match=r"x must be \(B, h \* w, C\) and the grid at least a cell; got \(1, 16, 4\)"
    ):
        match_tokens(x, (4, 5))
    with pytest.raises(ValueError, match=r"grid \(2, 8\), stride \(4, 4\)"):
        match_tokens(x, (2, 8))
    with pytest.raises(ValueError, match="match_tokens: resolution must be"):
        match_tokens(x, (4, 4), (0, 2))
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\], got 1.5"):
        matching.merged(1.5)
    with pytest.raises(ValueError, match=r"merge: count must be in 0 .. 12, got 13"):
        matching.merge(x, 13)
    with pytest.raises(ValueError, match=r"unmerge: accepted are tokens \(1, 10, C\), got \(1, 16, 4\)"):
        matching.unmerge(x, 6)
