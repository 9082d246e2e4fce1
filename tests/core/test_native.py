"""The native engine against the float64 definition: every instruction set, dtype, shape, mask and poison."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pattern_strategies import expressions

import foveate as fv
from foveate.catalogue.conformance.budget import assert_within_budget
from foveate.core.engines import native
from foveate.core.engines import native_library as library
from foveate.core.engines.native_library import Scores, Where
from foveate.core.layout import BlockLayout
from foveate.core.request import EngineRefusal
from foveate.core.scores import ALiBi, Bias, RelativeBias, SoftCap, Temperature
from foveate.patterns import Causal, SlidingWindow

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
# where the bfloat16 dot product runs, weights are rounded to bfloat16 before they meet the values
COARSE = {"avx512_bf16": 2.0, "amx": 2.0, "bf16dot_emulated": 2.0}


@st.composite
def shapes(draw, heads=1, batch=1):
    """(batch, heads, kv_heads, dim, v_dim, dtype, seed), heads and batch as a pattern needs them."""
    kv_heads = draw(st.sampled_from([1, 2]))
    total = heads if heads > 1 else kv_heads * draw(st.sampled_from([1, 3]))
    if total % kv_heads:
        kv_heads = 1
    dim, v_dim = (draw(st.sampled_from([1, 3, 7, 16, 32, 63, 64, 80, 111, 128])) for _ in range(2))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    rows = batch if batch > 1 else draw(st.sampled_from([1, 2]))
    return rows, total, kv_heads, dim, v_dim, dtype, draw(st.integers(0, 2**31))


def make(batch, heads, kv_heads, n, m, dim, v_dim, dtype, seed, order="bhnd"):
    """q, k, v plain, in transformers' memory order (B, N, H, D), or as a slice of wider tensors."""
    g = torch.Generator().manual_seed(seed)

    def one(h, length, d):
        if order == "bnhd":
            return torch.randn(batch, length, h, d, generator=g).to(dtype).transpose(1, 2)
        if order == "slice":
            return torch.randn(batch, h, length, 2 * d + 3, generator=g).to(dtype)[..., 1 : d + 1]
        if order == "last":
            return torch.randn(batch, h, d, length, generator=g).to(dtype).transpose(2, 3)
        return torch.randn(batch, h, length, d, generator=g).to(dtype)

    return one(heads, n, dim), one(kv_heads, m, dim), one(kv_heads, m, v_dim)


FULL, CAUSAL = Where(library.KINDS["full"]), Where(library.KINDS["causal"])


def where(layout):
    """A layout as the library takes it."""
    arrays = layout.row_ptr, layout.tile_idx, layout.tile_id, layout.dictionary
    return Where(library.KINDS["layout"], *arrays, layout.batch, layout.heads)


@settings(max_examples=250, **QUIET)
@given(st.data())
def test_pattern_expressions(data):
    pattern, n, m, dense = data.draw(expressions(depth=2))
    batch, heads, kv_heads, dim, v_dim, dtype, seed = data.draw(shapes(pattern.heads, pattern.batch))
    order = data.draw(st.sampled_from(["bhnd", "bnhd", "slice", "last"]))
    q, k, v = make(batch, heads, kv_heads, n, m, dim, v_dim, dtype, seed, order)
    out, lse = fv.attention(q, k, v, pattern, return_lse=True, engine="native")
    factor = COARSE.get(library.best_isa(), 1.0) if dtype == torch.bfloat16 else 1.0
    assert_within_budget(out, q, k, v, dense, lse=lse, factor=factor)


@st.composite
def requests(draw):
    n, m = (draw(st.sampled_from([1, 2, 5, 63, 64, 65, 111, 130, 257])) for _ in range(2))
    kind = draw(st.sampled_from(["full", "causal", "layout"]))
    return n, m, kind, draw(st.floats(0.0, 1.0)), draw(shapes()), draw(st.integers(1, 5))


