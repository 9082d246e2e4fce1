"""The gallery in a real browser, opened from files.

Skipped where no Chromium is found (FOVEATE_CHROMIUM names one), unless FOVEATE_BROWSER=required.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
from gallery_sample import sample

from foveate.catalogue import gallery
from foveate.catalogue.store import Catalogue

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def missing(what: str):
    if os.environ.get("FOVEATE_BROWSER") == "required":
        pytest.fail(f"FOVEATE_BROWSER=required, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    path = os.environ.get("FOVEATE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None or not Path(path).exists():
        missing(f"no Chromium at {path}" if path else f"none of {', '.join(NAMES)} is installed")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Catalogue:
    return sample(tmp_path_factory.mktemp("evidence"))


@pytest.fixture(scope="module")
def site(catalogue, tmp_path_factory) -> Path:
    return gallery.build(tmp_path_factory.mktemp("gallery") / "site", catalogue).parent


@pytest.fixture
def visit(browser, site):
    """visit(page, **context) opens a page of the site; afterwards nothing may have been logged or asked for outside."""
    contexts, complaints = [], []

    def failed(request) -> bool:  # leaving a page before all of it is loaded is no failure
        return request.failure != "net::ERR_ABORTED"

    def opened(page: str = "index.html", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(10_000)
        tab.on("console", lambda m: complaints.append(f"console {m.type}: {m.text}"))
        tab.on("pageerror", lambda e: complaints.append(f"error: {e}"))
        tab.on("requestfailed", lambda r: failed(r) and complaints.append(f"{r.failure}: {r.url}"))
        tab.on("request", lambda r: r.url.startswith("file://") or complaints.append(f"request: {r.url}"))
        tab.goto(f"{site.as_uri()}/{page}")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def shown(tab) -> list[str]:
    """Keys of the cards that are seen, in their order."""
    return tab.eval_on_selector_all("#cards > li:not([hidden])", "all => all.map(li => li.dataset.key)")


def keys_where(catalogue, holds) -> set[str]:
    return {entry.key for entry in catalogue if holds(entry)}


# ------------------------------------------------------------------------------------------ index
def test_search_finds(visit, catalogue):
    tab = visit()
    assert len(shown(tab)) == len(catalogue)
    for text, keys in (
        ("windows that move", {"vsa", "swin", "dito_shifted_window_learning"}),
        ("flexprefil", {"flexprefill"}),  # a letter is missing
        (catalogue["titans"].title, {"titans"}),
        ("NATTEN", {"fused_neighborhood_attention", "generalized_neighborhood_attention"}),
    ):
        tab.fill("#q", text)
        assert shown(tab)[0] in keys, text
        assert 0 < len(shown(tab)) < len(catalogue)
    assert tab.inner_text("#found") == f"{len(shown(tab))} of {len(catalogue)} papers"
    tab.fill("#q", "qwxyzzy")
    assert shown(tab) == []
    tab.click("#clear")
    assert len(shown(tab)) == len(catalogue)


def test_every_title_finds_its_paper_first(visit, catalogue):
    tab = visit()
    wrong = tab.evaluate(
        """() => {
            const search = foveateSearch(foveateGallery);
            return foveateGallery.papers.filter(p => search(p.title)[0].key !== p.key).map(p => p.key);
        }"""
    )
    assert wrong == []


def test_synonyms_widen_a_search(visit):
    tab = visit()
    found = tab.evaluate(
        """() => {
            const search = groups => foveateSearch({...foveateGallery, synonyms: groups})("zzcarousel");
            return [search([]).length, search([["zzcarousel", "shifted windows"]]).map(hit => hit.key)];
        }"""
    )
    assert found[0] == 0
    assert "swin" in found[1][:3]


def test_facets_filter(visit, catalogue):
    tab = visit()
    tab.check("input[name=family][value=window]")
    window = keys_where(catalogue, lambda e: e.family == "window")
    assert set(shown(tab)) == window
    tab.check("input[name=family][value=pattern]")  # or, within a facet
    either = keys_where(catalogue, lambda e: e.family in ("window", "pattern"))
    assert set(shown(tab)) == either
    tab.check("input[name=modality][value=text]")  # and, across facets
    both = either & keys_where(catalogue, lambda e: "text" in e.modality)
    assert set(shown(tab)) == both
    for value in ("window", "selector"):  # a count says what choosing the value would show
        count = tab.inner_text(f"label:has(input[name=family][value={value}]) .value-count")
        assert int(count) == len(
            keys_where(catalogue, lambda e, v=value: e.family == v and "text" in e.modality)
        )
    assert tab.locator("#pills li").count() == 3
    tab.click("#pills li >> nth=2")
    assert set(shown(tab)) == either
    tab.click("a[href='#status=works']")
    assert shown(tab) == ["s2_attention"]


def test_order_and_table(visit, catalogue):
    tab = visit()
    assert shown(tab)[0] == "s2_attention"  # what works comes first
    tab.select_option("#order", "name")
    names = sorted((e.name.lower(), e.key) for e in catalogue)
    assert [catalogue[key].name.lower() for key in shown(tab)] == [name for name, _ in names]
    tab.click("button[data-view=table]")
    assert tab.locator("#cards").is_hidden()
    assert tab.locator("#table tbody tr").first.is_visible()
    dates = "all => all.map(td => td.textContent)"
    tab.click("th[data-sort=year] button")
    column = tab.eval_on_selector_all("#table tbody tr td:nth-child(3)", dates)
    assert column == sorted((e.date for e in catalogue), reverse=True)
    assert tab.get_attribute("th[data-sort=year]", "aria-sort") == "descending"
    tab.click("th[data-sort=year] button")
    assert (
        tab.eval_on_selector_all("#table tbody tr td:nth-child(3)", dates) == column[::-1] == sorted(column)
    )
    assert tab.get_attribute("th[data-sort=year]", "aria-sort") == "ascending"
    await_address(tab, "sort=year-up", anywhere=True)


def await_address(tab, part, anywhere=False):
    """Wait until the address ends with (or has) a text; the driver hears of it a moment after the page."""
    tab.wait_for_function(
        "([part, anywhere]) => anywhere ? location.href.includes(part) : location.href.endsWith(part)",
        arg=[part, anywhere],
    )


def test_the_address_keeps_the_state(visit, catalogue):
    tab = visit("index.html#q=window&family=window,pattern&sort=name&view=table")
    assert tab.input_value("#q") == "window"
    assert tab.is_checked("input[name=family][value=window]")
    assert tab.is_checked("input[name=family][value=pattern]")
    assert tab.locator("#table").is_visible()
    first = shown(tab)
    assert {catalogue[key].family for key in first} == {"window", "pattern"}
    tab.uncheck("input[name=family][value=pattern]")
    await_address(tab, "#q=window&family=window&sort=name&view=table")
    tab.fill("#q", "")
    for text in ("d", "di", "dil"):
        tab.fill("#q", text)
    await_address(tab, "#q=dil&family=window&sort=name&view=table")
    tab.go_back()  # typing is one step
    assert tab.input_value("#q") == "window"
    assert not tab.is_checked("input[name=family][value=pattern]")
    tab.go_back()
    assert tab.is_checked("input[name=family][value=pattern]")
    assert shown(tab) == first
    tab.go_forward()
    assert not tab.is_checked("input[name=family][value=pattern]")
    tab.evaluate("location.hash = 'q=%E0%A4%A&family=nonsense,gate&sort=toString&view=x'")  # broken by hand
    tab.wait_for_function("document.querySelector('input[value=gate]').checked")
    assert set(shown(tab)) == keys_where(catalogue, lambda e: e.family == "gate")


def test_a_page_leads_back_to_the_search(visit):
    tab = visit()
    tab.fill("#q", "windows & “more” #50%")
    tab.check("input[name=family][value=window]")
    keys = shown(tab)
    tab.click(f"#cards li[data-key={keys[0]}] a")
    tab.wait_for_selector(".paper h1")
    assert "windows & “more” #50%" in tab.inner_text("#back")
    tab.click(".beside a >> nth=0")
    tab.wait_for_selector(".paper h1")
    tab.click("#back")
    tab.wait_for_selector(".ready")
    assert tab.input_value("#q") == "windows & “more” #50%"
    assert shown(tab) == keys
    tab.click(f"#cards li[data-key={keys[0]}] a")
    tab.go_back()
    tab.wait_for_selector(".ready")
    assert shown(tab) == keys


def test_tags_lead_to_their_papers(visit, catalogue):
    tab = visit("papers/swin.html")
    tab.focus(".chip >> text=hierarchical")
    assert tab.locator("#tip-hierarchical").is_visible()
    tab.keyboard.press("Escape")
    assert tab.locator("#tip-hierarchical").is_hidden()
    tab.click(".chip >> text=hierarchical")
    tab.wait_for_selector(".ready")
    assert set(shown(tab)) == keys_where(catalogue, lambda e: "hierarchical" in e.tags)
    assert "coarse first, then fine" in tab.inner_text("#pills")


def test_evidence_view(visit):
    tab = visit()
    tab.click("button[data-view=evidence]")
    assert tab.locator("#evidence a[data-key]").count() == 2
    tab.check("input[name=status][value=works]")
    assert tab.locator("#evidence a.away").count() == 1
    assert tab.get_attribute("#evidence a.away", "data-key") == "fused_neighborhood_attention"
    tab.focus("#evidence a[data-key=s2_attention]")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".paper h1")
    assert "s2_attention" in tab.url


def test_keyboard(visit):
    tab = visit()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "q"
    tab.keyboard.type("swin")
    tab.keyboard.press("Escape")
    assert tab.input_value("#q") == ""
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.name") == "status"
    tab.keyboard.press("Space")
    assert shown(tab) == ["s2_attention"]
    outline = tab.evaluate("getComputedStyle(document.activeElement.closest('label')).outlineStyle")
    assert outline == "solid"
    tab.focus(".card h3 a >> visible=true")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".paper h1")
    assert tab.inner_text("h1") == "S2-Attention"


def test_skip_link_keeps_the_search(visit):
    tab = visit("index.html#q=swin")
    found = shown(tab)
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert shown(tab) == found
    await_address(tab, "#q=swin")


# ------------------------------------------------------------------------------------------ pictures
STYLE = "getComputedStyle(document.documentElement)"


COPY = """n => {
    const canvas = document.querySelectorAll('canvas')[n], copy = document.createElement('canvas');
    [copy.width, copy.height] = [canvas.width, canvas.height];
    const context = copy.getContext('2d', {willReadFrequently: true}); // reading the page's own would make it warn
    context.drawImage(canvas, 0, 0);
    return context.getImageData(0, 0, copy.width, copy.height);
}"""


def pixels(tab, n: int = 0) -> int:
    """The pixels of a canvas, as a digest."""
    return tab.evaluate(
        f"""n => ({COPY})(n).data.reduce((sum, v, i) => (sum * 31 + v * (i % 251 + 1)) >>> 0, 7)""", n
    )


def cells(tab, *places: tuple[int, int]) -> list[list[int]]:
    """The colours in the middle of cells of the 48 x 48 matrix."""
    return tab.evaluate(
        f"""places => {{
            const image = ({COPY})(0), at = (n, size) => Math.floor((n + 0.4) * size / 48);
            const first = (row, column) => 4 * (at(row, image.height) * image.width + at(column, image.width));
            return places.map(p => Array.from(image.data.slice(first(...p), first(...p) + 3)));
        }}""",
        places,
    )


def colours(tab, n: int = 0) -> int:
    """How many colours a canvas has."""
    return tab.evaluate(f"""n => new Set(new Uint32Array(({COPY})(n).data.buffer)).size""", n)


def test_pairs_draw_and_answer(visit):
    tab = visit("papers/s2_attention.html")
    assert colours(tab) >= 3
    still = pixels(tab)
    box = tab.locator("canvas").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 17.5 / 48)
    assert tab.inner_text(".says") == "query 17 sees 6 keys: 0–1, 14–17"  # window 4, two sinks
    assert pixels(tab) != still
    mark = [
        int(v, 16)
        for v in re.findall("..", tab.evaluate(f"{STYLE}.getPropertyValue('--mark').trim().slice(1)"))
    ]
    key, other_row, no_key = cells(tab, (17, 15), (18, 15), (17, 20))
    assert key == mark
    assert mark not in (other_row, no_key)
    assert "Causal() & (SlidingWindow(4) | Sinks(2))" in tab.inner_text(".frame-code")


def test_controls_change_the_frame(visit):
    tab = visit("papers/s2_attention.html")
    before = pixels(tab), tab.inner_text("figcaption")
    slider = tab.locator("label:has-text('window') input[type=range]")
    assert slider.get_attribute("aria-valuetext") == "window 4"
    slider.focus()
    tab.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "window 8"
    assert (pixels(tab), tab.inner_text("figcaption")) != before
    assert pixels(tab) != before[0]
    assert "SlidingWindow(8)" in tab.inner_text(".frame-code")
    tab.select_option("label:has-text('direction') select", label="both")
    assert "Causal" not in tab.inner_text(".frame-code")
    tab.focus("canvas")
    tab.keyboard.press("Home")
    assert tab.inner_text(".says").startswith("query 0 sees")


def test_a_query_by_keyboard(visit):
    tab = visit("papers/s2_attention.html")
    tab.focus("canvas")
    canvas = tab.locator("canvas")
    assert canvas.get_attribute("aria-valuenow") == "24"
    for key, query in (
        ("ArrowDown", 25),
        ("ArrowUp", 24),
        ("PageDown", 30),
        ("End", 47),
        ("ArrowDown", 47),
        ("Home", 0),
    ):
        tab.keyboard.press(key)
        assert canvas.get_attribute("aria-valuenow") == str(query), key
        assert canvas.get_attribute("aria-valuetext").startswith(f"query {query} sees ")
    tab.keyboard.press("Escape")
    assert canvas.get_attribute("aria-valuetext") == "none chosen"


def test_the_grid_shows_the_keys_of_the_query(visit):
    tab = visit("papers/fused_neighborhood_attention.html")
    assert tab.locator("canvas").count() == 2
    assert colours(tab, 1) >= 3
    tab.focus("canvas >> nth=0")
    tab.keyboard.press("Home")
    corner = pixels(tab, 1)
    assert tab.inner_text(".says") == "query 0 sees 9 keys: 0–2, 12–14, 24–26"
    box = tab.locator("canvas").nth(1).bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 6.5 / 12, box["y"] + box["height"] * 5.5 / 12)
    assert tab.inner_text(".says").startswith(f"query {5 * 12 + 6} sees 9 keys")
    assert pixels(tab, 1) != corner
    assert "9 of 144" in tab.locator("canvas").nth(1).get_attribute("aria-label")


def test_a_map_reads_its_values(visit):
    tab = visit("papers/flexprefill.html")
    assert colours(tab) > 20
    tab.focus("canvas")
    for key in ("Home", *["ArrowLeft"] * 3):
        tab.keyboard.press(key)
    assert tab.inner_text(".says") == "query 0, key 0: weight 0.5"  # the first row sees itself alone
    box = tab.locator("canvas").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 30.5 / 40, box["y"] + box["height"] * 3.5 / 40)
    assert tab.inner_text(".says") == "query 3, key 30: weight 0"


def test_copy(visit):
    tab = visit("papers/s2_attention.html")
    code = tab.locator("#code .code")
    assert code.locator("code span").count() > 20  # highlighted
    code.locator("button").click()
    code.locator("button >> text=copied").wait_for()


# ------------------------------------------------------------------------------------------ looks
@pytest.mark.parametrize("page", ["index.html", "papers/fused_neighborhood_attention.html"])
def test_dark_and_light(visit, page):
    ground = "getComputedStyle(document.documentElement).backgroundColor"

    def bright(tab) -> bool:
        return sum(map(int, re.findall(r"\d+", tab.evaluate(ground))[:3])) > 380

    light, dark = visit(page, color_scheme="light"), visit(page, color_scheme="dark")
    assert bright(light)
    assert not bright(dark)
    before = pixels(dark) if "papers" in page else None
    dark.click("#theme")
    assert dark.get_attribute("#theme", "aria-label") == "Colours: light"
    assert bright(dark)
    assert before is None or pixels(dark) != before
    dark.reload()
    assert bright(dark)  # it is remembered
    dark.click("#theme")
    assert not bright(dark)
    light.click("#theme")
    light.click("#theme")
    assert not bright(light)


def test_nothing_is_wider_than_a_phone(visit, catalogue):
    tab = visit("index.html", viewport={"width": 360, "height": 740}, has_touch=True)
    folder = tab.url.rsplit("/", 1)[0]
    assert not tab.evaluate("document.getElementById('filters').open")
    views = [f"index.html#view={view}" for view in ("cards", "table", "evidence")]
    keys = ["s2_attention", "fused_neighborhood_attention", "flexprefill", "swin"]
    keys += sorted(catalogue.entries)[::12]
    for page in (*views, *(f"papers/{key}.html" for key in keys)):
        tab.goto(f"{folder}/{page}")
        width, view = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= view == 360, f"{page} is {width} wide"


def test_motion_is_reduced_on_request(visit):
    tab = visit(reduced_motion="reduce")
    assert tab.evaluate("getComputedStyle(document.querySelector('.card')).transitionDuration") == "0s"
    assert visit().evaluate("getComputedStyle(document.querySelector('.card')).transitionDuration") != "0s"


def test_it_reads_without_scripts(visit, catalogue):
    tab = visit(java_script_enabled=False)
    assert tab.locator(".card h3 a").count() == len(catalogue)
    assert tab.locator("#q").is_hidden()
    assert tab.locator("#table").is_visible()
    page = visit("papers/s2_attention.html", java_script_enabled=False)
    assert page.locator("figure .cells").is_visible()


def test_hostile_addresses_stay_text(visit):
    bad = quote("q=<img src=x onerror=alert(1)>", safe="")
    tab = visit(f"papers/swin.html#back={bad}")
    assert tab.locator("img").count() == 0
    assert tab.get_attribute("#back", "href") == "../index.html#q=<img src=x onerror=alert(1)>"
