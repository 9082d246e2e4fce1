"""BlockLayout against boolean masks: conversions, set algebra, canonical form, validation, files."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from foveate.core.layout import TILE, BlockLayout, pack_bits, tail_word, tiles, unpack_bits

LENGTHS = st.one_of(st.integers(1, 260), st.sampled_from([1, 3, 63, 64, 65, 127, 128, 129, 192, 200]))


@st.composite
def masks(draw, batch=None, heads=None, q_len=None, k_len=None):
    """Bool (B, H, N, M): tiles that are empty, full, of few kinds, or noise."""
    batch = draw(st.integers(1, 2)) if batch is None else batch
    heads = draw(st.integers(1, 3)) if heads is None else heads
    n = draw(LENGTHS) if q_len is None else q_len
    m = draw(LENGTHS) if k_len is None else k_len
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    kinds = np.stack(
        [
            np.zeros((TILE, TILE), bool),
            np.ones((TILE, TILE), bool),
            np.tri(TILE, dtype=bool),
            rng.random((TILE, TILE)) < 0.5,
            rng.random((TILE, TILE)) < 0.002,
        ]
    )
    weights = rng.random(5) ** 3
    which = rng.choice(5, size=(batch, heads, tiles(n), tiles(m)), p=weights / weights.sum())
    whole = kinds[which].transpose(0, 1, 2, 4, 3, 5).reshape(batch, heads, tiles(n) * TILE, tiles(m) * TILE)
    return torch.from_numpy(np.ascontiguousarray(whole[:, :, :n, :m]))


def canonical(layout: BlockLayout) -> None:
    """What the class promises about its arrays, checked tile by tile."""
    words, used = layout.dictionary, set(layout.tile_id.tolist())
    assert len({tuple(row) for row in words.tolist()}) == len(words), "a bitmap twice"
    assert used - {0} == set(range(1, len(words) + 1)), "a bitmap unused"
    bits = unpack_bits(words.numpy())
    rows = layout.rows.tolist()
    for row, idx, number in zip(rows, layout.tile_idx.tolist(), layout.tile_id.tolist(), strict=True):
        height = min(TILE, layout.q_len - TILE * (row % layout.q_tiles))
        width = min(TILE, layout.k_len - TILE * idx)
        if number:
            tile = bits[number - 1]
            assert tile.any(), "an empty tile is listed"
            assert not tile[height:].any(), "a bit below the last query"
            assert not tile[:, width:].any(), "a bit beyond the last key"
            assert not tile[:height, :width].all(), "a full tile has a bitmap"
    for start, end in zip(layout.row_ptr[:-1].tolist(), layout.row_ptr[1:].tolist(), strict=True):
        assert (layout.tile_idx[start:end].diff() > 0).all()


# ---------------------------------------------------------------------- conversions
@settings(max_examples=120, deadline=None)
@given(mask=masks())
def test_a_mask_survives_the_round_trip(mask):
    layout = BlockLayout.from_mask(mask)
    canonical(layout)
    assert torch.equal(layout.to_dense(), mask)
    assert layout.area == int(mask.sum())
    assert layout.density == pytest.approx(float(mask.double().mean()))
    padded = torch.nn.functional.pad(mask.long(), (0, 0, 0, -mask.shape[2] % TILE))
    per_tile = padded.unflatten(2, (-1, TILE))
    assert torch.equal(layout.row_area, per_tile.sum((3, 4)))
    checked_again = BlockLayout(
        layout.q_len,
        layout.k_len,
        layout.row_ptr,
        layout.tile_idx,
        layout.tile_id,
        layout.dictionary,
        layout.batch,
        layout.heads,
    )
    assert checked_again == layout


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (3, 2, 5, 7)])
def test_masks_of_two_to_four_dimensions(shape):
    mask = torch.rand(shape) < 0.5
    layout = BlockLayout.from_mask(mask)
    assert torch.equal(layout.to_dense(), mask.reshape((1,) * (4 - len(shape)) + shape))


def test_masks_with_any_strides():
    mask = torch.rand(200, 130) < 0.5
    assert BlockLayout.from_mask(mask.t()) == BlockLayout.from_mask(mask.t().contiguous())
    wide = mask[:1].expand(200, 130)
    assert torch.equal(BlockLayout.from_mask(wide).to_dense()[0, 0], wide)


@settings(max_examples=40, deadline=None)
@given(first=masks(batch=1, heads=1), data=st.data())
def test_equal_masks_have_equal_arrays_and_others_do_not(first, data):
    """Canonical: whatever the order in which bitmaps are offered, the arrays come out the same."""
    layout = BlockLayout.from_mask(first)
    keys, ids, table = layout._tiles()
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(len(table))
    place = np.empty(len(table), np.int64)
    place[order] = np.arange(len(table))
    doubled = np.concatenate([table[order], table[order]])  # every bitmap twice, and the full one spelt out
    which = place[ids] + len(table) * (np.arange(len(ids)) % 2)
    again = BlockLayout.from_tiles(
        layout.q_len, layout.k_len, keys // layout.k_tiles, keys % layout.k_tiles, doubled, which=which
    )
    assert again == layout
    canonical(again)
    other = first.clone()
    at = tuple(data.draw(st.integers(0, size - 1)) for size in first.shape)
    other[at] = ~other[at]
    assert BlockLayout.from_mask(other) != layout


def test_from_tiles_drops_empty_and_out_of_range():
    words = np.stack([np.zeros(TILE, np.int64), np.full(TILE, -1, np.int64)])
    words[0, 60] = -1  # a row that does not exist for 50 queries
    layout = BlockLayout.from_tiles(50, 100, np.array([0, 0]), np.array([0, 1]), words)
    assert layout.nnz == 1
    assert layout.tile_id.tolist() == [0]
    assert layout.area == 50 * 36


@pytest.mark.parametrize("block", [64, 128, 192])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(200, 200), (65, 300), (300, 65), (130, 131), (64, 128), (1, 500)])
def test_from_blocks(block, causal, n, m):
    blocks = (
        torch.rand(2, 3, -(-n // block), -(-m // block), generator=torch.Generator().manual_seed(n)) < 0.6
    )
    q, k = torch.arange(n), torch.arange(m)
    want = blocks[:, :, q // block][..., k // block]
    if causal:
        want = want & (k <= q[:, None] + m - n)
    layout = BlockLayout.from_blocks(blocks, n, m, block=block, causal=causal)
    canonical(layout)
    assert torch.equal(layout.to_dense(), want)
    one = BlockLayout.from_blocks(blocks[0, 0], n, m, block=block, causal=causal)
    assert torch.equal(one.to_dense()[0], want[0, :1])


@pytest.mark.parametrize("offset", [0, 1, 31, 63, 64, 65, -1, -40, -63, -64, -65, -200])
def test_from_blocks_causal_at_every_kind_of_offset(offset):
    """Bottom-right alignment: the last query sees the last key; early queries of a long q see nothing."""
    n = 250
    m = n + offset
    blocks = torch.ones(tiles(n), tiles(m), dtype=torch.bool)
    want = torch.arange(m) <= torch.arange(n)[:, None] + offset
    assert torch.equal(BlockLayout.from_blocks(blocks, n, m, causal=True).to_dense()[0, 0], want)


@settings(deadline=None)
@given(bits=st.lists(st.booleans(), min_size=TILE, max_size=TILE))
def test_bits_and_words(bits):
    array = np.array(bits)
    word = pack_bits(array[None])
    assert word.dtype == np.int64
    value = sum(1 << c for c, bit in enumerate(bits) if bit)
    assert int(np.uint64(word.view(np.uint64)[0])) == value
    assert np.array_equal(unpack_bits(word)[0], array)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128])
def test_tail_word(length):
    inside = (length - 1) % TILE + 1
    assert int(tail_word(length)) == (1 << inside) - 1
    assert tiles(length) == (length + 63) // 64


# ---------------------------------------------------------------------- set algebra
@settings(max_examples=80, deadline=None)
@given(data=st.data(), n=LENGTHS, m=LENGTHS)
def test_algebra_is_that_of_masks(data, n, m):
    size = {"q_len": n, "k_len": m}
    first = data.draw(masks(batch=2, heads=data.draw(st.sampled_from([1, 3])), **size))
    second = data.draw(masks(batch=data.draw(st.sampled_from([1, 2])), heads=3, **size))
    a, b = BlockLayout.from_mask(first), BlockLayout.from_mask(second)
    for got, want in ((a & b, first & second), (a | b, first | second), (~a, ~first)):
        canonical(got)
        assert torch.equal(got.to_dense(), want)
        assert got == BlockLayout.from_mask(want)
    assert ~~a == a
    assert (a & ~a).nnz == 0
    assert ((a | ~a).tile_id == 0).all()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_expand_repeats_the_set(data):
    mask = data.draw(masks(batch=1, heads=1))
    layout = BlockLayout.from_mask(mask)
    wide = layout.expand(2, 3)
    canonical(wide)
    assert torch.equal(wide.to_dense(), mask.expand(2, 3, -1, -1))
    assert layout.expand(1, 1) is layout
    half = BlockLayout.from_mask(data.draw(masks(batch=2, heads=1)))
    assert torch.equal(half.expand(2, 2).to_dense(), half.to_dense().expand(2, 2, -1, -1))
    with pytest.raises(ValueError, match="does not expand to 3 and 1"):
        half.expand(3, 1)


def test_lengths_that_do_not_match_do_not_combine():
    a = BlockLayout.from_mask(torch.ones(5, 6, dtype=torch.bool))
    b = BlockLayout.from_mask(torch.ones(5, 7, dtype=torch.bool))
    for combine in (lambda: a & b, lambda: a | b):
        with pytest.raises(ValueError, match="5 x 6 and 5 x 7 do not combine"):
            combine()
    with pytest.raises(TypeError):
        _ = a & torch.ones(5, 6, dtype=torch.bool)
    assert a != "a"


def test_a_complement_that_would_be_huge_is_refused():
    n = 64 * 9000
    empty = torch.zeros(0, dtype=torch.int32)
    ptr = torch.zeros(9001, dtype=torch.int64)
    words = torch.zeros(0, TILE, dtype=torch.int64)
    layout = BlockLayout(n, n, ptr, empty, empty, words)
    with pytest.raises(ValueError, match="complement the pattern instead"):
        _ = ~layout
    with pytest.raises(ValueError, match="Pass limit= to allow it"):
        layout.to_dense()


# ---------------------------------------------------------------------- validation
def parts(**changed):
    """A valid 100 x 130 layout's arguments (causal), with some replaced."""
    whole = BlockLayout.from_mask(torch.ones(100, 130, dtype=torch.bool).tril(30))
    names = ("q_len", "k_len", "row_ptr", "tile_idx", "tile_id", "dictionary", "batch", "heads")
    return {**{name: getattr(whole, name) for name in names}, **changed}


