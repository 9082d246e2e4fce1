"""Pictures of mechanisms, and plots of evidence: true to the sets and numbers, drawable without torch, byte-stable."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from foveate.catalogue import pictures, plots
from foveate.catalogue.lab import Figure, bars, lines, series
from foveate.patterns import Causal, Full, SlidingWindow


# ------------------------------------------------------------------------------------------------ pictures
def sliding(tokens=11, **options):
    frames = [
        ({"window": w, "ahead": a}, SlidingWindow(before=w, after=a), f"window {w}, {a} ahead")
        for w in (1, 3)
        for a in (0, 2)
    ]
    return pictures.pairs("A window.", frames, tokens=tokens, **options)


def test_frames_hold_the_pairs():
    picture = sliding()
    assert picture["controls"] == [{"name": "window", "values": [1, 3]}, {"name": "ahead", "values": [0, 2]}]
    assert (picture["kind"], picture["caption"], picture["grid"]) == ("pairs", "A window.", None)
    for frame in picture["frames"]:
        before, after = frame["setting"]["window"], frame["setting"]["ahead"]
        want = [[-after <= i - j <= before for j in range(11)] for i in range(11)]
        assert pictures.unpack(frame) == want
        assert frame["density"] == round(sum(map(sum, want)) / 121, 6)
        assert frame["code"] == f"window {before}, {after} ahead"


def test_sources_of_a_frame():
    mask = torch.rand(5, 13) < 0.4
    picture = pictures.pairs(
        "Any.", [({"of": "mask"}, mask, ""), ({"of": "layout"}, Causal().layout(5, 13), "")]
    )
    assert np.array_equal(pictures.unpack(picture["frames"][0]), mask.numpy())
    assert [(f["queries"], f["keys"]) for f in picture["frames"]] == [(5, 13)] * 2
    heads = Causal() & (SlidingWindow(2), SlidingWindow(4))
    for head, window in ((0, 2), (1, 4)):
        frame = pictures.pairs("Heads.", [({}, heads, "")], tokens=9, head=head)["frames"][0]
        assert sum(pictures.unpack(frame)[8]) == window


FULL = ({}, Full(), "")
REFUSED = [
    ([({}, torch.ones(3, 3), "")], {}, TypeError, "must be a pattern, a layout or a bool matrix"),
    ([({}, torch.ones(1, 3, 3, dtype=torch.bool), "")], {}, TypeError, "bool matrix"),
    ([FULL], {"tokens": 257}, ValueError, "accepted: at most 256"),
    ([FULL, FULL], {}, ValueError, "2 frames for controls {}; accepted: one for every combination"),
    ([({"w": 1}, Full(), ""), ({"d": 1}, Full(), "")], {}, ValueError, "one for every combination"),
    ([FULL], {"tokens": 12, "grid": (3, 5)}, ValueError, "grid .3, 5. does not hold the keys"),
]


@pytest.mark.parametrize(("frames", "options", "error", "says"), REFUSED)
def test_pictures_that_are_refused(frames, options, error, says):
    with pytest.raises(error, match=says):
        pictures.pairs("x", frames, **options)


def test_a_grid_that_holds_the_keys():
    assert pictures.pairs("x", [FULL], tokens=15, grid=(3, 5))["grid"] == [3, 5]


def test_weights_are_steps_of_the_largest():
    matrix = torch.tensor([[0.0, 1.0, 2.0], [4.0, 3.0, 0.5]])
    picture = pictures.weights("Weights.", matrix, rows="image", columns="word", code="f(x)")
    levels = np.frombuffer(base64.b64decode(picture["levels"]), np.uint8)
    assert levels.tolist() == [0, 64, 128, 255, 191, 32]
    assert (picture["kind"], picture["shape"], picture["largest"]) == ("map", [2, 3], 4.0)
    assert (picture["rows"], picture["columns"], picture["code"]) == ("image", "word", "f(x)")
    zero = pictures.weights("Nothing.", torch.zeros(2, 2))
    assert set(base64.b64decode(zero["levels"])) == {0}
    for bad in (torch.ones(3), torch.ones(257, 2)):
        with pytest.raises(ValueError, match="accepted: 2-D, at most 256"):
            pictures.weights("x", bad)


def test_text_of_pairs():
    picture = pictures.pairs("Causal.", [({}, Causal(), "")], tokens=5)
    assert pictures.text(picture) == "█▄\n███▄\n▀▀▀▀▀"
    coarse = pictures.text(pictures.pairs("Causal.", [({}, Causal(), "")], tokens=64), width=16).splitlines()
    assert [len(line) for line in coarse] == [2, 4, 6, 8, 10, 12, 14, 16]


def test_text_of_a_map():
    picture = pictures.weights("Diagonal.", torch.eye(4))
    assert pictures.text(picture) == "█\n  █"
    wide = pictures.text(pictures.weights("Even.", torch.ones(100, 100)))
    assert max(map(len, wide.splitlines())) <= 48


def test_reading_pictures_needs_no_torch():
    code = (
        "import sys; from foveate.catalogue import pictures\n"
        "frame = {'bits': 'DwAA', 'queries': 2, 'keys': 2}\n"
        "print(pictures.unpack(frame), pictures.text({'kind': 'pairs', 'frames': [frame]}))\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[[True, True], [True, True]] ██\n"


# --------------------------------------------------------------------------------------------------- plots
LINES = lines(
    "Loss & <time>", "tokens", "loss",
    [series("ours", [1, 2, 4], [3.0, 2.0, 1.0], [2.5, 1.5, 0.5], [3.5, 2.5, 1.5]),
     series("dense", [1, 2, 4], [2.0, 1.5, 1.0], reference=True)],
    log_x=True, log_y=True,
)  # fmt: skip
BARS = bars(
    "Shares", "accuracy", [Figure("ours", 0.9, 0.8, 0.95), Figure("chance", 0.1)], references=["chance"]
)


@pytest.mark.parametrize("plot", [LINES, BARS], ids=["lines", "bars"])
def test_svg_is_stable_and_takes_the_page_colour(plot):
    text = plots.svg(plot)
    assert text == plots.svg(plot)
    root = ET.fromstring(text)
    assert root.tag.endswith("svg")
    words = "".join(root.itertext())
    assert plot["title"] in words
    assert "currentColor" in text
    assert re.search(r": (#000000|black|#303438)", text) is None
    assert re.search(r"\d{4}-\d{2}-\d{2}T", text) is None


def test_lines_show_every_number():
    axes = plots.figure(LINES).axes[0]
    ours, dense = axes.get_lines()
    assert list(ours.get_ydata()) == [3.0, 2.0, 1.0]
    assert (dense.get_linestyle(), to_hex(dense.get_color())) == ("--", plots.REFERENCE)
    assert ours.get_linestyle() == "-"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "loss")
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["ours", "dense"]
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 1].min() == 0.5
    assert band.get_paths()[0].vertices[:, 1].max() == 3.5


def test_bars_show_every_number():
    axes = plots.figure(BARS).axes[0]
    ours, chance = axes.patches
    assert (ours.get_width(), chance.get_width()) == (0.9, 0.1)
    assert (to_hex(ours.get_facecolor()), to_hex(chance.get_facecolor())) == (
        plots.COLOURS[0],
        plots.REFERENCE,
    )
    assert [t.get_text() for t in axes.get_yticklabels()] == ["ours", "chance"]
    (error,) = axes.collections
    (whisker,) = error.get_segments()
    assert whisker[:, 0].tolist() == pytest.approx([0.8, 0.95])


def test_png_is_a_picture():
    assert plots.png(BARS).startswith(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="kind 'pie'; accepted: lines, bars"):
        plots.png({"kind": "pie"})
