"""The gallery as files: complete, stable, escaped, self-contained, accessible as far as text tells."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from gallery_sample import a_record, band, implemented, sample, weights

from foveate.catalogue import gallery, load, record, vocabulary
from foveate.catalogue.entry import Cost, Relation
from foveate.catalogue.gallery import clean, documents, equations, formulas, plot, scatter, thumbnails, views
from foveate.catalogue.store import Catalogue

VOID = {"meta", "link", "input", "br", "hr", "img"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'>&amp;{{ 7*7 }}\u2028"


class Document(HTMLParser):
    """Elements of a page: (tag, attributes), its ids, its text by element, its headings."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[int, list[str]] = {}
        self.open: list[int] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.ids = [a["id"] for _, a in self.elements if "id" in a]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        while self.open and self.elements[self.open.pop()][0] != tag:
            pass

    def handle_data(self, data):
        for i in self.open:
            self.texts.setdefault(i, []).append(data)

    def all(self, tag):
        return [a for t, a in self.elements if t == tag]

    def text(self, position: int) -> str:
        return " ".join("".join(self.texts.get(position, [])).split())

    @property
    def body(self) -> str:
        return self.text(next(i for i, (t, _) in enumerate(self.elements) if t == "body"))


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Catalogue:
    return sample(tmp_path_factory.mktemp("evidence"))


@pytest.fixture(scope="module")
def site(catalogue, tmp_path_factory) -> Path:
    return gallery.build(tmp_path_factory.mktemp("gallery") / "site", catalogue).parent


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Document]:
    return {path.relative_to(site).as_posix(): Document(path) for path in sorted(site.rglob("*.html"))}


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# ------------------------------------------------------------------------------------------ building
def test_two_builds_are_the_same_bytes_and_need_no_torch(tmp_path):
    """In two processes with different hash seeds."""
    code = (
        "import sys; from pathlib import Path; from foveate.catalogue import gallery; "
        "gallery.build(Path(sys.argv[1])); assert 'torch' not in sys.modules, 'the build imported torch'"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            timeout=120,
        )
    one, two = digests(tmp_path / "1"), digests(tmp_path / "2")
    assert one == two
    assert len(one) > 169


def test_two_builds_with_evidence_are_the_same_bytes(site, catalogue, tmp_path):
    again = Catalogue(dict(catalogue.entries), catalogue.evidence)
    assert digests(gallery.build(tmp_path / "again", again).parent) == digests(site)


def test_every_entry_has_a_page_with_what_it_says(site, pages, catalogue):
    for entry in catalogue:
        page = pages[f"papers/{entry.key}.html"]
        for said in (
            entry.name,
            entry.title,
            entry.idea,
            entry.experiment,
            *entry.invariants,
            *entry.aliases,
        ):
            assert " ".join(said.split()) in page.body, f"{entry.key}: {said!r} is not on its page"
        for line in entry.mechanism.splitlines():
            assert " ".join(line.split()) in page.body, f"{entry.key}: {line!r} is not on its page"
    assert len(pages) == len(catalogue) + 1


def test_planned_pages_say_so(pages, catalogue):
    for entry in catalogue:
        assert ("Nothing of this paper is built here yet" in pages[f"papers/{entry.key}.html"].body) == (
            not entry.implemented
        )


def test_the_score_is_the_catalogue_s(pages, catalogue):
    statuses = [catalogue.status(entry.key) for entry in catalogue]
    index = pages["index.html"]
    for status in vocabulary.STATUSES:
        position = next(i for i, (t, a) in enumerate(index.elements) if a.get("href") == f"#status={status}")
        assert index.text(position).split()[0] == str(statuses.count(status))
    assert {statuses.count(s) for s in ("works", "not-reproduced")} == {1}