def integers(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def test_the_valid_arguments_are_valid():
    assert BlockLayout(**parts()).to_dense()[0, 0].equal(torch.ones(100, 130, dtype=torch.bool).tril(30))
    assert parts()["tile_idx"].tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"q_len": 0}, ValueError, "q_len must be a positive int, got 0"),
        ({"k_len": 2.0}, ValueError, "k_len must be a positive int"),
        ({"heads": -1}, ValueError, "heads must be a positive int"),
        ({"row_ptr": integers(0, 2, 5)}, TypeError, "row_ptr must be a contiguous torch.int64"),
        (
            {"tile_idx": [0, 1, 0, 1, 2]},
            TypeError,
            "tile_idx must be a contiguous torch.int32 tensor, got list",
        ),
        ({"tile_id": integers(0, 0, 0, 0, 0, dtype=torch.int64)}, TypeError, "tile_id"),
        (
            {"dictionary": torch.zeros(TILE, 2, dtype=torch.int64).t()},
            TypeError,
            "dictionary must be a contiguous",
        ),
        ({"row_ptr": integers(0, 5, dtype=torch.int64)}, ValueError, "row_ptr must have 3 entries"),
        ({"heads": 2}, ValueError, "row_ptr must have 5 entries"),
        ({"row_ptr": integers(0, 3, 2, dtype=torch.int64)}, ValueError, "row_ptr must rise"),
        ({"row_ptr": integers(1, 2, 5, dtype=torch.int64)}, ValueError, "row_ptr must rise"),
        ({"row_ptr": integers(0, 6, 5, dtype=torch.int64)}, ValueError, "row_ptr must rise"),
        ({"tile_idx": integers(0, 1, 0, 1)}, ValueError, "equal in length"),
        ({"tile_idx": integers(0, 1, 0, 1, 3)}, ValueError, r"tile_idx must lie in \[0, 3\)"),
        ({"tile_idx": integers(-1, 1, 0, 1, 2)}, ValueError, "tile_idx must lie"),
        ({"tile_idx": integers(1, 0, 0, 1, 2)}, ValueError, "strictly ascending"),
        ({"tile_idx": integers(0, 1, 0, 0, 2)}, ValueError, "strictly ascending"),
        ({"tile_id": integers(0, 0, 0, 0, 99)}, ValueError, "tile_id must lie"),
        ({"tile_id": integers(0, 0, 0, 0, -1)}, ValueError, "tile_id must lie"),
        ({"dictionary": torch.zeros(3, 32, dtype=torch.int64)}, ValueError, "dictionary must have shape"),
    ],
)
def test_contradictions_are_refused(changed, error, words):
    with pytest.raises(error, match=words):
        BlockLayout(**parts(**changed))


