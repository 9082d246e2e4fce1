"""The laboratory: steps that survive, seeded tasks, intervals, verdicts, timing in turns, tiny trainers."""

from __future__ import annotations

import math
import random

import pytest
import torch

from foveate.catalogue.lab import (
    FAILS,
    HOLDS,
    OPEN,
    Figure,
    Finding,
    Lab,
    bars,
    difference,
    interval,
    judge,
    lines,
    paired_times,
    proportion,
    series,
    slope,
    tasks,
    tiny,
)
from foveate.catalogue.lab.tasks import IGNORE, generator


# -------------------------------------------------------------------------------------------------- the lab
def test_quick_form_has_one_seed_and_the_short_settings():
    assert (Lab("x").seeds, Lab("x").pick(1, 2)) == ((0, 1, 2), 1)
    assert (Lab("x", quick=True).seeds, Lab("x", quick=True).pick(1, 2)) == ((0,), 2)


def test_once_takes_a_finished_step_from_disk(tmp_path):
    calls = []

    def step():
        calls.append(1)
        return {"loss": [1.5, None], "hits": (1, 2)}

    first = Lab("x", folder=tmp_path / "f").once("arm-0", step)
    again = Lab("x", folder=tmp_path / "f").once("arm-0", step)
    assert first == again == {"loss": [1.5, None], "hits": [1, 2]}  # JSON values the first time, too
    assert len(calls) == 1
    assert Lab("x", folder=tmp_path / "f").once("arm-1", step) == first
    assert len(calls) == 2
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["arm-0.json", "arm-1.json"]


def test_once_without_a_folder_keeps_nothing():
    calls = []
    lab = Lab("x")
    assert [lab.once("a", lambda: calls.append(1) or 3) for _ in range(2)] == [3, 3]
    assert len(calls) == 2


def test_once_keeps_nothing_of_a_step_that_failed(tmp_path):
    lab = Lab("x", folder=tmp_path / "f")
    for bad in (lambda: 1 / 0, lambda: float("nan"), lambda: object()):
        with pytest.raises((ZeroDivisionError, ValueError, TypeError)):
            lab.once("a", bad)
    assert not (tmp_path / "f").exists()
    assert lab.once("a", lambda: 1) == 1


@pytest.mark.parametrize("name", ["", "a b", "../a", "a/b"])
def test_once_refuses_names_that_are_no_file_names(tmp_path, name):
    with pytest.raises(ValueError, match="once: name"):
        Lab("x", folder=tmp_path).once(name, lambda: 1)


def test_track_tells_how_far_it_is():
    class Ears:
        def __init__(self):
            self.heard = []

        def step(self, what, share):
            self.heard.append((what, share))

    ears = Ears()
    assert list(Lab("x", listener=ears).track([5, 6], "rows")) == [5, 6]
    assert ears.heard == [("rows", 0.0), ("rows", 0.5), ("rows", 1.0)]
    ears.heard.clear()
    list(Lab("x", listener=ears).track(iter([5]), "rows"))
    assert ears.heard == [("rows", None), ("rows", 1.0)]


# ----------------------------------------------------------------------------------------------- findings
def finding(**fields):
    made = {
        "question": "q",
        "counts_if": "c",
        "verdict": HOLDS,
        "summary": "s",
        "figures": (Figure("a", 1.0),),
    }
    return Finding(**{**made, **fields})


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"verdict": "yes"}, "verdict 'yes'; accepted: holds"), ({"figures": ()}, "figures is empty"),
     ({"figures": (Figure("a", math.nan),)}, "figure 'a' is nan")],
)  # fmt: skip
def test_findings_that_are_refused(fields, says):
    finding()
    with pytest.raises(ValueError, match=says):
        finding(**fields)


def test_plots_are_plain_data():
    line = series("dense", [1, 2], [3.0, 4.0], [2, 3], [4, 5], reference=True)
    plot = lines("title", "x", "y", [line], log_x=True)
    assert (plot["kind"], plot["series"][0]["x"], plot["log_x"], plot["log_y"]) == (
        "lines",
        [1.0, 2.0],
        True,
        False,
    )
    with pytest.raises(ValueError, match="series 'a': x, y, low and high must have one length"):
        series("a", [1, 2], [3.0])
    with pytest.raises(ValueError, match="one length"):
        series("a", [1, 2], [3.0, 4.0], low=[1.0])
    made = bars("title", "share", [Figure("dense", 1.0), Figure("ours", 0.9, 0.8, 1.0)], references=["dense"])
    assert [(b["label"], b["reference"], b["low"]) for b in made["bars"]] == [
        ("dense", True, None),
        ("ours", False, 0.8),
    ]


