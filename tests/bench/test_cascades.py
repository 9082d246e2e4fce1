"""Cascades of Einsums: passes, values, what stays on chip, counts, the machine."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.bench.cascades import (
    KINDS,
    Cascade,
    Einsum,
    KeyBuffer,
    SpatialMachine,
    accelerator_cost,
    attention_cascade,
    attention_shapes,
    key_traffic,
    merge_running,
)

F64 = torch.float64


def inputs(p=7, m=53, e=5, f=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(*s, generator=g, dtype=F64) for n, s in (("Q", (e, p)), ("K", (e, m)), ("V", (f, m)))
    }


def attention(t):
    return (torch.softmax(t["Q"].T @ t["K"], -1) @ t["V"].T).T


@pytest.mark.parametrize(
    ("kind", "passes"),
    [("naive", 2), ("naive_delayed", 1), ("three_pass", 3), ("two_pass", 2), ("one_pass", 1)],
)
def test_passes_over_the_keys(kind, passes):
    assert attention_cascade(kind).passes("m") == passes


def test_passes_by_hand():
    """A mean, a variance about it, and a scaled copy: three; with running sums for both moments, two."""
    m, none = ("m",), ()
    mean = Einsum("mean", none, (("x", m),), "copy", "sum")
    off = Einsum("off", m, (("x", m), ("mean", none)), "exp_diff")
    var = Einsum("var", none, (("off", m), ("off", m)), "mul", "sum")
    out = Einsum("out", m, (("off", m), ("var", none)), "div")
    assert Cascade([mean, off, var, out]).schedule("m") == {"mean": 1, "off": 2, "var": 2, "out": 3}
    scaled = Einsum("both", none, (("mean", none), ("var", none)), "mul")  # after two passes, in none
    late = Einsum("late", m, (("x", m), ("both", none)), "mul")
    assert Cascade([mean, off, var, scaled, late]).passes("m") == 3
    assert attention_cascade("one_pass").passes("m0") == 2  # within a block, on chip
    assert attention_cascade("three_pass").passes("e") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_attention(kind):
    t = inputs()
    out = attention_cascade(kind).evaluate(t, block=8)["AV"]
    torch.testing.assert_close(out, attention(t), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_shifted_by_a_thousand(kind):
    t = inputs()
    t["Q"], t["K"] = (torch.cat([t[n], torch.full_like(t[n][:1], c)]) for n, c in (("Q", 1.0), ("K", 1000.0)))
    out = attention_cascade(kind).evaluate(t, block=8)["AV"]
    if kind.startswith("naive"):
        assert not out.isfinite().all()
    else:
        torch.testing.assert_close(out, attention(t), atol=1e-10, rtol=0)


@pytest.mark.parametrize("block", [1, 8, 53, 100])
def test_blocks_and_hand_over(block):
    t, cascade = inputs(), attention_cascade("one_pass")
    whole = cascade.evaluate(t, block=block)
    first, rest = ({**t, "K": t["K"][:, s], "V": t["V"][:, s]} for s in (slice(0, 20), slice(20, None)))
    a, b = (cascade.evaluate(part, block=block) for part in (first, rest))
    for found in (cascade.evaluate(rest, block=block, state=a), merge_running(a, b), merge_running(b, a)):
        for name in ("RM", "RD", "RNV"):
            torch.testing.assert_close(found[name], whole[name], atol=1e-12, rtol=1e-12)


def test_what_stays_on_chip():
    for m in (1000, 64000):
        shapes = attention_shapes(10, m, 64, 32)
        assert attention_cascade("one_pass").live_footprint(shapes) == {"RM": 1, "RD": 1, "RNV": 32}
        assert attention_cascade("three_pass").live_footprint(shapes) == {"QK": m, "GM": 1, "SN": m, "SD": 1}
        assert attention_cascade("two_pass").live_footprint(shapes) == {"QK": m, "GM": 1, "SD": 1, "SNV": 32}


def test_counts():
    p, m, e, f = 10, 1000, 64, 32
    shapes = attention_shapes(p, m, e, f)
    count = lambda kind, op: sum(c.get(op, 0) for c in attention_cascade(kind).operations(shapes).values())  # noqa: E731
    for kind in KINDS:
        assert count(kind, "div") == (m * p if kind in ("naive", "three_pass") else f * p)
        assert count(kind, "mac") == m * p * (e + f)
    blocks = math.ceil(m / 256)
    assert count("three_pass", "exp") == m * p
    assert count("one_pass", "exp") == m * p + blocks * p
    assert count("one_pass", "max") == m * p + blocks * p
    assert count("one_pass", "mul") == blocks * p * (1 + f)
    assert attention_cascade("two_pass").flops(shapes)["QK"] == 2 * m * p * e


@pytest.mark.parametrize(("buffer", "ratios"), [(10**9, (1, 1, 1)), (64 * 2000, (3, 2, 1))])
def test_key_traffic(buffer, ratios):
    shapes = attention_shapes(256, 5000, 64, 64)
    for kind, ratio in zip(("three_pass", "two_pass", "one_pass"), ratios, strict=True):
        loaded = key_traffic(attention_cascade(kind), shapes, buffer)
        assert loaded == {"K": ratio * 64 * 5000, "V": 64 * 5000}


def test_the_buffer_drops_what_was_used_longest_ago():
    buffer = KeyBuffer(5)
    for block in (0, 1, 0, 2, 0, 1):
        buffer.read("K", block, 2)
    assert buffer.loaded == {"K": 8}
    assert [key for key, _ in buffer.held] == ["K", "K"]
    assert [block for _, block in buffer.held] == [0, 1]


def test_the_machine_by_hand():
    p, m, d = 1024, 8192, 64
    shapes, machine = attention_shapes(p, m, d, d), SpatialMachine(bandwidth=1e9)
    cost = accelerator_cost(attention_cascade("one_pass"), shapes, machine)
    unit = (
        m * p / 65536
    )  # cycles in which the array does one operation per pair; a line, one per pair and block
    want = {"BQK": 64, "LM": 1, "SLN": 7, "SLD": 1, "SLNV": 64, "RM": 1, "PRM": 7, "SPD": 1, "RD": 1, "SPNV": 64,
            "RNV": 64, "AV": 64 * 256 / m}  # fmt: skip
    assert cost["cycles"] == pytest.approx({name: n * unit for name, n in want.items()})
    assert cost["compute"] == pytest.approx((65 + want["AV"] + 1 + 8 + 64) * unit)
    assert cost["utilisation"] == pytest.approx(137 / (138 + want["AV"]))
    assert cost["traffic"] == (2 * p + 2 * m) * d * 2
    slow = accelerator_cost(attention_cascade("three_pass"), shapes, machine)
    assert slow["compute"] == pytest.approx((1 + 7 + 1 + 1) * 256 * unit)  # the line does the softmax
    assert slow["spilled"] == 0
    spilling = accelerator_cost(attention_cascade("three_pass"), attention_shapes(p, 4 * m, d, d), machine)
    assert spilling["spilled"] == 2 * 2 * (4 * m) * p * 2  # QK and SN, written and read once
    assert (
        accelerator_cost(attention_cascade("one_pass"), shapes, SpatialMachine(bandwidth=1.0))["bound"]
        == "memory"
    )


def test_errors_name_the_argument():
    x = (("x", ("m",)),)
    for make, says in (
        (lambda: attention_cascade("four"), "kind must be one of naive, .*, got 'four'"),
        (lambda: Einsum("y", (), x, "sin", "sum"), "op must be one of mul"),
        (lambda: Einsum("y", (), x, "mul", "sum"), "1 inputs for 'mul'"),
        (lambda: Einsum("y", (), x, "copy"), "reduce must be sum or max, got None"),
        (lambda: Einsum("y", ("m",), x, "copy", "sum"), "reduce must be None, got 'sum'"),
        (lambda: Einsum("y", ("m",), x, "copy", start=0.0), "start is for tensors with rank 'm1"),
        (lambda: attention_cascade("one_pass").evaluate(inputs()), "block must be an int >= 1, got None"),
        (lambda: attention_cascade("naive").evaluate({}), r"inputs \['K', 'Q', 'V'\] are missing"),
        (lambda: Cascade(reversed(attention_cascade("naive"))).passes(), "AV reads A before it is made"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
