"""Templates -> the files of the site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from foveate.catalogue import vocabulary as words
from foveate.catalogue.gallery import facets, scatter, views
from foveate.catalogue.gallery.documents import documents, script
from foveate.catalogue.gallery.equations import equation
from foveate.catalogue.record import Figure
from foveate.catalogue.store import Catalogue

HERE = Path(__file__).parent
STATIC = HERE / "static"


def render(catalogue: Catalogue) -> dict[str, bytes]:
    """{path in the site: content}, in the order of paths."""
    templates = _templates()
    papers = views.papers(catalogue)
    statuses = Counter(paper.status for paper in papers)
    shared: dict[str, Any] = {"words": words, "total": len(papers)}
    files: dict[str, str | bytes] = {}
    for path in sorted(STATIC.rglob("*")):
        if path.is_file():
            files[f"static/{path.relative_to(STATIC).as_posix()}"] = path.read_bytes()
    files["data.js"] = script("foveateGallery", documents(catalogue))
    files["index.html"] = templates.get_template("index.html.j2").render(
        **shared,
        root="",
        papers=sorted(papers, key=_front),
        facets=facets.facets(catalogue),
        score=[(status, statuses[status]) for status in words.STATUSES],
        scatter=scatter.evidence(papers),
        points=scatter.count(papers),
    )
    page = templates.get_template("paper.html.j2")
    for paper in papers:
        key = paper.entry.key
        files[f"papers/{key}.html"] = page.render(**shared, root="../", paper=paper, entry=paper.entry)
        if paper.picture is not None:
            files[f"papers/{key}.picture.js"] = script("foveatePicture", paper.picture)
    return {
        name: content if isinstance(content, bytes) else content.encode("utf-8")
        for name, content in sorted(files.items())
    }


def _front(paper: views.Paper) -> tuple[int, int, str]:
    """The order of the index: what works first, then the newest."""
    return (
        list(words.STATUSES).index(paper.status),
        -int(paper.entry.date.replace("-", "").ljust(8, "0")),
        (paper.entry.key),
    )


def _templates():
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        highlight=highlight,
        math=math,
        count=number,
        share=share,
        figure=figure,
        interval=interval,
        label=lambda value, facet: facets.label(facet, value),
        in_order=in_order,
    )
    return made


# ------------------------------------------------------------------------------------------ filters
def highlight(code: str) -> Markup:
    """Python code with its tokens in spans.

    >>> highlight("x < 1")
    Markup('<span class="tok-n">x</span> <span class="tok-o">&lt;</span> <span class="tok-mi">1</span>')
    """
    from pygments import highlight as run
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    made = run(code, PythonLexer(ensurenl=False), HtmlFormatter(nowrap=True, classprefix="tok-"))
    return Markup(made.rstrip("\n"))


def math(latex: str) -> Markup:
    """LaTeX as MathML, or as code where it cannot be converted."""
    made = equation(latex)
    return Markup(made.mathml) if made.mathml else Markup('<code class="latex">{}</code>').format(latex)


def number(value: float) -> str:
    """A count in few characters.

    >>> number(950), number(4096), number(1.5e9), number(0.03125)
    ('950', '4,096', '1.5 G', '0.0312')
    """
    if value != int(value) and abs(value) < 1000:
        return f"{value:.3g}"
    for size, sign in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {sign}"
    return f"{value:,.0f}"


def share(percent: float) -> str:
    """
    >>> share(100.0), share(3.14159), share(0.01234)
    ('100 %', '3.1 %', '0.012 %')
    """
    if percent >= 10:
        return f"{percent:,.0f} %"
    return f"{percent:.1f} %" if percent >= 1 else f"{percent:.2g} %"


def figure(found: Figure) -> str:
    """The value of a figure with its unit, without the interval.

    >>> figure(Figure("accuracy", 0.5, 0.4, 0.6, 3)), figure(Figure("speed", 2.0, unit="x"))
    ('0.5', '2 ×')
    """
    unit = {"x": "×"}.get(found.unit, found.unit)
    return f"{found.value:.4g} {unit}".strip()


def interval(found: Figure) -> str:
    """
    >>> interval(Figure("accuracy", 0.5, 0.4, 0.6, 3)), interval(Figure("speed", 2.0))
    ('0.4 to 0.6', '–')
    """
    return "–" if found.low is None or found.high is None else f"{found.low:.4g} to {found.high:.4g}"


def in_order(groups: Iterable[Any], items: Sequence[Any]) -> list[Any]:
    """Groups of relatives in the order in which their wordings come."""
    order = list(dict.fromkeys(item.how for item in items))
    return sorted(groups, key=lambda group: order.index(group[0]))