def test_links_and_anchors_lead_somewhere(site, pages):
    facets = {"tag", "family", "status"}
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), f"{name}: an id stands twice"
        folder = (site / name).parent
        for tag, attributes in page.elements:
            for attribute in ("href", "src", "xlink:href"):
                address = attributes.get(attribute)
                if address is None or address.startswith("https://"):
                    continue
                path, _, anchor = address.partition("#")
                target = (folder / path).resolve() if path else site / name
                assert target.is_file(), f"{name}: <{tag}> leads to {address}, which is not there"
                assert target.is_relative_to(site), f"{name}: {address} leaves the site"
                if anchor and "=" in anchor:
                    assert anchor.split("=")[0] in facets, f"{name}: {address}"
                elif anchor:
                    there = pages[target.relative_to(site).as_posix()]
                    assert anchor in there.ids, f"{name}: {address} has no such place"


def test_index_links_every_page(pages, catalogue):
    linked = {a["href"] for a in pages["index.html"].all("a") if "href" in a}
    assert {f"papers/{entry.key}.html" for entry in catalogue} <= linked


def test_relatives_are_named_on_both_sides(pages, catalogue):
    for entry in catalogue:
        for relation in entry.relations:
            there = pages[f"papers/{relation.to}.html"]
            assert any(a.get("href") == f"{entry.key}.html" for a in there.all("a")), (
                f"{relation.to}: {entry.key}"
            )


def test_relatives_have_the_wording_of_their_side(catalogue):
    entries = dict(catalogue.entries)
    said = (Relation("extends", "vsa"), Relation("special case of", "vsa"), Relation("alternative to", "vsa"))
    entries["swin"] = dataclasses.replace(entries["swin"], relations=said)
    entries["vsa"] = dataclasses.replace(entries["vsa"], relations=(Relation("alternative to", "swin"),))
    found = views.relatives(Catalogue(entries, catalogue.evidence))
    there = [r.how for r in found["vsa"] if r.entry.key == "swin"]
    assert there == ["generalises", "alternative to", "extended by"]  # what both say is shown once


def test_neighbours_walk_through_the_family_by_date(catalogue):
    beside = views.neighbours(list(catalogue))
    for family in vocabulary.FAMILIES:
        mine = [e for e in catalogue if e.family == family]
        at = next(e for e in mine if beside[e.key][0] is None)
        seen = [at]
        while (after := beside[at.key][1]) is not None:
            assert after.date >= at.date
            assert beside[after.key][0] is at
            seen.append(at := after)
        assert {e.key for e in seen} == {e.key for e in mine}


# ------------------------------------------------------------------------------------------ evidence
def test_a_record_is_shown_whole(pages):
    body = pages["papers/fused_neighborhood_attention.html"].body
    for said in (
        "not reproduced at this scale",
        "Both arms stay at chance.",
        "within 0.1 of dense, at half of the work",
        "0.91 to 0.95",
        "2.4 ×",
        "2026-11-21",
        "cpu: A processor, 2 threads",
        "0123456789ab",
        "0, 1, 2",
        "42.5",
        "Fresh: the code that was measured is the code that is here.",
        "Quality: 70 % of dense attention's. Work: 11 % of dense attention's.",
        "foveate reproduce fused_neighborhood_attention",
        "foveate/core/patterns/neighborhood.py:",
        "tests/core/test_patterns.py::test_layout",
        "the dense definition in float64",
        "Odd windows only",
    ):
        assert said in body, said
    assert any(a.get("class") == "plot" for a in pages["papers/fused_neighborhood_attention.html"].all("svg"))


def test_stale_and_quick_records_say_so(pages):
    assert "Older than the code" in pages["papers/flexprefill.html"].body
    assert "does not count as evidence" in pages["papers/swin.html"].body
    assert "Fresh:" not in pages["papers/flexprefill.html"].body
    assert "Fresh:" not in pages["papers/swin.html"].body


def test_the_scatter_has_a_linked_point_per_record_with_both_numbers(pages, catalogue, site):
    points = [a for a in pages["index.html"].all("a") if "data-key" in a]
    assert {a["data-key"] for a in points} == {"s2_attention", "fused_neighborhood_attention"}
    assert {a["href"] for a in points} == {f"papers/{a['data-key']}.html" for a in points}
    assert scatter.evidence(views.papers(load(evidence=site / "nothing"))) is None


