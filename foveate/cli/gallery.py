"""`foveate gallery`."""

from __future__ import annotations

from pathlib import Path

from foveate.cli.common import click, fail


@click.group()
def gallery() -> None:
    """The gallery of the catalogue: a static site with a page per paper."""


@gallery.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="foveate-gallery",
    show_default=True,
    help="Folder to write; an older gallery there is replaced.",
)
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def build(out: Path, show: bool) -> None:
    """Write the gallery and print the path of its index; it opens in a browser as it is, without a server."""
    from foveate.catalogue import EntryError
    from foveate.catalogue import gallery as site
    from foveate.catalogue.record import RecordError

    try:
        index = site.build(out)
    except (site.NotAGallery, EntryError, RecordError, ImportError, OSError) as error:
        raise fail("gallery build", error) from None
    click.echo(str(index))
    if show:
        click.launch(str(index))
