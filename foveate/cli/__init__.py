"""The command line: the catalogue (`list`, `search`, `show`, `reproduce`, `gallery`), `compare` and `bench`.

Heavy imports wait until a command runs, so that `--help`, `list`, `search` and `show` are quick.
"""

from __future__ import annotations

from typing import Annotated

from foveate.cli.bench import bench
from foveate.cli.common import typer
from foveate.cli.compare import compare
from foveate.cli.gallery import gallery

app = typer.Typer(
    name="foveate",
    help="Every published attention mechanism, defined once and executed by a few fast engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from foveate import __version__

        typer.echo(f"foveate {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `foveate` command."""
    app()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Every published attention mechanism, defined once and executed by a few fast engines."""


app.command()(compare)
app.add_typer(bench)
app.add_typer(gallery)