def test_the_scatter_leaves_names_out_where_they_have_no_room(catalogue):
    papers = [p for p in views.papers(catalogue) if p.evidence]
    assert "Fused Neighborhood" in re.sub(
        r"<title>.*?</title>|aria-label=\"[^\"]*\"", "", scatter.evidence(papers)
    )
    many = scatter.evidence(papers * 9)
    assert "Fused Neighborhood" not in re.sub(r"<title>.*?</title>|aria-label=\"[^\"]*\"", "", many)


# ------------------------------------------------------------------------------------------ safety
@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, dict[str, Document]]:
    """A gallery in which every text of an entry, and of a record, tries to break out."""
    evidence = tmp_path_factory.mktemp("hostile-evidence")
    entries = dict(load(evidence=evidence).entries)
    bad = implemented(entries["swin"], "foveate.patterns.Windows")
    texts = {
        f.name: HOSTILE
        for f in dataclasses.fields(bad)
        if isinstance(getattr(bad, f.name), str)
        and f.name not in ("key", "date", "family", "kind", "complexity", "code", "paper", "verification")
    }
    many = dict.fromkeys(
        ("aliases", "phrases", "invariants", "tests", "implementation"), (HOSTILE, HOSTILE + "2")
    )
    equation = (
        HOSTILE,
        r"\text{<script>alert(1)</script>}",
        r"\href{javascript:alert(1)}{x}",
        r"\style{background:url(https://evil.example)}{x}",
    )
    entries["swin"] = dataclasses.replace(
        bad,
        **texts,
        **many,
        equation=equation,
        symbols={HOSTILE: HOSTILE, r"\text{<b>}": HOSTILE},
        cost=Cost(flops="4*N*w", where={"w": HOSTILE}),
    )
    entries["vsa"] = dataclasses.replace(implemented(entries["vsa"], "foveate.patterns.Windows"))
    picture = band()
    picture["caption"] = HOSTILE
    picture["controls"][2]["name"] = HOSTILE
    for frame in picture["frames"]:
        frame["code"] = HOSTILE
        frame["setting"][HOSTILE] = frame["setting"].pop("direction")
    heat = weights()
    heat.update(caption=HOSTILE, rows=HOSTILE, columns=HOSTILE, code=HOSTILE)
    words = dict.fromkeys(("question", "counts_if", "summary"), HOSTILE)
    figures = (record.Figure(HOSTILE, 1.0, 0.5, 1.5, unit=HOSTILE),)
    bars = {
        "kind": "bars", "title": HOSTILE, "y": HOSTILE,
        "bars": [{"label": HOSTILE, "value": 1.0, "low": None, "high": None, "reference": False}],
    }  # fmt: skip
    environment = dict.fromkeys(("device", "cpu", "torch", "commit", "date"), HOSTILE)
    for key, shown in (("swin", picture), ("vsa", heat)):
        made = a_record(key, **words, figures=figures, plot=bars, picture=shown, environment=environment)
        record.write(made, evidence)
        (evidence / f"{key}.svg").write_text(
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9" '
            'onload="alert(1)"><style>@import "https://evil.example/x.css";</style><g id="main" onclick="alert(1)" '
            'style="fill:url(https://evil.example/x); stroke: #123456; behavior: url(#x)">'
            '<use xlink:href="https://evil.example/#x"/><use xlink:href="#main"/>'
            "<text>&lt;script&gt;alert(1)&lt;/script&gt;</text></g></svg>",
            encoding="utf-8",
        )
    folder = gallery.build(tmp_path_factory.mktemp("hostile") / "site", Catalogue(entries, evidence)).parent
    return folder, {p.relative_to(folder).as_posix(): Document(p) for p in folder.rglob("*.html")}


def test_hostile_text_stays_text(hostile):
    _, pages = hostile
    for name in ("index.html", "papers/swin.html", "papers/vsa.html", "papers/vwa.html"):
        for tag, attributes in pages[name].elements:
            assert tag != "img", name
            assert tag != "script" or "src" in attributes, name
            for attribute, value in attributes.items():
                assert not attribute.startswith("on"), f"{name}: {attribute}"
                assert attribute != "style", f"{name}: a style attribute"
                if attribute in ("href", "src", "xlink:href"):
                    assert not re.match(r"\s*(javascript|data):", value), f"{name}: {value}"
                    assert "evil" not in value
        assert "49" not in re.findall(r"&amp;(\S+)", pages[name].body), name
    body = pages["papers/swin.html"].body
    assert body.count("<script>alert(1)</script>") > 20  # it is there, as text
    assert "{{ 7*7 }}" in body