@pytest.mark.parametrize("isa", library.ISAS)
@settings(max_examples=60, **QUIET)
@given(case=requests())
def test_every_instruction_set(isa, case):
    if isa not in library.available():
        pytest.skip(f"this CPU has no {isa}")
    n, m, kind, density, (batch, heads, kv_heads, dim, v_dim, dtype, seed), threads = case
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    q, k, v = make(batch, heads, kv_heads, n, m, dim, v_dim, dtype, seed)
    allowed, pairs = None, CAUSAL if kind == "causal" else FULL
    if kind == "causal":
        allowed = torch.arange(n)[:, None] + (m - n) >= torch.arange(m)[None, :]
    if kind == "layout":
        allowed = torch.rand(batch, heads, n, m, generator=torch.Generator().manual_seed(seed)) < density
        pairs = where(BlockLayout.from_mask(allowed))
    out, lse = library.call(q, k, v, pairs, Scores(scale=dim**-0.5), isa=isa, threads=threads)
    factor = COARSE.get(isa, 1.0) if dtype == torch.bfloat16 else 1.0
    assert_within_budget(out, q, k, v, allowed, lse=lse, factor=factor)


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_poison_never_leaks(isa, dtype, poison):
    if isa not in library.available():
        pytest.skip(f"this CPU has no {isa}")
    q, k, v = make(1, 2, 1, 130, 200, 32, 32, dtype, 0)
    allowed = torch.rand(130, 200, generator=torch.Generator().manual_seed(1)) < 0.4
    allowed[:, [0, 70, 199]] = False
    allowed[:, 64] = False
    allowed[100:, 64] = True  # visible to some rows of the tile only: those must show it
    allowed[17] = False
    for j in (0, 64, 70, 199):
        k[:, :, j], v[:, :, j] = poison, poison
    layout = BlockLayout.from_mask(allowed)
    out, lse = library.call(q, k, v, where(layout), Scores(scale=0.2), isa=isa)
    assert torch.isfinite(out[:, :, :100]).all()
    assert (out[:, :, 17] == 0).all()
    assert torch.isneginf(lse[:, :, 17]).all()
    factor = COARSE.get(isa, 1.0) if dtype == torch.bfloat16 else 1.0
    assert_within_budget(
        out[:, :, :100], q[:, :, :100], k, v, allowed[:100], scale=0.2, lse=lse[:, :, :100], factor=factor
    )


