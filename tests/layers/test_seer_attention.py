"""SeerAttention: the gate, its target, its loss and its layouts against loops written from the paper's description."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import foveate as fv
from foveate.core.layout import BlockLayout
from foveate.layers import (
    BlockGate,
    SeerAttention,
    gate_layout,
    gate_loss,
    load_gates,
    pooled_attention_target,
    save_gates,
)
from foveate.layers.seer_attention import turned, unrotated
from foveate.patterns import Causal


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(heads=4, kv_heads=2, dim=6, block=5, width=6, seed=0, **settings: Any) -> BlockGate:
    torch.manual_seed(seed)
    return BlockGate(heads, kv_heads, dim, block, width, std=0.5, **settings).double()


def by_hand(gate, q, k):
    """Logits of one batch row by loops: pool, map, rotate, multiply."""
    c, d = gate.block, gate.width
    n, m = q.shape[1], k.shape[1]
    groups = gate.heads // gate.kv_heads
    pools = {"max": lambda x: x.max(0).values, "min": lambda x: x.min(0).values, "avg": lambda x: x.mean(0)}

    def rotated(x, place):
        if gate.theta is None:
            return x
        out = x.clone()
        for i in range(d // 2):
            angle = place * gate.theta ** (-2 * i / d)
            a, b = x[i], x[i + d // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    out = torch.full((gate.heads, -(-n // c), -(-m // c)), -torch.inf, dtype=torch.float64)
    for h in range(gate.heads):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                if j * c > min((i + 1) * c, n) - 1 + m - n:
                    continue
                query = torch.cat([pools[p](q[h, i * c : i * c + c]) for p in gate.q_pool])
                key = torch.cat([pools[p](k[h // groups, j * c : j * c + c]) for p in gate.k_pool])
                if gate.mask_linear_q is None:
                    key = key @ gate.mask_linear_k.weight[h]
                else:
                    query = query @ gate.mask_linear_q.weight[h]
                    key = key @ gate.mask_linear_k.weight[h // groups]
                out[h, i, j] = rotated(query, m - n + i * c) @ rotated(key, j * c) / math.sqrt(d)
    return out


# -------------------------------------------------------------------------------------------------------- the gate
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"width": 4},
        {"width": 8, "q_pool": ("avg", "max"), "k_pool": ("max", "min")},
        {"theta": None, "width": 3, "k_pool": ("avg",)},
        {"heads": 2, "kv_heads": 2},
        {"heads": 4, "kv_heads": 1, "theta": 50.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("n", "m"), [(23, 23), (3, 3), (8, 23), (20, 20)])
def test_the_gate_is_the_formula(settings, n, m):
    gate = make(**settings)
    q, k = normal(2, gate.heads, n, 6), normal(2, gate.kv_heads, m, 6, seed=1)
    got = gate(q, k)
    for b in range(2):
        torch.testing.assert_close(got[b].detach(), by_hand(gate, q[b], k[b]).detach())


def test_the_paper_s_default_has_no_query_matrix():
    gate = BlockGate(8, 2, 128)
    assert gate.mask_linear_q is None
    assert gate.mask_linear_k.weight.shape == (8, 384, 128)
    two = BlockGate(8, 2, 64)
    assert two.mask_linear_q is not None
    assert two.mask_linear_q.weight.shape == (8, 64, 128)
    assert two.mask_linear_k.weight.shape == (2, 192, 128)
    torch.manual_seed(0)
    assert abs(float(BlockGate(8, 2, 128).mask_linear_k.weight.detach().std()) - 0.02) < 1e-3


def test_a_logit_depends_on_its_two_blocks_only():
    gate = make(block=4)
    q, k = normal(1, 4, 22, 6), normal(1, 2, 22, 6, seed=1)
    before = gate(q, k)
    for i, j in ((5, 2), (3, 3), (4, 0)):
        other_q, other_k = normal(1, 4, 22, 6, seed=2), normal(1, 2, 22, 6, seed=3)
        other_q[:, :, 4 * i : 4 * i + 4] = q[:, :, 4 * i : 4 * i + 4]
        other_k[:, :, 4 * j : 4 * j + 4] = k[:, :, 4 * j : 4 * j + 4]
        after = gate(other_q, other_k)
        assert torch.equal(after[:, :, i, j], before[:, :, i, j])
        assert not torch.isclose(after, before)[torch.isfinite(before)].all()


def test_a_chunk_of_a_prompt_has_the_logits_of_its_rows():
    gate = make(block=4)
    q, k = normal(1, 4, 30, 6), normal(1, 2, 30, 6, seed=1)
    torch.testing.assert_close(gate(q[:, :, 16:], k), gate(q, k)[:, :, 4:])


def test_gate_errors():
    wrong: dict[str, Any]
    for wrong, message in (
        ({"heads": 3}, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"block": 0}, "block must be an int >= 1, got 0"),
        ({"width": 5}, "width even for it, got 10000.0 and 5"),
        ({"k_pool": ("max", "sum")}, "k_pool must be different names out of max, min, avg"),
        ({"q_pool": ("avg", "avg")}, "q_pool must be different names"),
        ({"k_pool": "max"}, "k_pool must be different names"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**wrong)
    gate = make()
    with pytest.raises(ValueError, match=r"q must have shape \(batch, 4, tokens, 6\), got \(1, 2, 9, 6\)"):
        gate(normal(1, 2, 9, 6), normal(1, 2, 9, 6))
    with pytest.raises(
        ValueError, match="9 queries and 11 keys; accepted: equal lengths, or more keys by a multiple"
    ):
        gate(normal(1, 4, 9, 6), normal(1, 2, 11, 6))


# --------------------------------------------------------------------------------------------- target and loss
@pytest.mark.parametrize(("n", "block"), [(23, 5), (64, 16), (7, 64), (75, 1)])
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_the_target_is_the_pooled_map(n, block, reduce):
    q, k = 3 * normal(2, 4, n, 6), normal(2, 2, n, 6, seed=1)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 6**0.5
    p = torch.softmax(logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf), -1)
    blocks = -(-n // block)
    want = torch.zeros(2, 4, blocks, blocks, dtype=torch.float64)
    for i in range(blocks):
        for j in range(blocks):
            piece = p[:, :, i * block : i * block + block, j * block : j * block + block].flatten(2)
            want[:, :, i, j] = piece.amax(-1) if reduce == "max" else piece.sum(-1)
    raw = pooled_attention_target(q, k, block, reduce=reduce, normalize=False)
    torch.testing.assert_close(raw, want)
    got = pooled_attention_target(q, k, block, reduce=reduce)
    torch.testing.assert_close(got, want / want.sum(-1, keepdim=True))
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 4, blocks, dtype=torch.float64))
    assert (got.triu(1) == 0).all()


def case(blocks=8, seed=0):
    """(logits with hidden blocks, a target)"""
    hidden = torch.ones(blocks, blocks, dtype=torch.bool).triu(1)
    logits = normal(2, 3, blocks, blocks, seed=seed).masked_fill(hidden, -torch.inf)
    target = torch.softmax(normal(2, 3, blocks, blocks, seed=seed + 1).masked_fill(hidden, -torch.inf), -1)
    return logits, target


def test_the_loss_is_the_mean_of_kl_over_all_elements():
    logits, target = case()
    gate = torch.softmax(logits, -1)
    total = 0.0
    for row in range(2, 8):  # the first quarter of 8 is left out
        for column in range(row + 1):
            t, g = target[:, :, row, column], gate[:, :, row, column]
            total += float((t * (t / g).log()).sum())
    assert gate_loss(logits, target).item() == pytest.approx(total / (2 * 3 * 6 * 8))
    assert gate_loss(logits, target, 0.0).item() != pytest.approx(total / (2 * 3 * 6 * 8))


def test_the_loss_is_least_where_the_gate_is_the_target():
    logits, target = case()
    assert gate_loss(target.log(), target, 0.0).abs() < 1e-15
    assert gate_loss(target.log() + 3.0, target, 0.0).abs() < 1e-15  # the same softmax
    visible = torch.isfinite(logits)
    for seed in range(5):
        nearby = torch.where(visible, target.log() + 0.01 * normal(*target.shape, seed=seed), -torch.inf)
        assert gate_loss(nearby, target, 0.0) > 1e-9


def test_the_loss_has_finite_gradients_only_where_blocks_are_seen():
    logits, target = case()
    target = torch.where(target < 0.1, 0.0, target)  # zeros among the seen blocks too
    logits.requires_grad_()
    gate_loss(logits, target / target.sum(-1, keepdim=True)).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[..., :2, :] == 0).all()
    assert (logits.grad.triu(1) == 0).all()
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(2, 3, 8, dtype=torch.float64))


def test_loss_falls_on_a_fixed_batch():
    gate = make(block=8)
    q, k = normal(1, 4, 100, 6), normal(1, 2, 100, 6, seed=1)
    target = pooled_attention_target(2 * q, k, 8)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(30):
        loss = gate_loss(gate(q, k), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(ValueError, match="one shape"):
        gate_loss(gate(q, k), target[:, :1])
    with pytest.raises(ValueError, match=r"drop_first must lie in \[0, 1\), got 1"):
        gate_loss(gate(q, k), target, 1)


# ------------------------------------------------------------------------------------------------------- layouts
def logits_of(blocks, heads=3, rows=None, seed=0):
    rows = blocks if rows is None else rows
    hidden = torch.arange(blocks) > torch.arange(rows)[:, None] + blocks - rows
    return (2 * normal(1, heads, rows, blocks, seed=seed)).masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize(("n", "m", "block"), [(300, 300, 64), (320, 320, 64), (172, 300, 128), (1, 65, 64)])
def test_the_limits_are_causal_attention(n, m, block):
    logits = logits_of(-(-m // block), rows=-(-n // block))
    whole = Causal().layout(n, m)
    for method, value in (("threshold", -1.0), ("ratio", 1.0), ("mass", 1.0)):
        found = gate_layout(logits, n, m, block=block, method=method, value=value, dense_last=0)
        assert torch.equal(found.to_dense()[:, :1], whole.to_dense())
        q, k = normal(1, 3, n, 8), normal(1, 3, m, 8, seed=1)
        torch.testing.assert_close(fv.attention(q, k, k, found), fv.attention(q, k, k, is_causal=True))


@pytest.mark.parametrize("method", ["threshold", "ratio", "mass"])
@pytest.mark.parametrize("value", [0.05, 0.3, 0.9])
@pytest.mark.parametrize(("n", "m", "dense_last"), [(700, 700, 0), (700, 700, 2), (188, 700, 1)])
def test_the_kept_blocks_are_the_rule_s(method, value, n, m, dense_last):
    rows, blocks = -(-n // 64), -(-m // 64)
    logits = logits_of(blocks, rows=rows)
    layout = gate_layout(logits, n, m, method=method, value=value, dense_last=dense_last)
    gate = torch.softmax(logits.float(), -1)
    want = torch.zeros(1, 3, rows, blocks, dtype=torch.bool)
    for h in range(3):
        for i in range(rows):
            own = i + blocks - rows
            row = gate[0, h, i].tolist()
            order = sorted(range(own + 1), key=lambda j, row=row: -row[j])
            if method == "threshold":
                kept = {j for j in range(own + 1) if row[j] > value}
            elif method == "ratio":
                forced = sorted({0, own})
                count = round((1 - math.sqrt(1 - value)) * blocks)
                kept = set((forced + [j for j in order if j not in forced])[:count])
            else:
                kept, mass = set(), 0.0
                for j in order:
                    if mass >= value:
                        break
                    kept.add(j)
                    mass += row[j]
            if i >= rows - dense_last:
                kept = set(range(own + 1))
            for j in kept | {0, own}:
                want[0, h, i, j] = True
    assert layout == BlockLayout.from_blocks(want, n, m, causal=True)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.5, 0.8])
def test_ratio_is_the_causal_density(ratio):
    n = 64 * 100
    layout = gate_layout(logits_of(100, heads=1), n, n, method="ratio", value=ratio, dense_last=0)
    assert layout.area / (n * (n + 1) / 2) == pytest.approx(
        ratio, abs=0.016
    )  # half a block per row, half a diagonal


def test_layout_errors():
    logits = logits_of(4)
    wrong: dict[str, Any]
    for wrong, message in (
        ({"method": "best"}, "method must be one of threshold, ratio, mass; got 'best'"),
        ({"method": "ratio", "value": 0.0}, "value 0.0 of ratio; accepted: 0 < value <= 1"),
        ({"value": math.nan}, "value nan of threshold; accepted: a finite number"),
        ({"dense_last": -1}, "dense_last must be an int >= 0, got -1"),
        ({"block": 60}, "block 60 for 256 queries and 256 keys; accepted: a multiple of 64"),
        ({"block": 128}, r"logits must have shape \(batch, heads, 2, 2\), got \(1, 3, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            gate_layout(logits, 256, 256, **wrong)


# ------------------------------------------------------------------------------------------------------ selector
def tables(theta=100.0, width=8):
    def rotary(x, positions):
        rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = (positions[..., None] * rates).repeat(1, 1, 2)
        return 1.5 * angle.cos(), 1.5 * angle.sin()  # with an attention factor

    return rotary


def rotate(x, rotary, first=0):
    cos, sin = rotary(x, torch.arange(first, first + x.shape[2])[None])
    turn, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turn * cos + turned(turn) * sin, rest], -1)


@pytest.mark.parametrize("width", [8, 4])
def test_the_rotation_is_undone(width):
    x, rotary = normal(2, 3, 11, 8), tables(width=width)
    torch.testing.assert_close(unrotated(rotate(x, rotary, 5), rotary, 5), x)
    assert not torch.allclose(unrotated(rotate(x, rotary, 5), rotary, 4), x)


def test_the_selector_is_its_gate_before_the_rotation():
    torch.manual_seed(0)
    gate, rotary = BlockGate(4, 2, 8, 64, 8, std=1.0).double(), tables()
    q, k = normal(1, 4, 500, 8), normal(1, 2, 500, 8, seed=1)
    plain = SeerAttention(gate, method="ratio", value=0.7)
    want = gate_layout(gate(q, k), 500, 500, method="ratio", value=0.7)
    assert plain.layout(q, k) == want
    turned_back = SeerAttention(gate, method="ratio", value=0.7, rotary=rotary)
    assert turned_back.layout(rotate(q, rotary), rotate(k, rotary)) == want
    assert turned_back.layout(q, k) != want
    chunk = turned_back.layout(rotate(q, rotary)[:, :, 256:], rotate(k, rotary))
    assert torch.equal(chunk.to_dense(), want.to_dense()[:, :, 256:])
    assert plain.layout(q[:, :, -1:], k).area == 500
    torch.testing.assert_close(
        fv.attention(q, k, k, plain, is_causal=True), fv.attention(q, k, k, want), atol=1e-12, rtol=0
    )


def test_every_layer_has_its_gate():
    torch.manual_seed(0)
    gates = {layer: BlockGate(2, 2, 8, 64, 8, std=1.0) for layer in (0, 2)}
    q, k = normal(1, 2, 400, 8).float(), normal(1, 2, 400, 8, seed=1).float()
    seer = SeerAttention(gates, method="ratio", value=0.7, dense_last=0)
    assert seer.at_layer(0).layout(q, k) == SeerAttention(gates[0], "ratio", 0.7, 0).layout(q, k)
    assert seer.at_layer(0).layout(q, k) != seer.at_layer(2).layout(q, k)
    assert seer.at_layer(1).layout(q, k).area == 400 * 401 / 2  # no gate: dense
    with pytest.raises(ValueError, match=r"gates of layers \[0, 2\]; say which with .at_layer"):
        seer.layout(q, k)
    with pytest.raises(ValueError, match="got is_causal=False, accepted is True"):
        seer.at_layer(0).layout(q, k, is_causal=False)
    with pytest.raises(TypeError, match="must be a BlockGate or a mapping"):
        SeerAttention({})
    with pytest.raises(ValueError, match="block is a multiple of 64, got 16"):
        SeerAttention(BlockGate(2, 2, 8, 16, 8))


# --------------------------------------------------------------------------------------------------------- files
def test_gates_are_written_and_read(tmp_path):
    gates = {layer: make(seed=layer, width=4).float() for layer in (0, 3)}
    path = tmp_path / "gates.safetensors"
    save_gates(gates, path)
    found = load_gates(path)
    assert sorted(found) == [0, 3]
    q, k = normal(1, 4, 12, 6).float(), normal(1, 2, 12, 6, seed=1).float()
    for layer, gate in gates.items():
        assert found[layer].settings() == gate.settings()
        assert not found[layer].training
        assert torch.equal(found[layer](q, k), gate(q, k))


def test_published_gates_are_read_by_name(tmp_path):
    weights = {
        f"model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight": torch.randn(4, 18, 6).bfloat16()
        for i in (0, 1)
    }
    path = tmp_path / "attn_gate_weights.pth"
    torch.save(weights, path)
    found = load_gates(path, lambda: BlockGate(4, 2, 6, 64, 6))
    for i in (0, 1):
        assert torch.equal(
            found[i].mask_linear_k.weight,
            weights[f"model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight"].float(),
        )
    with pytest.raises(ValueError, match="does not say the gates' settings; pass make="):
        load_gates(path)
    with pytest.raises(ValueError, match="layer 0 does not fit"):
        load_gates(path, lambda: BlockGate(4, 2, 6, 64, 8))
    torch.save({**weights, "model.norm.weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not a weight of a gate"):
        load_gates(path, lambda: BlockGate(4, 2, 6, 64, 6))
    with pytest.raises(ValueError, match="no gates"):
        save_gates({}, path)
