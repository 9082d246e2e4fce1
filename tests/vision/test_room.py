"""The vision room: what it exports."""

from __future__ import annotations

import foveate as fv


def test_names_are_sorted_and_exist():
    assert fv.vision.__all__ == sorted(set(fv.vision.__all__))
    assert all(hasattr(fv.vision, name) for name in fv.vision.__all__)
