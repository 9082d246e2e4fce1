"""The command line: the catalogue (`list`, `search`, `show`, `reproduce`, `gallery`), `compare`, `caches`
and `bench`.

Heavy imports wait until a command runs, so that `--help`, `list`, `search` and `show` are quick.
"""

from __future__ import annotations

from foveate.cli.bench import bench
from foveate.cli.caches import caches
from foveate.cli.catalogue import list_papers, reproduce, search, show_paper
from foveate.cli.common import click
from foveate.cli.compare import compare
from foveate.cli.gallery import gallery


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from foveate import __version__

        click.echo(f"foveate {__version__}")
        context.exit()


class _InOrder(click.Group):
    """Commands in the order in which they were added, the catalogue first."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def app() -> None:
    """Every published attention mechanism, defined once and executed by a few fast engines."""


for command in (list_papers, search, show_paper, reproduce, gallery, compare, caches, bench):
    app.add_command(command)


def main() -> None:
    """Entry point of the `foveate` command."""
    app(prog_name="foveate")
