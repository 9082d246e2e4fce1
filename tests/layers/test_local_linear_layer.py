"""The layer around local linear attention: its formula, decoding, training, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from foveate.layers import LocalLinearAttention, TransformerLM
from foveate.linear import local_linear_attention


@pytest.mark.parametrize("rotary", [False, True])
def test_is_the_operator_between_its_maps(rotary):
    torch.manual_seed(0)
    layer = LocalLinearAttention(16, 4, 2, reg=0.3, rotary=rotary, causal=not rotary).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    q, k, v = (
        (x @ p.weight.T).view(2, 11, -1, 4).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    if rotary:
        q, k = (layer.rotary(t, torch.arange(11)) for t in (q, k))
    want = local_linear_attention(q, k, v, reg=0.3, causal=not rotary)
    torch.testing.assert_close(
        layer(x), want.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T, rtol=0, atol=2e-7
    )
    assert torch.allclose(F.softplus(layer.raw_reg), torch.tensor(0.3).double())


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_decoding_in_pieces(solver):
    torch.manual_seed(1)
    layer = LocalLinearAttention(16, 2, solver=solver, rotary=True).double()
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    state, parts = layer.initial_state(x), []
    for a, b in ((0, 7), (7, 8), (8, 9), (9, 23)):
        out, state = layer(x[:, a:b], state=state)
        parts.append(out)
        assert state.position == state.k.shape[2] == b
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), atol=1e-9, rtol=0)


def test_a_language_model_learns_with_it_and_its_strengths_move():
    torch.manual_seed(2)
    model = TransformerLM(16, 16, 1, lambda layer: LocalLinearAttention(16, 2, solver="cg", cg_iters=4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = torch.randint(16, (4, 13))
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    mixer = model.blocks[0].mixer
    assert mixer.raw_reg.grad.all()
    logits, state = model.step(ids[:, :5], model.initial_state(ids))
    rest, _ = model.step(ids[:, 5:], state)
    torch.testing.assert_close(torch.cat([logits, rest], 1), model(ids), atol=1e-3, rtol=0)


def test_errors_name_the_argument():
    for arguments, says in (
        ({"heads": 5}, "got dim=32, heads=5, kv_heads=5"),
        ({"heads": 4, "kv_heads": 3}, "got dim=32, heads=4, kv_heads=3"),
        ({"heads": 4, "reg": 0.0}, r"reg must be > 0, got 0\.0"),
        ({"heads": 4, "solver": "lu"}, "solver must be one of dense, cg, got 'lu'"),
    ):
        with pytest.raises(ValueError, match=says):
            LocalLinearAttention(32, **arguments)
    with pytest.raises(ValueError, match="a state needs causal=True"):
        LocalLinearAttention(32, 4, causal=False).initial_state(torch.zeros(1, 1, 32))
