"""What the commands share: how they fail, lists on the command line, and click itself, or which extra brings it."""

from __future__ import annotations

from typing import Any

try:
    import click
except ModuleNotFoundError as error:
    raise SystemExit("foveate's command line needs click and rich: pip install 'foveate[cli]'") from error


class Failure(click.ClickException):
    """What the user can put right: one line on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(self.message, err=True)


class Interrupted(Failure):
    """Stopped by the user: one line on stderr, exit code 130."""

    exit_code = 130


def fail(command: str, message: object) -> Failure:
    """The error a command raises."""
    return Failure(f"foveate {command}: {message}")


def names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


class Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
