"""The lazy mask and its recognition: the pattern of a rule is the mask that transformers would have built."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import masking_utils as hf

from foveate.core.patterns import Causal, Full, SlidingWindow
from foveate.hf import rule as rules
from foveate.hf.recognise import is_causal, pattern_of, window_of
from foveate.hf.rule import Rule, RuleMask, build_mask
from foveate.hf.sets import Moved, PerRow, Placed, RuleFunction, SameGroup

PADS = torch.tensor([0, 3])


def _ids(length):
    return torch.tensor([[0] * 5 + [1] * (length - 5), [0] * 2 + [1] * 7 + [2] * (length - 9)])


def _blocks(length):
    ids = torch.full((2, length), -1)
    ids[0, 3:7], ids[1, 1:4], ids[1, 8:10] = 0, 1, 2
    return ids


def _odd(b, h, q, kv):
    return (q + kv + b) % 3 != 0


RULES = {
    "causal": (lambda n: hf.causal_mask_function, True),
    "full": (lambda n: hf.bidirectional_mask_function, True),
    "sliding": (lambda n: hf.sliding_window_causal_mask_function(4), True),
    "wide": (lambda n: hf.sliding_window_causal_mask_function(400), True),
    "sliding both": (lambda n: hf.sliding_window_bidirectional_mask_function(3), True),
    "chunked": (lambda n: hf.chunked_causal_mask_function(4, PADS), True),
    "chunked even": (lambda n: hf.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)), True),
    "packed": (
        lambda n: hf.and_masks(hf.packed_sequence_mask_function(_ids(n)), hf.causal_mask_function),
        True,
    ),
    "blockwise": (lambda n: hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(_blocks(n))), True),
    "own": (lambda n: _odd, False),
    "own and causal": (lambda n: hf.and_masks(hf.causal_mask_function, _odd), False),
    "or of windows": (
        lambda n: hf.or_masks(
            hf.sliding_window_causal_mask_function(3), hf.sliding_window_causal_mask_function(6)
        ),
        True,
    ),
}
GEOMETRIES = {  # q_len, kv_len, q_offset, kv_offset
    "prefill": (13, 13, 0, 0),
    "dynamic": (5, 13, 8, 0),
    "decode": (1, 13, 12, 0),
    "static prefill": (6, 20, 0, 0),
    "static decode": (1, 20, 9, 0),
    "sliding cache": (3, 7, 10, 6),
    "long": (130, 130, 0, 0),
}


def _functions(pattern):
    found = [pattern] if isinstance(pattern, RuleFunction) else []
    for part in getattr(pattern, "parts", ()):
        found += _functions(part)
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("which", RULES)
def test_pattern_equals_the_mask(which, geometry, padded):
    q_len, kv_len, q_offset, kv_offset = GEOMETRIES[geometry]
    make, analytic = RULES[which]
    end = max(q_offset + q_len, kv_offset + kv_len)
    function = make(end)
    padding = torch.arange(q_offset + q_len)[None] >= PADS[:, None] if padded else None
    rule = Rule(2, q_len, kv_len, q_offset, kv_offset, function, padding)
    window = window_of(rule)
    pattern = pattern_of(rule, window)
    dense = rule.to_dense()
    assert not dense[..., window.k_len :].any()
    layout = (pattern or Full()).layout(window.q_len, window.k_len)
    assert torch.equal(layout.to_dense().expand(2, 1, -1, -1), dense[..., : window.k_len])
    if analytic and (window.aligned or which == "chunked"):
        assert not _functions(pattern)
    if geometry.startswith("static") and is_causal(function):
        assert window.k_len == q_offset + q_len


def test_standard_rules_take_their_simplest_form():
    def form(function, q_len=9, kv_len=9, q_offset=0):
        rule = Rule(1, q_len, kv_len, q_offset, 0, function)
        return pattern_of(rule, window_of(rule))

    assert form(hf.causal_mask_function) == Causal()
    assert form(hf.causal_mask_function, 1, 9, 8) is None
    assert form(hf.bidirectional_mask_function) is None
    assert form(hf.sliding_window_causal_mask_function(4)) == SlidingWindow(4)
    assert form(hf.sliding_window_causal_mask_function(9)) == Causal()
    assert form(hf.sliding_window_causal_mask_function(4), 9, 9) == SlidingWindow(4)
    assert form(hf.chunked_causal_mask_function(9, torch.zeros(1, dtype=torch.int64))) == Causal()


def test_packed_rules_lose_their_position_remap():
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    function = hf.packed_sequence_compatibility_function(
        hf.sliding_window_causal_mask_function(2), positions, ids
    )
    rule = Rule(1, 7, 7, 0, 0, function)
    pattern = pattern_of(rule, window_of(rule))
    assert not _functions(pattern)
    assert torch.equal(pattern.layout(7).to_dense(), rule.to_dense())
    # positions that do not rise by one inside a sequence keep the function
    strange = hf.packed_sequence_compatibility_function(hf.causal_mask_function, positions * 2, ids)
    rule = Rule(1, 7, 7, 0, 0, strange)
    pattern = pattern_of(rule, window_of(rule))
    assert _functions(pattern)
    assert torch.equal(pattern.layout(7).to_dense(), rule.to_dense())


def test_functions_that_need_vmap():
    table = torch.rand(20, 20) > 0.5

    def picky(b, h, q, kv):
        assert q.ndim == 0
        return table[q, kv]

    rule = Rule(1, 9, 9, 0, 0, hf.and_masks(hf.causal_mask_function, picky), vmap=True)
    pattern = pattern_of(rule, window_of(rule))
    assert torch.equal(pattern.layout(9).to_dense()[0, 0], (table[:9, :9] & torch.ones(9, 9).tril().bool()))


# -------------------------------------------------------------------------------------- the lazy tensor
def _mask(n=6, m=6, batch=2, **more):
    return build_mask(batch, n, m, mask_function=hf.causal_mask_function, **more)


def test_mask_stores_nothing():
    mask = _mask(50_000, 50_000)
    assert mask.shape == (2, 1, 50_000, 50_000)
    assert mask.untyped_storage().nbytes() == 1
    assert mask.dtype == torch.bool
    assert mask.contiguous() is mask
    assert mask.to("cpu") is mask


def test_mask_windows_stay_rules():
    mask = _mask()
    part = mask[:, :, 2:5, :4]
    assert isinstance(part, RuleMask)
    assert (part.rule.q_offset, part.rule.q_len, part.rule.kv_len) == (2, 3, 4)
    assert torch.equal(part.rule.to_dense(), mask.rule.to_dense()[:, :, 2:5, :4])
    assert isinstance(mask[..., :3], RuleMask)


@pytest.mark.parametrize(
    "operation",
    [
        lambda m: m[0],
        lambda m: m[:, 0],
        lambda m: m.to(torch.float32),
        lambda m: ~m,
        lambda m: m & torch.ones(1, dtype=torch.bool),
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: torch.where(torch.ones(1, 1, 6, 6, dtype=torch.bool), m, False),
        lambda m: m.sum(),
        lambda m: m.any(),
        lambda m: torch.cat([m, m], dim=2),
        lambda m: m.expand(2, 4, 6, 6),
        lambda m: m.float(),
        lambda m: m == True,  # noqa: E712
        lambda m: m.data,
        lambda m: m.mT,
    ],
)
def test_other_operations_see_the_true_mask(operation):
    mask = _mask(attention_mask=torch.tensor([[1] * 6, [0] * 2 + [1] * 4]).bool())
    dense = hf.sdpa_mask(
        2, 6, 6, attention_mask=torch.tensor([[1] * 6, [0] * 2 + [1] * 4]).bool(), allow_is_causal_skip=False
    )
    result = operation(mask)
    assert not isinstance(result, RuleMask)
    assert torch.equal(result, operation(dense))


def test_computing_with_a_huge_mask_is_refused(monkeypatch):
    monkeypatch.setattr(rules, "DENSE_LIMIT", 50)
    with pytest.raises(ValueError, match="72 elements"):
        _mask() & True


def test_static_offsets_are_read_at_once():
    offset = torch.tensor(3)
    mask = build_mask(1, 2, 8, q_offset=offset, mask_function=hf.causal_mask_function)
    offset.add_(4)
    assert mask.rule.q_offset == 3


# ------------------------------------------------------------------------------------------- the sets
@pytest.mark.parametrize("seed", range(12))
def test_groups_and_moved_patterns_are_exact(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    n, m = draw(1, 200), draw(1, 200)
    q_ids, k_ids = (torch.randint(-1, 4, (2, x), generator=generator) for x in (n, m))
    if seed % 2:
        q_ids, k_ids = q_ids.sort(1).values.clamp(min=0), k_ids.sort(1).values.clamp(min=0)
    expected = (q_ids[:, :, None] == k_ids[:, None]) & (q_ids[:, :, None] >= 0)
    pattern = SameGroup(q_ids, k_ids)
    assert torch.equal(pattern.layout(n, m).to_dense()[:, 0], expected)

    dq, dk = draw(-5, n), draw(-70, m)
    n2, m2 = n + max(dq, 0) + draw(0, 5), m + max(dk, 0) + draw(0, 5)
    moved = Moved(pattern, dq, dk, pattern_extent(n, m)).layout(n2, m2).to_dense()[:, 0]
    wanted = torch.zeros(2, n2, m2, dtype=torch.bool)
    for i, j in itertools.product(range(n2), range(m2)):
        if 0 <= i - dq < n and 0 <= j - dk < m:
            wanted[:, i, j] = expected[:, i - dq, j - dk]
    assert torch.equal(moved, wanted)
    rows = [Moved(pattern, dq, dk, pattern_extent(n, m), row=b) for b in (1, 0)]
    assert torch.equal(PerRow(tuple(rows)).layout(n2, m2).to_dense()[:, 0], wanted.flip(0))


def pattern_extent(n, m):
    from foveate.core.patterns import Extent

    return Extent(n, m)


@pytest.mark.parametrize("seed", range(6))
def test_placed_layouts_are_exact(seed):
    generator = torch.Generator().manual_seed(seed)
    n, m = 100 + 37 * seed, 150
    mask = torch.rand(1, 2, n, m, generator=generator) > 0.5
    mask[:, :, :64, 64:128] = True
    mask[:, 0, :, 130:] = False
    placed = Placed(_layout(mask))
    assert torch.equal(placed.layout(n, m).to_dense(), mask)
    moved = Moved(placed, 3, 9, pattern_extent(n, m)).layout(n + 3, m + 9).to_dense()
    assert torch.equal(moved[:, :, 3:, 9:], mask)
    assert not moved[:, :, :3].any()
    assert not moved[..., :9].any()


def _layout(mask):
    from foveate.core.layout import BlockLayout

    return BlockLayout.from_mask(mask)


@pytest.mark.parametrize("m", [1, 63, 64, 65, 200])
def test_row_layouts_are_canonical(m):
    from foveate.hf.plan import row_layout

    generator = torch.Generator().manual_seed(m)
    rows = torch.rand(3, 2, m, generator=generator) > 0.3
    rows[1] = True
    rows[2, 0] = False
    rows[0, 0, 64:128] = rows[0, 1, :64] = True
    made = row_layout(rows.numpy())
    made._validate()
    assert made == _layout(rows[:, :, None])
