"""Dotted paths of entries -> objects, and the files those objects are written in."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from foveate.catalogue.record import PACKAGE, digests


class UnresolvedPath(ImportError):
    """A dotted path that leads nowhere; the message says which part is missing."""


def resolve(path: str) -> Any:
    """The object a dotted path names: the longest module, then attributes.

    >>> resolve("foveate.patterns.PowerOfTwo").__name__
    'PowerOfTwo'

    Raises:
        UnresolvedPath: no such module or attribute.
    """
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        name = ".".join(parts[:cut])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise UnresolvedPath(f"{path}: {name} needs {error.name}, which is not installed") from error
            continue
        for attribute in parts[cut:]:
            if not hasattr(found, attribute):
                raise UnresolvedPath(f"{path}: {name} has no {attribute}")
            found = getattr(found, attribute)
        return found
    raise UnresolvedPath(f"{path}: no module {parts[0]}")


def source_file(found: Any) -> Path:
    """The file in which an object of this package is written.

    Raises:
        UnresolvedPath: it is not written in this package (a value, say, whose type is someone else's).
    """
    target = inspect.unwrap(found) if callable(found) else found
    if not (inspect.isclass(target) or inspect.isroutine(target) or inspect.ismodule(target)):
        target = type(target)
    try:
        written = inspect.getsourcefile(target)
    except TypeError:  # built in
        written = None
    if written is None:
        raise UnresolvedPath(f"{found!r} has no source file")
    file = Path(written).resolve()
    if not file.is_relative_to(PACKAGE):
        raise UnresolvedPath(f"{found!r} is written in {file}, outside of the package")
    return file


def sources(paths: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """{file relative to the package: digests} of all files in which these dotted paths are written."""
    files = sorted({source_file(resolve(path)) for path in paths})
    return {file.relative_to(PACKAGE).as_posix(): digests(file) for file in files}
