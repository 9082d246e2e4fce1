from __future__ import annotations

import re
from io import StringIO

import pytest

from foveate.bench import charts, report
from foveate.bench.mechanisms import TITLES
from foveate.bench.mechanisms import USUAL as NAMES
from foveate.bench.pictures import png

EVIL = "<script>alert('x')</script>\"'&{{ 7 * 7 }}"


def cell(name: str, length: int, value: float, hits: int, speedup: float) -> dict:
    difference = {
        "value": value,
        "low": value - 0.01,
        "high": value + 0.01,
        "by_position": [value * i for i in range(8)],
    }
    return {
        "mechanism": name,
        "length": length,
        "policy": EVIL,
        "parameters": {},
        "density": 0.25,
        "tiles": 0.3,
        "picture": "data:image/png;base64,AAAA",
        "prefill": {
            "first_seconds": 0.2,
            "seconds": 0.1,
            "pairs": [],
            "dense_seconds": 0.2,
            "ratio": 1 / speedup,
            "speedup": speedup,
            "own": {"attention": EVIL, "seconds": 0.3, "ratio": 1.5},
        },
        "memory": {"peak_bytes": 5 << 20, "method": "high-water mark"},
        "bpb": {
            "value": 1.7 + value,
            "windows": 8,
            "bytes": 4096,
            "by_position": [1.0] * 8,
            "bits": [],
            "bytes_of": [],
            "difference": None if name == "dense" else difference,
        },
        "needle": {
            "recall": hits / 20,
            "hits": hits,
            "n": 20,
            "low": 0.1,
            "high": 0.9,
            "by_depth": [{"depth": d, "hits": hits // 5, "n": 4} for d in (0.0, 0.25, 0.5, 0.75, 1.0)],
        },
        "seconds": 12.0,
    }


@pytest.fixture
def results() -> dict:
    cells = [
        cell(name, length, 0.02 * i, 20 - 3 * i, 1 + 0.2 * i)
        for length in (2048, 131072)
        for i, name in enumerate(NAMES)
    ]
    settings = {"lengths": [2048, 131072], "mechanisms": list(NAMES), "density": 0.25, "repeats": 5}
    model = {
        "name": EVIL,
        "path": EVIL,
        "type": "llama",
        "parameters": 10**9,
        "layers": 4,
        "heads": 8,
        "kv_heads": 4,
        "fingerprint": "f",
        "dtype": "float32",
    }
    text = {"name": EVIL, "files": 2, "bytes": 10**6, "sha256": "0" * 64, "byte_entropy": 4.6}
    machine = {
        "cpu": EVIL,
        "threads": 2,
        "isa": ["avx2"],
        "date": "2030-01-01T00:00:00+00:00",
        "foveate": "0.1",
        "memory_bytes": 1 << 34,
        "commit": None,
    }
    return {
        "schema": 1,
        "complete": True,
        "command": f"foveate compare --model '{EVIL}'",
        "gates": [],
        "cells": cells,
        "identity": {"settings": settings, "model": model, "text": text},
        "environment": machine,
    }


def test_hostile_names_are_text(results):
    page = report.html(results)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page  # not a template again


def test_the_page_loads_nothing(results):
    page = report.html(results)
    assert not re.search(r"https?:", page)
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert "@import" not in page
    assert not re.search(r"url\(", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_has_every_cell_and_is_well_formed(results):
    from html.parser import HTMLParser

    page = report.html(results)
    for name in NAMES:
        assert page.count(TITLES[name]) >= 6

    void = {"meta", "img", "br", "input", "link"}

    class Balanced(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            if tag not in void:
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Balanced()
    parser.feed(page)
    assert parser.open == []


def test_the_headline_names_the_best_and_the_control(results):
    first, second, third = report.headline(results)
    assert "At 131,072 tokens" in first
    assert (
        "window + sinks kept the text best: +0.020 bits per byte against dense (1.700), at 1.20 times"
        in first
    )
    assert second == "Random blocks of the same density lost +0.120, more than every mechanism."
    assert third.startswith(
        "At 131,072 tokens dense attention found 20 of 20 needles; the best restriction, window + sinks, 17"
    )


def test_the_headline_says_when_seeing_less_is_better_and_leaves_out_another_density(results):
    best = results["cells"][8]
    assert (best["mechanism"], best["length"]) == ("sliding_sinks", 131072)
    best["bpb"]["difference"] |= {"value": -0.05, "low": -0.06, "high": -0.04}
    assert "predicts text better when it sees less" in report.headline(results)[0]
    best["density"] = 0.5
    assert report.headline(results)[0].startswith(
        "At 131,072 tokens and 25% of the causal pairs, dilated kept"
    )


def test_each_task_is_told_at_the_longest_length_that_shows_it(results, tmp_path):
    for c in results["cells"]:
        if c["length"] == 131072:
            c["needle"] = None
    sentences = report.headline(results)
    assert sentences[0].startswith("At 131,072 tokens")
    assert sentences[-1].startswith("At 2,048 tokens dense attention found 20 of 20 needles")
    assert report.longest_shown(results, "needle") == 2048
    assert report.tradeoff_png(results)[:4] == b"\x89PNG"
    for c in results["cells"]:
        c["bpb"] = c["needle"] = None
    assert report.headline(results) == []
    assert report.tradeoff_png(results)[:4] == b"\x89PNG"


def test_gated_and_unfinished_runs_make_a_page(results):
    for c in results["cells"]:
        c["needle"] = None
    results["gates"] = [{"task": "needle", "length": 2048, "dense": 0.1, "needed": 0.5, "rule": "recall of"}]
    results["complete"] = False
    results["cells"] = results["cells"][:9]
    page = report.html(results)
    assert "needle at 2048 tokens is not shown" in page
    assert "This run is not finished: 9 of 14 cells" in page
    results["cells"] = []
    assert "not finished: 0 of 14" in report.html(results)


def test_a_mechanism_off_the_asked_density_is_marked(results):
    assert "†" not in report.html(results)
    results["cells"][5]["density"] = 0.4
    assert report.html(results).count("†") == 2


def test_table_fits_100_columns_and_shows_every_number(results):
    from rich.console import Console

    results["identity"]["model"]["name"] = "[red]x[/red]"
    buffer = StringIO()
    Console(file=buffer, width=100).print(report.table(results))
    lines = buffer.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in buffer.getvalue()
    assert "[red]x[/red]" in lines[0]
    assert sum("sliding_sinks" in line for line in lines) == 2
    assert "131072" in buffer.getvalue()
    assert "+0.020 ±0.010" in buffer.getvalue()


def test_the_picture_is_a_png_and_needs_no_display(results, tmp_path):
    written = report.write(results, tmp_path)
    assert [p.name for p in written] == ["report.html", "tradeoff.png"]
    assert (tmp_path / "tradeoff.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_png_decodes_to_the_grid(tmp_path):
    import matplotlib.image
    import numpy as np

    grid = np.array([[0.0, 1.0], [0.25, 0.0]])
    (tmp_path / "x.png").write_bytes(png(grid, (255, 0, 0)))
    pixels = matplotlib.image.imread(tmp_path / "x.png")
    assert pixels.shape == (2, 2, 4)
    assert pixels[0, 1].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert pixels[0, 0, 3] == pixels[1, 1, 3] == 0.0
    assert pixels[1, 0, 3] == pytest.approx(8 / 15, abs=0.01)  # square root of a quarter, in 15 steps


def test_charts_escape_and_spread():
    point = charts.Point(EVIL, 1.0, 0.0, None, None, '"><script>')
    drawn = charts.scatter([point, point], title=EVIL, x_title=EVIL, y_title=EVIL)
    assert "<script" not in drawn
    places = charts.spread([5.0, 5.0, 5.0], 10.0, 0.0, 100.0)
    assert sorted(round(b - a) for a, b in zip(sorted(places), sorted(places)[1:], strict=False)) == [10, 10]
    assert min(charts.spread([0.0, 1.0], 10.0, 0.0, 100.0)) >= 0
