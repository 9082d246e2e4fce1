"""Titans' layer and blocks: written out token by token, causality, streaming, what is held, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from foveate.layers import NeuralMemory, TitansBlock, TransformerLM
from foveate.linear import MemoryState, memorise

MODES = ("lmm", "mag", "mal", "mac")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(mode, *, seed=0, **options):
    torch.manual_seed(seed)
    memory = options.pop("memory", None) or NeuralMemory(12, 2, chunk=5, max_step=0.5)
    made = TitansBlock(12, 3, mode, segment=7, window=6, memory=memory, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=torch.float64)
    return made


# --------------------------------------------------------------------------------------- references, one row
def projected(memory, x):
    """q, k, v, eta, theta, alpha of x (N, dim): (H, N, ...) each, convolution written out."""
    z = x @ memory.qkv_proj.weight.T
    if memory.conv is not None:
        taps = memory.conv.weight
        c = taps.shape[1]
        z = torch.stack(
            [sum(taps[:, c - 1 - i] * z[t - i] for i in range(c) if t >= i) for t in range(len(x))]
        )
    q, k, v = (F.silu(t).unflatten(-1, (memory.heads, -1)).transpose(0, 1) for t in z.chunk(3, -1))
    rates = torch.sigmoid(x @ memory.rates.weight.T + memory.rates.bias).T
    eta, theta, alpha = rates[2:4], memory.max_step * rates[:2], rates[4:]
    return q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v, eta, theta, alpha


def read_all(memory, x):
    """memory(x) of one row: (N, dim), and the states before every token and after the last."""
    y, states = [], [MemoryState.start(list(memory.theta_0), 1)]
    if not len(x):
        return x, states
    tensors = projected(memory, x)
    for t in range(len(x)):
        out, state = memorise(
            *(s[None, :, t : t + 1] for s in tensors),
            states[-1],
            chunk=memory.chunk,
            clip=memory.clip,
            activation=memory.activation,
        )
        y.append(out[0, :, 0].flatten())
        states.append(state)
    return torch.stack(y), states


def rms(norm, x):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def rotated(x, at):
    """(H, D) at a position."""
    half = x.shape[1] // 2
    t = at * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * t.cos() - b * t.sin(), a * t.sin() + b * t.cos()], 1)


def attended(made, query, keys):
    """query (token, position) over keys of the same form: softmax per head, (dim,)."""
    w = made.qkv_proj.weight.chunk(3)
    heads = lambda x, part: (w[part] @ x).view(made.heads, -1)  # noqa: E731
    q = rotated(heads(*query[:1], 0), query[1])
    k = torch.stack([rotated(heads(x, 1), at) for x, at in keys])  # (M, H, D)
    v = torch.stack([heads(x, 2) for x, _ in keys])
    p = torch.softmax((k * q).sum(-1) / q.shape[1] ** 0.5, 0)
    return (p[..., None] * v).sum(0).flatten()


def written_out(made, x):
    """The block on one row x (N, dim), token by token."""
    mode, memory, n = made.mode, made.memory, len(x)
    p = made.persistent if made.persistent is not None else x[:0]
    prefix = [(token, i) for i, token in enumerate(p)]
    if mode == "lmm":
        y = rms(made.memory_norm, read_all(memory, x)[0])
    elif mode == "mag":
        m, y = read_all(memory, x)[0], []
        for t in range(n):
            near = [(x[j], len(p) + j) for j in range(max(0, t - made.window + 1), t + 1)]
            y.append(attended(made, (x[t], len(p) + t), prefix + near))
        y = rms(made.attention_norm, torch.stack(y)) * torch.sigmoid(rms(made.memory_norm, m))
    elif mode == "mal":
        m = rms(made.memory_norm, read_all(memory, torch.cat([p, x]))[0])
        y = []
        for t in range(len(p), len(p) + n):
            near = [(m[j], j) for j in range(max(0, t - made.window + 1), t + 1)]
            y.append(attended(made, (m[t], t), near))
        y = torch.stack(y)
    else:
        y = x[:0]
        for first in range(0, n, made.segment):
            before = read_all(memory, y)[1][-1].weights  # after the rows of earlier segments
            s = x[first : first + made.segment]
            h = rms(made.read_norm, memory.read(s[None], before)[0])
            rows = []
            for t in range(len(s)):
                seen = [(z[j], len(p) + j) for z in (h, s) for j in range(t + 1)]
                rows.append(attended(made, (s[t], len(p) + t), prefix + seen))
            y = torch.cat([y, torch.stack(rows)])
        y = y * rms(made.memory_norm, read_all(memory, y)[0])
    return y @ made.o_proj.weight.T


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_block_written_out(mode, persistent):
    made, x = block(mode, persistent=persistent), normal(2, 17, 12)
    with torch.no_grad():
        torch.testing.assert_close(made(x)[1], written_out(made, x[1]), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("conv", [0, 3])
def test_the_memory_equals_its_reads_written_out(conv):
    torch.manual_seed(1)
    memory = NeuralMemory(12, 2, depth=1, chunk=4, conv=conv, activation="gelu").double()
    x = normal(1, 19, 12)
    torch.testing.assert_close(memory(x)[0], read_all(memory, x[0])[0], atol=1e-11, rtol=0)
    without = NeuralMemory(12, 2, chunk=4, conv=conv, momentum=False, forget=False).double()
    eta, theta, alpha = without._rates(x)
    assert not eta.any()
    assert not alpha.any()
    assert theta.all()
    assert without.rates.out_features == 2


# -------------------------------------------------------------------------------------------- causality
@pytest.mark.parametrize("mode", MODES)
def test_a_changed_token_changes_nothing_before_it(mode):
    made, x = block(mode), normal(1, 23, 12)
    with torch.no_grad():
        out = made(x)
        for t in (1, 4, 6, 7, 10, 15):  # within segments of 7 and at their starts
            other = x.clone()
            other[:, t] = normal(12, seed=t)
            changed = made(other)
            torch.testing.assert_close(changed[:, :t], out[:, :t], atol=1e-12, rtol=0)
            assert (changed[:, t:] - out[:, t:]).abs().amax(-1).min() > 1e-7  # and everything after it


def test_reading_the_memory_at_the_segments_end_would_leak():
    """What the DECISION forbids: the same gate read at the weights after the whole segment depends on later tokens."""
    made, x = block("mac"), normal(1, 7, 12)
    other = x.clone()
    other[:, 6] = normal(12, seed=9)
    with torch.no_grad():
        ends = [made(z, state=made.initial_state(z))[1].memory.memory.weights for z in (x, other)]
        assert (made.memory.read(x[:, :6], ends[0]) - made.memory.read(x[:, :6], ends[1])).abs().max() > 1e-4


# -------------------------------------------------------------------------------------------- streaming
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_any_pieces_give_what_one_call_gives(mode, persistent):
    made, x = block(mode, persistent=persistent), normal(2, 31, 12)
    with torch.no_grad():
        whole = made(x)
        for ends in (range(1, 32), (31,), (3, 4, 7, 24, 31), (14, 30, 31)):
            state, parts, begin = made.initial_state(x), [], 0
            for end in ends:
                out, state = made(x[:, begin:end], state=state)
                parts.append(out)
                begin = end
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)
            assert state.position == 31


@pytest.mark.parametrize("mode", MODES)
def test_what_is_held_does_not_grow(mode):
    made, x = block(mode, persistent=3), normal(1, 43, 12)
    with torch.no_grad():
        sizes = []
        state = made.initial_state(x)
        for t in range(43):
            state = made(x[:, t : t + 1], state=state)[1]
            sizes.append(state.nbytes)
    assert max(sizes[14:28]) == max(sizes[28:])
    tokens = {"lmm": None, "mag": 3 + 5, "mal": 5, "mac": 1}[mode]  # P and window - 1; a whole segment
    assert (None if state.k is None else state.k.shape[2]) == tokens


def test_in_a_language_model():
    torch.manual_seed(0)
    for mode in MODES:
        model = TransformerLM(20, 12, 2, lambda layer, m=mode: block(m, seed=layer).float())
        ids = torch.randint(20, (2, 11))
        logits = model(ids)
        logits.sum().backward()
        state, parts = model.initial_state(ids), []
        for piece in ids.split(3, 1):
            out, state = model.step(piece, state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), logits, atol=1e-4, rtol=1e-4)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16():
    made = block("mag").float()
    x = normal(1, 29, 12).float()
    want = made(x)
    low = made.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.float() - want).norm() < 0.1 * want.norm()


def test_a_memory_that_never_writes_forgets_only():
    torch.manual_seed(0)
    memory = NeuralMemory(12, 2, chunk=5, max_step=0.0, forget=False).double()
    x = normal(1, 13, 12)
    state = memory(x, state=memory.initial_state(x))[1].memory
    for w, first in zip(state.weights, memory.theta_0, strict=True):
        assert torch.equal(w[0], first)


# ----------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NeuralMemory(12, 5), "dim must be a multiple of heads, got 12 and 5"),
        (lambda: NeuralMemory(12, 2, depth=0), "depth must be an int >= 1, got 0"),
        (lambda: NeuralMemory(12, 2, chunk=2.0), "chunk must be an int >= 1, got 2.0"),
        (lambda: NeuralMemory(12, 2, max_step=-1), "max_step must be >= 0, got -1"),
        (lambda: TitansBlock(12, 3, "max"), "mode must be one of mac, mag, mal, lmm, got 'max'"),
        (lambda: TitansBlock(12, 5), "dim must be a multiple of heads, got 12 and 5"),
        (lambda: TitansBlock(12, 3, window=0), "window must be an int >= 1, got 0"),
        (lambda: TitansBlock(12, 3, persistent=-1), "persistent must be an int >= 0, got -1"),
        (lambda: TitansBlock(12, 3, memory=NeuralMemory(8)), "memory must have dim 12, got one with 8"),
    ],
)
def test_errors_name_the_argument(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_modules_differ_only_by_their_mode():
    counts = {mode: sum(p.numel() for p in block(mode, persistent=0).parameters()) for mode in MODES}
    assert counts["mag"] - counts["mal"] == counts["mac"] - counts["mal"] == 12
    assert counts["mal"] - counts["lmm"] == 3 * 12 * 12