def test_hostile_text_stays_inside_of_scripts(hostile):
    folder, _ = hostile
    for name in ("data.js", "papers/swin.picture.js", "papers/vsa.picture.js"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "<" not in text
        assert "\u2028" not in text
        value = json.loads(text[text.index("=") + 1 : text.rindex(";")])
        assert HOSTILE in json.dumps(value, ensure_ascii=False).replace('\\"', '"').replace(
            "\\u2028", "\u2028"
        )


def test_a_foreign_drawing_is_cleaned(tmp_path):
    drawing = tmp_path / "x.svg"
    drawing.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', encoding="utf-8"
    )
    with pytest.raises(clean.Unclean, match="script"):
        plot.inline(drawing, "x")
    drawing.write_text('<!DOCTYPE svg [<!ENTITY a "b">]><svg>&a;</svg>', encoding="utf-8")
    with pytest.raises(clean.Unclean, match="document type"):
        plot.inline(drawing, "x")
    drawing.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg">'
        '<g id="a" style="stroke: currentColor; fill: url(#b); font: 8px Times">'
        '<text style="fill:url(https://x.example)">t</text></g></svg>',
        encoding="utf-8",
    )
    made = plot.inline(drawing, '"label"')
    assert 'stroke="currentColor"' in made
    assert 'fill="url(#plot-b)"' in made
    assert 'id="plot-a"' in made
    assert 'font-size="8"' in made
    assert "example" not in made
    assert "&quot;label&quot;" in made


@pytest.mark.parametrize(
    "latex", [r"\text{<script>alert(1)</script>}", r"\undefined x", "{", r"\text{a & b}"]
)
def test_latex_that_cannot_be_converted_is_shown_as_it_is(latex):
    assert equations.equation(latex).mathml == ""


def test_links_in_latex_are_dropped():
    for latex in (r"\href{javascript:alert(1)}{x}", r"\style{color:red}{x}", r"\class{a}{x}"):
        made = equations.equation(latex).mathml.replace(f'alttext="{latex}"', "")
        assert made.startswith("<math")
        for bad in ("href", "style", "class", "javascript"):
            assert bad not in made


