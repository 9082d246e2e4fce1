"""`foveate list`, `search`, `show` and `reproduce`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.common import click, fail, names

if TYPE_CHECKING:
    from foveate.catalogue import Catalogue


def _load(command: str, evidence: Path | None) -> Catalogue:
    from foveate.catalogue.store import EVIDENCE, load

    if evidence is not None and not evidence.is_dir():
        raise fail(command, f"--evidence {evidence}: no such directory")
    return load(evidence=evidence or EVIDENCE)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=1))


def _accepted(command: str, option: str, given: tuple[str, ...], accepted: Any) -> None:
    from foveate.bench.errors import CompareError, unknown

    wrong = [name for name in given if name not in accepted]
    if wrong:
        error: CompareError = unknown(option, wrong, list(accepted))
        raise fail(command, error)


@click.command("list")
@click.argument(
    "states", nargs=-1, metavar="[STATE]..."
)  # works, not-reproduced, implemented, planned; default: all.
@click.option("--status", is_flag=True, help="The state of each paper, and the score.")
@click.option("--family", default="", help="Only these families, e.g. selector,cache.")
@click.option("--tag", default="", help="Only papers with all of these tags, e.g. causal,window.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option(
    "--evidence", type=click.Path(path_type=Path), help="Directory of evidence; default: the one shipped."
)
def list_papers(
    states: tuple[str, ...],
    status: bool,
    family: str,
    tag: str,
    as_json: bool,
    evidence: Path | None,
) -> None:
    """The papers of the catalogue: what works, what is planned.

    ● works  ◐ implemented, claim not reproduced at this scale  ○ implemented, no fresh evidence  · planned
    """
    from foveate.catalogue import show, vocabulary

    wanted, families, tags = tuple(states or ()), names(family), names(tag)
    _accepted("list", "state", wanted, vocabulary.STATUSES)
    _accepted("list", "family", families, vocabulary.FAMILIES)
    _accepted("list", "tag", tags, vocabulary.TAGS)
    catalogue = _load("list", evidence)
    entries = [
        entry
        for entry in catalogue
        if (not families or entry.family in families)
        and set(tags) <= set(entry.tags)
        and (not wanted or catalogue.status(entry.key) in wanted)
    ]
    if as_json:
        _print_json({"papers": [show.summary(catalogue, entry) for entry in entries]})
        return
    for line in show.table(catalogue, entries, states=status):
        click.echo(line)
    click.echo("")
    if len(entries) < len(catalogue):
        click.echo(f"{len(entries)} of {len(catalogue)} papers")
    click.echo(show.score_line(catalogue))


@click.command("search")
@click.argument("query", nargs=-1, required=True)  # Words; quotes are not needed.
@click.option("--limit", type=click.IntRange(min=1), default=8, show_default=True, help="How many papers.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option(
    "--embeddings",
    type=click.Path(path_type=Path),
    help="Directory of a local transformers text encoder, to rank by meaning too.",
)
def search(
    query: tuple[str, ...],
    limit: int,
    as_json: bool,
    embeddings: Path | None,
) -> None:
    """Papers for a description in anyone's words: "windows that move", "cheaper than quadratic prefill"."""
    from foveate.catalogue import show
    from foveate.catalogue.search import Index

    catalogue = _load("search", None)
    text = " ".join(query)
    try:
        index = Index(catalogue)
        if embeddings is None:
            found = index.search(text, limit)
        else:
            from foveate.catalogue.embeddings import search_with

            found = search_with(index, embeddings, text, limit)
    except ValueError as error:
        raise fail("search", error) from None
    if as_json:
        results = [{"key": h.key, "title": catalogue[h.key].title, "score": h.score} for h in found]
        _print_json({"results": results})
        return
    for line in show.hits(catalogue, found):
        click.echo(line)
    if not found:
        click.echo("nothing found; `foveate list` shows all papers")
        raise click.exceptions.Exit(1)


