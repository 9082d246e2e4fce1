"""The catalogue: one entry per paper, what is implemented, what its experiment found, search and gallery.

Nothing here imports torch until an experiment runs.
"""

from __future__ import annotations

from foveate.catalogue.entry import Entry, EntryError
from foveate.catalogue.store import Catalogue, UnknownKey, load

__all__ = ["Catalogue", "Entry", "EntryError", "UnknownKey", "load"]
