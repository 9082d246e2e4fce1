"""Writing the site: rendered in a temporary folder, then put in place at once."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

from foveate.catalogue.store import Catalogue, load

MARKER = ".foveate-gallery"
PACKAGES = ("jinja2", "latex2mathml", "pygments")


class NotAGallery(ValueError):
    """The folder to write to holds something else."""


def build(out: Path, catalogue: Catalogue | None = None) -> Path:
    """Write the gallery of a catalogue (default: the library's) into a folder; returns the path of its index.

    The same catalogue gives the same bytes. An older gallery is replaced at the end, whole.

    Raises:
        NotAGallery: `out` is a file, or a folder that is not empty and no gallery.
        ImportError: a package of the extra `foveate[cli]` is missing.
    """
    out = out.resolve()
    _refuse_foreign(out)
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"the gallery needs {package}: pip install 'foveate[cli]'", name=package)
    from foveate.catalogue.gallery.pages import render

    files = render(load() if catalogue is None else catalogue)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".foveate-gallery-", dir=out.parent) as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        for name, content in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (fresh / MARKER).write_text("made by: foveate gallery build\n", encoding="utf-8")
        _refuse_foreign(out)
        if out.exists():
            out.rename(old)
        try:
            fresh.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    return out / "index.html"


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise NotAGallery(f"--out {out}: is a file; accepted: a new folder, an empty one, an older gallery")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise NotAGallery(
            f"--out {out}: holds other files (no {MARKER}); accepted: a new folder, an empty one, an older gallery"
        )