# ------------------------------------------------------------------------------------------------- numbers
def test_interval_is_students():
    found = interval("a", [1.0, 2.0, 4.0], "s")
    half = 4.303 * math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3)
    assert (found.value, found.n, found.unit) == (pytest.approx(7 / 3), 3, "s")
    assert (found.low, found.high) == (pytest.approx(7 / 3 - half), pytest.approx(7 / 3 + half))
    assert interval("a", [1.5]) == Figure("a", 1.5)
    with pytest.raises(ValueError, match="no values"):
        interval("a", [])


def test_interval_covers_the_mean_as_often_as_it_says():
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        found = interval("a", [draw.gauss(3.0, 2.0) for _ in range(4)])
        hits += found.low <= 3.0 <= found.high
    assert 0.935 < hits / 2000 < 0.965


def test_difference_is_paired():
    found = difference("a", [10.0, 20.0, 31.0], [9.0, 19.0, 30.0])
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="3 and 1 values; accepted: pairs"):
        difference("a", [1.0, 2.0, 3.0], [1.0])


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 7)])
def test_proportion_solves_wilsons_equation(hits, n):
    found = proportion("a", hits, n)
    for bound in (
        found.low,
        found.high,
    ):  # a bound b that is inside (0, 1) has |p - b| = z sqrt(b (1 - b) / n)
        if 1e-12 < bound < 1 - 1e-12:
            assert abs(hits / n - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n))
    assert 0 <= found.low <= found.value <= found.high <= 1
    with pytest.raises(ValueError, match="8 of 7"):
        proportion("a", 8, 7)


def test_slope_finds_the_exponent():
    x = [1, 2, 4, 8, 16]
    found = slope("a", x, [3 * v**1.5 for v in x])
    assert (found.value, found.low, found.high) == (pytest.approx(1.5),) * 3
    noisy = slope("a", x, [3 * v**1.5 * (1.1 if v in (2, 8) else 0.9) for v in x])
    assert noisy.low < 1.5 < noisy.high
    assert noisy.high - noisy.low > 0.05
    with pytest.raises(ValueError, match="2 points; accepted: at least 3"):
        slope("a", [1, 2], [1, 2])


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [(Figure("a", 2, 1.1, 3), HOLDS), (Figure("a", 0, -1, 0.9), FAILS), (Figure("a", 1.5, 0.9, 2), OPEN),
     (Figure("a", 1.5), HOLDS), (Figure("a", 0.5), FAILS), (Figure("a", 1.0, 1.0, 1.0), OPEN)],
)  # fmt: skip
def test_judge(figure, verdict):
    assert judge(figure, above=1.0) == verdict


# -------------------------------------------------------------------------------------------------- timing
def test_arms_take_turns(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def arm(name, cost):
        def call():
            order.append(name)
            now[0] += cost * len(order)  # the machine slows down all the time

        return call

    times = paired_times(Lab("x"), {"slow": arm("slow", 2.0), "fast": arm("fast", 1.0)}, rounds=5)
    assert order == ["slow", "fast"] * 6
    assert (times.first["slow"], times.first["fast"]) == (2.0, 2.0)
    assert times.rounds["slow"] == [6.0, 10.0, 14.0, 18.0, 22.0]
    assert times.median("fast") == 8.0
    found = times.speedup("fast", "slow")
    assert (found.name, found.unit, found.n) == ("fast against slow", "x", 5)
    assert found.value == pytest.approx(14 / 8)
    assert found.low <= found.value <= found.high
    assert times.speedup("slow", "fast").value == pytest.approx(8 / 14)


# --------------------------------------------------------------------------------------------------- tasks
def test_generators_differ_by_every_seed():
    streams = [generator(*seeds) for seeds in ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))]
    drawn = [tuple(torch.randint(1 << 30, (4,), generator=g).tolist()) for g in streams]
    assert len(set(drawn)) == len(drawn)
    again = torch.randint(1 << 30, (4,), generator=generator(0, 1))
    assert tuple(again.tolist()) == drawn[3]


def test_recall_asks_for_the_value_of_each_key():
    ids, targets = tasks.recall(5, 23, 4, 20, generator(3))
    assert ids.dtype == targets.dtype == torch.int64
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[:8:2], row[1:8:2], strict=True))
        assert len(pairs) == 4
        assert set(row[8:19]) == {0}
        assert {*row[19:]} == set(pairs)
        assert wanted == [IGNORE] * 19 + [pairs[key] for key in row[19:]]
        assert all(1 <= key < 10 <= value < 20 for key, value in pairs.items())
    for pairs, length in ((4, 11), (10, 40)):
        with pytest.raises(ValueError, match=f"recall: {pairs} pairs in {length} tokens"):
            tasks.recall(1, length, pairs, 20, generator(0))


