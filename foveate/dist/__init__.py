"""Dist: attention shared out over devices: plans, schedules and their simulation."""

from __future__ import annotations

__all__: list[str] = []
