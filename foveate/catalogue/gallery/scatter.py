"""Quality against cost of every record that has both, each point linked to its page."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from foveate.bench.charts import Point
from foveate.bench.charts import scatter as chart
from foveate.catalogue.gallery.views import Paper

LABELS = 16  # so many names fit beside the panel


def points(papers: Sequence[Paper]) -> list[Point]:
    """The records with quality and cost, both as shares of dense attention."""
    found = []
    for paper in papers:
        record = None if paper.evidence is None else paper.evidence.record
        if record is None or record.quick or record.quality is None or record.cost is None:
            continue
        found.append(
            Point(
                label=paper.entry.name,
                x=record.cost,
                y=record.quality,
                low=None,
                high=None,
                colour=f"var(--f-{paper.entry.family})",
                control=record.verdict != "holds",
                note=f"{paper.entry.name}: {record.quality:.0%} of dense quality at {record.cost:.0%} of its work "
                f"({record.verdict})",
                href=f"papers/{paper.entry.key}.html",
                key=paper.entry.key,
            )
        )
    return found


def count(papers: Sequence[Paper]) -> int:
    return len(points(papers))


def evidence(papers: Sequence[Paper]) -> Markup | None:
    """The chart, or None while no record has both numbers."""
    found = points(papers)
    if not found:
        return None
    return chart(
        found,
        title="Measured quality against measured work, as shares of dense attention",
        x_title="work, share of dense attention (left is cheaper)",
        y_title="quality, share of dense (up is better)",
        percent=True,
        x_percent=True,
        names=len(found) <= LABELS,
        room=250 if len(found) <= LABELS else 24,
        width=820,
        height=420,
    )