@click.command("show")
@click.argument("key")  # Key of a paper, or words that find it.
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    help="Write the picture and the plot of the evidence there, as PNG.",
)
@click.option(
    "--evidence", type=click.Path(path_type=Path), help="Directory of evidence; default: the one shipped."
)
def show_paper(
    key: str,
    as_json: bool,
    picture: Path | None,
    evidence: Path | None,
) -> None:
    """One paper: idea, picture, formula, snippet, cost, evidence, source."""
    from foveate.catalogue import UnknownKey, show

    catalogue = _load("show", evidence)
    try:
        entry = catalogue[key]
    except UnknownKey as error:
        from foveate.catalogue.search import Index

        found = Index(catalogue).search(key, 1) if any(c.isalnum() for c in key) else []
        if not found or found[0].score < 1e3:  # only what it is called, not what it may be about
            raise fail("show", error) from None
        entry = catalogue[found[0].key]
    if as_json:
        _print_json(show.full(catalogue, entry))
    else:
        for line in show.page(catalogue, entry):
            click.echo(line)
    if picture is not None:
        record = catalogue.records.get(entry.key)
        if record is None or (record.picture is None and record.plot is None):
            raise fail("show", f"--picture: {entry.key} has none yet; it is {catalogue.status(entry.key)}")
        from foveate.catalogue.plots import page_png

        try:
            page_png(record, picture)
        except (ImportError, OSError) as error:
            raise fail("show", error) from None
        click.echo(str(picture), err=True)


@click.command("reproduce")
@click.argument("keys", nargs=-1, metavar="[KEY]...")  # Keys of papers.
@click.option("--all", "everything", is_flag=True, help="Every paper that has an experiment.")
@click.option("--quick", is_flag=True, help="One seed, few steps: whether it runs, not whether it holds.")
@click.option("--resume", is_flag=True, help="Keep fresh results in --out, continue interrupted ones.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="foveate-evidence",
    show_default=True,
    help="Directory for KEY.json and KEY.svg.",
)
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def reproduce(
    keys: tuple[str, ...],
    everything: bool,
    quick: bool,
    resume: bool,
    out: Path,
    device: str,
    as_json: bool,
) -> None:
    """Run the small experiments that show, or fail to show, what papers claim.

    One JSON file and one plot per paper, written as soon as it is done; one that fails does not stop the rest.
    `foveate list --status --evidence DIR` and `foveate show KEY --evidence DIR` read them.
    """
    from foveate.catalogue import UnknownKey

    catalogue = _load("reproduce", None)
    from rich.console import Console

    console = Console(stderr=as_json)
    with _Progress(console) as progress:
        from foveate.catalogue.reproduce import chosen, run_all

        try:
            entries = chosen(catalogue, keys or [], everything)
        except (UnknownKey, ValueError) as error:
            raise fail("reproduce", error) from None
        failed, outcomes = 0, []
        try:
            progress.total(len(entries))
            for outcome in run_all(
                entries, out, quick=quick, resume=resume, device=device, listen=progress.listen
            ):
                outcomes.append(outcome)
                failed += outcome.record is None
                progress.done(outcome)
        except KeyboardInterrupt:
            click.echo(
                f"foveate reproduce: stopped; finished steps are in {out}, continue with --resume", err=True
            )
            raise click.exceptions.Exit(130) from None
        except OSError as error:
            raise fail("reproduce", f"{error.filename or out}: {error.strerror or error}") from None
    if as_json:
        _print_json({
            "results": [
                {"key": o.key, "verdict": o.record.verdict if o.record else None,
                 "summary": o.record.summary if o.record else o.error}
                for o in outcomes
            ]
        })  # fmt: skip
    else:
        click.echo(str(out))
    if failed:
        raise click.exceptions.Exit(1)


class _Progress:
    """A bar on a terminal, lines otherwise; a line for every finished experiment."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=4,  # drawing must not disturb what is timed
        )

    def __enter__(self) -> _Progress:
        self.bar.start()
        self.whole = self.bar.add_task("loading", total=None)
        self.one = None
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def total(self, count: int) -> None:
        self.count, self.number = count, 0
        self.bar.update(self.whole, total=count, description="experiments")

    def listen(self, entry: Any) -> _Progress:
        self.one = self.bar.add_task(entry.key, total=1.0)
        self.key = entry.key
        return self

    def step(self, what: str, share: float | None) -> None:
        if self.one is not None:
            self.bar.update(self.one, description=f"{self.key}: {what}", completed=share or 0.0)

    def done(self, outcome: Any) -> None:
        from foveate.catalogue.show import verdict_line

        self.number += 1
        self.bar.update(self.whole, completed=self.number)
        if self.one is not None:
            self.bar.remove_task(self.one)
            self.one = None
        for line in verdict_line(outcome, self.number, self.count):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
