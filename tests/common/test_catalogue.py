"""Every implemented entry of the catalogue through the common suite: one test per entry, object and check."""

from __future__ import annotations

import pytest

from foveate.catalogue import load
from foveate.catalogue.conformance import checks_for

CATALOGUE = load()


def cases() -> list:
    made = []
    for entry in CATALOGUE:
        for number, check in enumerate(entry.checks):
            what = f"{entry.key}-{check.make.rsplit('.', 1)[-1]}{number}"
            for step in checks_for(entry, check):
                marks = [pytest.mark.slow] if step.slow else []
                made.append(pytest.param(step, id=f"{what}-{step.name}", marks=marks))
    return made


@pytest.mark.parametrize("step", cases())
def test_entry(step):
    step()


def test_every_implemented_entry_has_checks():
    for entry in CATALOGUE:
        if entry.implemented:
            steps = [step for check in entry.checks for step in checks_for(entry, check)]
            assert steps, f"{entry.key} has no check that runs"
