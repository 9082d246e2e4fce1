"""The gallery: a static site of the catalogue, built from the entries and the stored evidence; needs no torch."""

from __future__ import annotations

from foveate.catalogue.gallery.build import NotAGallery, build

__all__ = ["NotAGallery", "build"]
