"""`foveate gallery`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from foveate.cli.common import fail, typer

gallery = typer.Typer(
    name="gallery",
    help="The gallery of the catalogue.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@gallery.callback()
def _gallery() -> None:
    """The gallery of the catalogue: a static site with a page per paper."""


@gallery.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder to write; an older gallery there is replaced.")] = Path(
        "foveate-gallery"
    ),
) -> None:
    """Write the gallery and print the path of its index; it opens in a browser as it is, without a server."""
    from foveate.catalogue import EntryError
    from foveate.catalogue import gallery as site
    from foveate.catalogue.record import RecordError

    try:
        index = site.build(out)
    except (site.NotAGallery, EntryError, RecordError, ImportError, OSError) as error:
        raise fail("gallery build", error) from None
    typer.echo(str(index))
