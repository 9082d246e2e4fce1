"""DHSA against what the authors' released code computes.

The numbers were made by running github.com/xiongsiheng/DHSA (legacy/, commit cc8e9c7) on the CPU, in float32, on the
inputs below: its boundary ratios, its choice of boundaries, its attention predictor and its choice of tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.layers import BoundaryPredictor, boundary_targets
from foveate.selectors import DHSA, select_boundaries

CASES = json.loads(Path(__file__).with_name("dhsa_released.json").read_text())
CHANNELS, HIDDEN = 16, 12
PARAMETERS = {
    "project.weight": (48, 16), "project.bias": (48,), "out.weight": (16, 16), "out.bias": (16,),
    "norm.weight": (16,), "norm.bias": (16,), "score.0.weight": (12, 65), "score.0.bias": (12,),
    "score.2.weight": (1, 12), "score.2.bias": (1,),
}  # fmt: skip


def inputs(seed: int, heads: int, n: int, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k (1, heads, n, dim)."""
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.standard_normal((1, heads, n, dim))).float() for _ in range(2))  # pyright: ignore


def scores(seed: int, n: int) -> torch.Tensor:
    """(1, n), -100 where a side has fewer than 4 keys."""
    made = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, n))).float() * 2
    made[:, :3], made[:, n - 4 :] = -100, -100
    return made


def weights(seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    made = {name: rng.standard_normal(shape) / shape[-1] ** 0.5 for name, shape in PARAMETERS.items()}
    return {name: torch.from_numpy(values).float() for name, values in made.items()}


@pytest.mark.parametrize("case", CASES["ratios"], ids=str)
def test_ratios(case):
    q, k = inputs(case["seed"], 3, case["n"])
    found = boundary_targets(q * 3, k, future=case["future"])[0]
    torch.testing.assert_close(found, torch.tensor(case["ratios"]).double(), rtol=2e-4, atol=0)


@pytest.mark.parametrize("case", CASES["boundaries"], ids=lambda case: str(case["seed"]))
def test_boundaries(case):
    forced = (
        None if case["instruction"] is None else case["n"] - case["instruction"] + 1
    )  # theirs is one later
    found = select_boundaries(scores(case["seed"], case["n"]), case["theta"], case["most"], 8, forced)
    assert found[0].tolist() == [0, *(t + 1 for t in case["chosen"]), case["n"]]


@pytest.mark.parametrize("case", CASES["logits"], ids=lambda case: str(case["seed"]))
def test_logits(case):
    predictor = BoundaryPredictor(CHANNELS, heads=4, hidden=HIDDEN)
    predictor.load_state_dict(weights(case["seed"]))
    keys = inputs(case["seed"], 2, case["n"])[1]
    found = predictor(keys.transpose(2, 3).flatten(1, 2))[0]
    inside = slice(3, case["n"] - 4)  # the others are set to -100 where they are used
    torch.testing.assert_close(found[inside], torch.tensor(case["logits"])[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES["tokens"], ids=lambda case: str(case["seed"]))
def test_tokens(case):
    """Within the chunk that the budget cuts all keys are equal, so keys per chunk are compared."""
    q, k = inputs(case["seed"], 4, case["n"])
    cuts = torch.tensor([case["boundaries"]])
    cfg = DHSA(case["block"], case["budget"], case["local"], 0, pooling=case["pooling"], instruction=0)
    dense = cfg.select(q, k, boundaries=cuts).layout().to_dense()[0, 0]
    lists = cfg.select(q, k, boundaries=cuts)
    assert len(case["kept"]) == lists.tokens.shape[2] + lists.dense // case["block"]
    for number, theirs in enumerate(case["kept"]):
        last = min((number + 1) * case["block"], case["n"]) - 1
        ours = dense[last].nonzero().flatten() if number * case["block"] < lists.dense else (
            lists.tokens[0, 0, number - lists.dense // case["block"]]
        )  # fmt: skip
        per_chunk = torch.bincount(
            torch.bucketize(ours, cuts[0], right=True) - 1, minlength=cuts.shape[1] - 1
        )
        assert per_chunk.tolist() == theirs