def test_passkey_asks_for_the_marked_symbol():
    far = torch.tensor([1, 7, 28])
    ids, targets = tasks.passkey(3, 30, far, 40, generator(1))
    for row, wanted, distance in zip(ids.tolist(), targets.tolist(), far.tolist(), strict=True):
        assert (row.count(1), row.count(2), row[-1]) == (1, 1, 2)
        at = row.index(1) + 1
        assert at == 29 - distance
        assert wanted == [IGNORE] * 29 + [row[at]]
        assert [i for i, token in enumerate(row) if 3 <= token < 13] == [at]
    for distance in (0, 29):
        with pytest.raises(ValueError, match=r"passkey: distance .*; accepted: 1 to 28"):
            tasks.passkey(1, 30, distance, 40, generator(0))


def test_structured_qkv_has_local_mass_and_hitters():
    q, k, v = tasks.structured_qkv(256, 4, 2, 32, generator(0), hitters=4)
    assert (q.shape, k.shape, v.shape) == ((1, 4, 256, 32), (1, 2, 256, 32), (1, 2, 256, 32))
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k.repeat_interleave(2, 1)) * 32**-0.5
    p = logits.masked_fill(torch.ones(256, 256, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    rows = torch.arange(256)
    near = (rows[:, None] - rows < 16) & (rows[:, None] >= rows)
    late = p[0, :, 128:]
    assert (late * near[128:]).sum(-1).mean() > 2 * near[128:].float().mean()  # more than evenly spread
    top = late.mean(1).topk(4, -1).values.sum(-1)
    assert (top > 0.15).all()  # four columns hold a good part of the mass
    plain = tasks.structured_qkv(256, 4, 2, 32, generator(0), hitters=0)
    assert not torch.equal(plain[1], k)


# ---------------------------------------------------------------------------------------------- the trainer
def softmax(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_tiny_model_is_causal_and_rotated():
    torch.manual_seed(0)
    model = tiny.TinyLM(11, 16, 2, 2, softmax).eval()
    ids = torch.randint(11, (2, 13), generator=generator(0))
    out = model(ids)
    assert out.shape == (2, 13, 11)
    torch.testing.assert_close(model(ids[:, :7]), out[:, :7])
    plain = tiny.TinyLM(11, 16, 2, 2, softmax, positions="none").eval()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(ids), out, atol=1e-4)
    with pytest.raises(ValueError, match="positions 'sinus'; accepted: rotary, none"):
        tiny.TinyLM(11, 16, 2, 2, softmax, positions="sinus")


def test_rotation_depends_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    rates = 10.0 ** -torch.arange(4.0)

    def product(i, j):
        turned = [tiny.rotate(t, torch.tensor([[float(at)]]) * rates) for t, at in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(6, 1), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 1), abs=1e-3)


def test_layers_may_attend_differently():
    calls = []
    attends = [lambda q, k, v, i=i: calls.append(i) or softmax(q, k, v) for i in range(2)]
    tiny.TinyLM(11, 16, 2, 2, attends)(torch.zeros(1, 5, dtype=torch.int64))
    assert calls == [0, 1]


def test_training_learns_and_repeats():
    def losses():
        torch.manual_seed(1)
        model = tiny.TinyLM(12, 32, 2, 1, softmax)
        found = tiny.train(
            Lab("x"), model, lambda step: tasks.passkey(16, 8, 2, 12, generator(5, step)), steps=150
        )
        batches = [tasks.passkey(64, 8, 2, 12, generator(6, i)) for i in range(2)]
        return found, tiny.accuracy(Lab("x"), model, batches)

    (one, score), (other, _) = losses(), losses()
    assert one == other
    assert len(one) == 150
    assert sum(one[-20:]) / 20 < 0.5 * sum(one[:5]) / 5
    assert score > 0.8


def test_training_stops_early():
    model = tiny.TinyLM(12, 16, 2, 1, softmax)
    found = tiny.train(
        Lab("x"), model, lambda s: tasks.passkey(4, 8, 2, 12, generator(s)), steps=100, stop=100.0
    )
    assert len(found) == 20


def test_accuracy_counts_asked_places():
    class Parrot(torch.nn.Module):
        def forward(self, ids):
            return torch.nn.functional.one_hot(ids, 10).float()

    ids = torch.tensor([[1, 2, 3, 4]])
    asked = torch.tensor([[IGNORE, 2, 9, 4]])
    assert (
        tiny.accuracy(Lab("x"), Parrot(), [(ids, asked), (ids, torch.tensor([[1] + [IGNORE] * 3]))]) == 0.75
    )