def test_poisoned_memory_around_the_tensors_is_never_read():
    """NaN beyond every head, row and length: reading one element too many shows."""
    big = torch.full((3, 4, 100, 40), float("nan"))
    big[1, 1:3, 3:74, 5:37] = torch.randn(2, 71, 32, generator=torch.Generator().manual_seed(0))
    x = big[1:2, 1:3, 3:74, 5:37]
    out, lse = fv.attention(x, x, x, SlidingWindow(9), return_lse=True, engine="native")
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-30, 40.0, 1e3])
def test_extreme_logits(dtype, magnitude):
    q, k, v = make(1, 2, 2, 100, 150, 32, 32, dtype, 3)
    q = q * magnitude
    out, lse = fv.attention(q, k, v, Causal(), return_lse=True, engine="native")
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    allowed = torch.arange(100)[:, None] + 50 >= torch.arange(150)[None, :]
    assert_within_budget(out, q, k, v, allowed, lse=lse, factor=COARSE.get(library.best_isa(), 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", library.ISAS)
def test_softcap_and_sinks(dtype, isa):
    if isa not in library.available():
        pytest.skip(f"this CPU has no {isa}")
    q, k, v = make(2, 4, 2, 77, 99, 24, 40, dtype, 5)
    sinks = torch.tensor([0.0, 5.0, -3.0, -float("inf")])
    layout = (Causal() & SlidingWindow(20)).layout(77, 99)
    scores = Scores(scale=1.5, softcap=4.0, sinks=sinks)
    out, lse = library.call(q, k, v, where(layout), scores, isa=isa)
    factor = COARSE.get(isa, 1.0) if dtype == torch.bfloat16 else 1.0
    assert_within_budget(
        out,
        q,
        k,
        v,
        layout.to_dense(),
        scores=(SoftCap(4.0),),
        sinks=sinks,
        scale=1.5,
        lse=lse,
        factor=factor,
    )


def test_a_row_with_only_a_sink_gives_zero():
    q, k, v = make(1, 2, 2, 10, 10, 8, 8, torch.float32, 0)
    mask = torch.ones(10, 10, dtype=torch.bool)
    mask[4] = False
    out, lse = fv.attention(q, k, v, mask, sinks=torch.tensor([0.5, -1.0]), return_lse=True, engine="native")
    assert (out[:, :, 4] == 0).all()
    assert torch.allclose(lse[0, :, 4], torch.tensor([0.5, -1.0]))


def test_same_bits_for_any_number_of_threads():
    q, k, v = make(2, 4, 2, 300, 300, 64, 64, torch.float32, 1)
    runs = [library.call(q, k, v, CAUSAL, Scores(scale=0.125), threads=t) for t in (1, 2, 3, 2)]
    assert all(torch.equal(out, runs[0][0]) and torch.equal(lse, runs[0][1]) for out, lse in runs)


def test_own_threads_when_no_pool_is_given(monkeypatch):
    q, k, v = make(1, 4, 2, 200, 200, 64, 64, torch.float32, 1)
    with_pool = library.call(q, k, v, CAUSAL, Scores(scale=0.125), threads=3)
    monkeypatch.setattr(library, "pool", lambda: None)
    without = library.call(q, k, v, CAUSAL, Scores(scale=0.125), threads=3)
    assert torch.equal(with_pool[0], without[0])


def test_it_runs_on_the_pool_of_torch():
    assert library.pool() is not None
    assert "torch's OpenMP pool" in native.describe()


def test_output_keeps_the_memory_order_of_q():
    q, k, v = make(2, 4, 2, 30, 30, 16, 24, torch.float32, 1, order="bnhd")
    out = fv.attention(q, k, v, engine="native")
    assert out.shape == (2, 4, 30, 24)
    assert out.transpose(1, 2).is_contiguous()


# ---------------------------------------- refusals
def test_refusals_name_the_reason():
    q, k, v = make(1, 2, 2, 10, 10, 8, 8, torch.float32, 0)
    with pytest.raises(EngineRefusal, match="float64"):
        fv.attention(q.double(), k.double(), v.double(), engine="native")
    for score, reason in [
        (
            (SoftCap(3.0), Temperature(torch.ones(10))),
            "Temperature, then SoftCap, then biases; got SoftCap, Temp",
        ),
        ((Bias(torch.zeros(10, 10)), Bias(torch.zeros(10, 10))), "one Bias at a time"),
        ((ALiBi(torch.ones(2)), RelativeBias(torch.zeros(2, 5))), "one relative bias at a time"),
    ]:
        with pytest.raises(EngineRefusal, match=reason):
            fv.attention(q, k, v, score=score, engine="native")
    wide = torch.randn(1, 1, 4, 513)
    with pytest.raises(EngineRefusal, match="512"):
        fv.attention(wide, wide, wide, engine="native")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tile_idx", torch.tensor([99], dtype=torch.int32), "out of range"),
        ("tile_id", torch.tensor([7], dtype=torch.int32), "out of range"),
        ("tile_idx", torch.tensor([-1], dtype=torch.int32), "out of range"),
        ("row_ptr", torch.tensor([0, 2]), "row_ptr"),
        ("row_ptr", torch.tensor([1, 1]), "row_ptr"),
        ("row_ptr", torch.tensor([0, -1]), "row_ptr"),
    ],
)
def test_the_library_checks_what_the_layout_says(field, value, message):
    """Past Python's own validation: the C entry point must not trust its caller."""
    x = torch.randn(1, 1, 10, 8)
    arrays = {
        "row_ptr": torch.tensor([0, 1]),
        "tile_idx": torch.zeros(1, dtype=torch.int32),
        "tile_id": torch.zeros(1, dtype=torch.int32),
        "dictionary": torch.zeros(0, 64, dtype=torch.int64),
    }
    arrays[field] = value
    with pytest.raises(RuntimeError, match=message):
        library.call(x, x, x, Where(2, *arrays.values(), 1, 1), Scores())


def test_the_library_checks_versions_and_sizes():
    x = torch.randn(1, 1, 10, 8)
    with pytest.raises(RuntimeError, match="kind"):
        library.call(x, x, x, Where(9), Scores())
    with pytest.raises(RuntimeError, match="threads"):
        library.call(x, x, x, FULL, Scores(), threads=100000)
    with pytest.raises(RuntimeError, match="softcap"):
        library.call(x, x, x, FULL, Scores(softcap=-1.0))
    with pytest.raises(RuntimeError, match="head dims"):
        library.call(*(torch.randn(1, 1, 3, 600),) * 3, FULL, Scores())


def test_nothing_to_do_is_no_error():
    x = torch.randn(0, 2, 5, 8)
    out, lse = library.call(x, x, x, FULL, Scores())
    assert out.shape == (0, 2, 5, 8)
    assert lse.shape == (0, 2, 5)


@pytest.mark.slow
def test_memory_is_linear_in_the_length():
    """Window-512 attention at 131,072 tokens: a dense mask alone would be 16 GiB."""
    import resource

    n = 131_072
    q, k, v = make(1, 1, 1, n, n, 64, 64, torch.float32, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fv.attention(q, k, v, Causal() & SlidingWindow(512), engine="native")
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MiB
    assert extra < 200, f"{extra:.0f} MiB beyond q, k and v"
