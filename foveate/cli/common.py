"""What the commands share: how they fail, lists on the command line, and typer itself, or which extra brings it."""

from __future__ import annotations

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("foveate's command line needs typer and rich: pip install 'foveate[cli]'") from error


def fail(command: str, message: object) -> typer.Exit:
    """One line on stderr, exit code 2."""
    typer.echo(f"foveate {command}: {message}", err=True)
    return typer.Exit(2)


def names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


class Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