def test_empty_rows_between_full_ones_are_valid():
    ptr = integers(0, 0, 2, 2, 3, 3, dtype=torch.int64)
    layout = BlockLayout(
        300, 200, ptr, integers(1, 3, 0), integers(0, 0, 0), torch.zeros(0, TILE, dtype=torch.int64)
    )
    assert layout.row_area.tolist() == [[[0, 64 * 64 + 64 * 8, 0, 64 * 64, 0]]]


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(4, 4), TypeError),
        ([[True]], TypeError),
        (torch.ones(4, dtype=torch.bool), TypeError),
        (torch.ones(1, 1, 1, 4, 4, dtype=torch.bool), TypeError),
        (torch.ones(0, 4, dtype=torch.bool), ValueError),
    ],
)
def test_masks_are_checked(mask, error):
    with pytest.raises(error, match="mask must"):
        BlockLayout.from_mask(mask)


@pytest.mark.parametrize(
    ("blocks", "block", "error", "words"),
    [
        (torch.ones(2, 2, dtype=torch.bool), 100, ValueError, "multiple of 64, got 100"),
        (torch.ones(2, 2, dtype=torch.bool), 0, ValueError, "multiple of 64, got 0"),
        (torch.ones(2, 2), 64, TypeError, "bool tensor of 2 to 4 dimensions"),
        (torch.ones(2, 3, dtype=torch.bool), 64, ValueError, r"must end in \(2, 2\)"),
    ],
)
def test_block_maps_are_checked(blocks, block, error, words):
    with pytest.raises(error, match=words):
        BlockLayout.from_blocks(blocks, 128, 128, block=block)