def test_every_equation_of_the_catalogue_is_drawn(catalogue):
    for entry in catalogue:
        for latex in (*entry.equation, *entry.symbols):
            assert equations.equation(latex).mathml, f"{entry.key}: {latex}"


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for name, page in pages.items():
        policy = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
        assert len(policy) == 1, name
        assert "default-src 'none'" in policy[0]
        assert "unsafe" not in policy[0]
        assert "http" not in policy[0]
        for tag, attributes in page.elements:
            assert tag not in ("iframe", "object", "embed", "base", "form") or (
                tag == "form" and name == "index.html"
            )
            for attribute in ("src", "srcset", "data", "poster", "action", "xlink:href"):
                assert not re.match(r"(https?:)?//", attributes.get(attribute, "")), f"{name}: {attributes}"
            if tag not in ("a",):
                assert not re.match(r"(https?:)?//", attributes.get("href", "")), (
                    f"{name}: <{tag}> {attributes}"
                )
            assert tag != "script" or "src" in attributes, f"{name}: an inline script"
            assert tag != "style", f"{name}: an inline style sheet"
            assert "style" not in attributes, f"{name}: a style attribute"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(|@import|@font-face", path.read_text(encoding="utf-8")), path
    for path in (site / "static").glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bfetch\(|XMLHttpRequest|\bimport\b|https?:|\beval\(|innerHTML", text), path


# ------------------------------------------------------------------------------------------ the folder
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(gallery.NotAGallery, match=r"--out .* holds other files .* accepted: a new folder"):
        gallery.build(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(gallery.NotAGallery, match="is a file"):
        gallery.build(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_an_older_gallery_is_replaced_whole(tmp_path, catalogue):
    out = tmp_path / "site"
    out.mkdir()  # an empty folder is accepted
    gallery.build(out, catalogue)
    (out / "papers" / "gone.html").write_text("a paper that is no more", encoding="utf-8")
    gallery.build(out, catalogue)
    assert not (out / "papers" / "gone.html").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


def test_a_build_that_fails_leaves_the_old_gallery(tmp_path, catalogue, monkeypatch):
    out = tmp_path / "site"
    gallery.build(out, catalogue)
    before = digests(out)
    written = Path.write_bytes

    def full(path: Path, content: bytes):
        if path.name == "swin.html":
            raise OSError("no space left")
        return written(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        gallery.build(out, catalogue)
    assert digests(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


def test_command(tmp_path):
    from foveate.cli import app

    done = CliRunner().invoke(app, ["gallery", "build", "--out", str(tmp_path / "site")])
    assert done.exit_code == 0, done.output
    assert Path(done.output.splitlines()[-1]) == tmp_path / "site" / "index.html"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("", encoding="utf-8")
    done = CliRunner().invoke(app, ["gallery", "build", "--out", str(tmp_path / "other")])
    assert done.exit_code == 2
    assert "holds other files" in done.output


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "latex2mathml" else found(name, *a)
    )
    with pytest.raises(ImportError, match=r"latex2mathml: pip install 'foveate\[cli\]'"):
        gallery.build(tmp_path / "site")


# ------------------------------------------------------------------------------------------ for everybody
def test_headings_are_in_order(pages):
    for name, page in pages.items():
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
        assert levels.count(1) == 1, name
        assert levels[0] == 1, name
        for before, after in itertools.pairwise(levels):
            assert after <= before + 1, f"{name}: h{after} after h{before}"


def test_everything_has_a_name(pages):
    for name, page in pages.items():
        labelled = {a["for"] for a in page.all("label") if "for" in a}
        for i, (tag, a) in enumerate(page.elements):
            where = f"{name}: <{tag} {a}>"
            if tag == "svg":
                assert a.get("aria-hidden") == "true" or a.get("aria-label"), where
            elif tag in ("button", "a"):
                assert a.get("aria-label") or page.text(i), where
            elif tag == "input" and a.get("type") == "search":
                assert a["id"] in labelled, where
            elif tag == "table":
                assert any(t == "th" and "scope" in x for t, x in page.elements[i : i + 40]), where
            if a.get("role") == "region" or tag in ("nav", "aside"):
                assert a.get("aria-label"), where
            if "scroll" in a.get("class", "").split():
                assert a.get("tabindex") == "0", f"{where}: a box that scrolls cannot be reached by keyboard"
            for reference in ("aria-labelledby", "aria-describedby"):
                if reference in a:
                    assert a[reference] in page.ids, where


def test_pictures_have_a_text_alternative(pages):
    body = pages["papers/s2_attention.html"].body
    assert "A window and the first tokens, for every query. 11.8% of the 48 × 48 pairs are seen" in body
    assert "A map of 40 × 40 weights" in pages["papers/flexprefill.html"].body


def themes(site: Path) -> dict[str, dict[str, str]]:
    css = (site / "static" / "gallery.css").read_text(encoding="utf-8")
    blocks = re.findall(r"(:root[^{]*)\{\s*((?:[\w-]+:[^;]+;\s*)+)\}", css)
    found = {}
    for selector, body in blocks:
        values = dict(re.findall(r"(--[\w-]+):\s*(#[0-9a-f]{6});", body))
        kind = "dark" if '"dark"' in selector else "system" if "not(" in selector else "light"
        found[kind] = values
    return found


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def mixed(a: str, share: float, b: str) -> str:
    one, two = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (a, b))
    return "#" + "".join(f"{round(share * x + (1 - share) * y):02x}" for x, y in zip(one, two, strict=True))


def test_contrast_in_both_themes(site):
    found = themes(site)
    assert found["dark"] == found["system"]
    assert set(found["dark"]) == set(found["light"])
    families = [f"--f-{family}" for family in vocabulary.FAMILIES]
    states = ["--good", "--bad", "--open", "--implemented", "--planned"]
    for kind in ("light", "dark"):
        c = found[kind]
        texts = ["--ink", "--ink-soft", "--muted", "--accent", "--mark", *families, *states]
        for text in texts:
            for ground in ("--page", "--surface", "--sunk"):
                assert contrast(c[text], c[ground]) >= 4.5, f"{kind}: {text} on {ground}"
        for text in ("--code-word", "--code-text", "--code-number", "--code-name"):
            assert contrast(c[text], c["--sunk"]) >= 4.5, f"{kind}: {text}"
        for state in states:  # on the tinted ground of a verdict
            assert contrast(c[state], mixed(c[state], 0.06, c["--surface"])) >= 4.5, f"{kind}: {state}"
        for family in families:
            assert contrast(c[family], mixed(c[family], 0.07, c["--surface"])) >= 4.5, f"{kind}: {family}"
        assert contrast(c["--page"], c["--ink"]) >= 4.5


# ------------------------------------------------------------------------------------------ parts
def test_cost_examples_are_the_formula_s(catalogue):
    swin = catalogue["swin"]
    dense = dataclasses.replace(swin, cost=Cost(flops=formulas.DENSE))
    assert formulas.example(dense) == [(n, 4.0 * 8 * n * n * 64, 1.0) for n in formulas.LENGTHS]
    window = dataclasses.replace(
        swin, cost=Cost(flops="4*B*H*N*min(N, w*w)*D", where={"w": "window: a side (7)"})
    )
    assert [share for _, _, share in formulas.example(window)] == [49 / 4096, 49 / 32768]
    for formula, where in (("4*N*u", {"u": "latent frames"}), ("B*C", {}), ("N*M", {})):
        assert formulas.example(dataclasses.replace(swin, cost=Cost(flops=formula, where=where))) == []


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("a*(b + c)", r"a\,(b + c)"),
        ("a - (b - c)", r"a - (b - c)"),
        ("a - (b + c)", r"a - (b + c)"),
        ("-(a + b)", "-(a + b)"),
        ("(a*b)**2", r"(a\,b)^{2}"),
        ("a**(b + 1)", "a^{b + 1}"),
        ("(a + b)/c", r"\frac{a + b}{c}"),
        ("a//b", r"\lfloor \frac{a}{b} \rfloor"),
        ("2*3", r"2 \cdot 3"),
        ("C//d_out", r"\lfloor \frac{C}{d_{\mathrm{out}}} \rfloor"),
        ("max(0, log2(sqrt(n)))", r"\max(0,\, \log_{2}(\sqrt{n}))"),
    ],
)
def test_formulas_as_latex(text, latex):
    assert formulas.latex(text) == latex


def test_every_cost_of_the_catalogue_is_drawn(catalogue):
    for entry in catalogue:
        for formula in formulas.formulas(entry.cost):
            assert equations.equation(formula.latex).mathml, f"{entry.key}: {formula.latex}"


def test_thumbnails_draw_the_cells(catalogue):
    picture = {
        "kind": "pairs", "caption": "c", "controls": [], "grid": None,
        "frames": [{"setting": {}, "code": "", "queries": 2, "keys": 3, "density": 0.5, "bits": "Dg=="}],
    }  # fmt: skip  # bits 0b001110: row 0 = 0 1 1, row 1 = 1 0 0
    assert '<path d="M1 0.5h2M0 1.5h1"' in thumbnails.drawing(picture)
    assert 'aria-hidden="true"' in thumbnails.drawing(picture)
    assert 'role="img" aria-label="a &amp; b"' in thumbnails.drawing(picture, "a & b")


def test_synonyms_are_read_strictly(tmp_path):
    path = tmp_path / "synonyms.toml"
    assert documents.groups(path) == []
    path.write_text('[[group]]\nwords = ["kv cache", "key value cache"]\n', encoding="utf-8")
    assert documents.groups(path) == [["kv cache", "key value cache"]]
    for words, shown in (("words = [1]", r"\[1\]"), ('words = "ab"', "'ab'"), ("word = []", "None")):
        path.write_text(f"[[group]]\n{words}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"synonyms.toml: group 0: words is {shown}; accepted"):
            documents.groups(path)
