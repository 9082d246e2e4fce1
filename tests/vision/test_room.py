"""The vision room: what it exports."""

from __future__ import annotations

import foveate as fv


def test_names_are_unique_and_exist():
    assert len(fv.vision.__all__) == len(set(fv.vision.__all__))  # ruff sorts them, constants first
    assert all(hasattr(fv.vision, name) for name in fv.vision.__all__)