def test_it_is_immutable_and_hashable():
    layout = BlockLayout(**parts())
    with pytest.raises(AttributeError):
        layout.q_len = 5
    assert len({layout, BlockLayout(**parts())}) == 2  # hashed by identity, compared by content
    assert layout == BlockLayout(**parts())


def test_to_the_same_device_is_itself_and_bytes_are_counted():
    layout = BlockLayout(**parts())
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    assert layout.nbytes == 3 * 8 + 5 * 4 + 5 * 4 + len(layout.dictionary) * TILE * 8


# ---------------------------------------------------------------------- files
@settings(max_examples=15, deadline=None)
@given(mask=masks())
def test_save_and_load(mask, tmp_path_factory):
    path = tmp_path_factory.mktemp("layout") / "a.safetensors"
    layout = BlockLayout.from_mask(mask)
    layout.save(path)
    assert BlockLayout.load(path) == layout
    assert os.listdir(path.parent) == ["a.safetensors"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    old = BlockLayout(**parts())
    old.save(path)

    def broken(arrays, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        BlockLayout.from_mask(torch.ones(3, 3, dtype=torch.bool)).save(path)
    assert BlockLayout.load(path) == old


def test_files_are_validated(tmp_path):
    arrays = {name: parts()[name].contiguous() for name in ("row_ptr", "tile_idx", "tile_id", "dictionary")}
    meta = {"format": "foveate.BlockLayout/1", "q_len": "100", "k_len": "130", "batch": "1", "heads": "1"}
    save_file(arrays, tmp_path / "good", metadata=meta)
    assert BlockLayout.load(tmp_path / "good") == BlockLayout(**parts())
    save_file(arrays, tmp_path / "foreign")
    with pytest.raises(ValueError, match="is not a saved BlockLayout"):
        BlockLayout.load(tmp_path / "foreign")
    save_file({**arrays, "tile_idx": arrays["tile_idx"] + 7}, tmp_path / "bad", metadata=meta)
    with pytest.raises(ValueError, match="tile_idx must lie"):
        BlockLayout.load(tmp_path / "bad")
    save_file(arrays, tmp_path / "short", metadata={**meta, "q_len": "400"})
    with pytest.raises(ValueError, match="row_ptr must have"):
        BlockLayout.load(tmp_path / "short")
    with pytest.raises(FileNotFoundError):
        BlockLayout.load(tmp_path / "none")
