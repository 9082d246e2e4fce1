"""What a policy executes, against an independent dense oracle; selection of layers, heads and phases;
densities."""

from __future__ import annotations

from dataclasses import dataclass

import families
import pytest
import torch
from oracle import oracle

import foveate as fv
from foveate.core.patterns import Pattern
from foveate.patterns import Causal, Dilated, GlobalTokens, Sinks, SlidingWindow, Strided

N = families.LENGTH

POLICIES = {
    "window": (SlidingWindow(8), lambda i, j: (i - j < 8) & (j <= i)),
    "sinks": (SlidingWindow(4) | Sinks(2), lambda i, j: ((i - j < 4) & (j <= i)) | (j < 2)),
    "dilated": (Dilated(4, 3), lambda i, j: ((i - j) % 3 == 0) & (i - j < 12) & (j <= i)),
    "strided": (SlidingWindow(2) | (Causal() & Strided(5)), lambda i, j: (i - j < 2) | ((i - j) % 5 == 0)),
    "global": (
        GlobalTokens([0, 3]) | SlidingWindow(3),
        lambda i, j: (i == 0) | (i == 3) | (j == 0) | (j == 3) | (i - j < 3),
    ),
    "not": (~Sinks(1) | SlidingWindow(1), lambda i, j: (j >= 1) | (i == j)),
}


def compare(name, given, policy, rule, **selection):
    model = families.model(name)
    with oracle(model, rule, **selection):
        expected = families.outputs(model, given)
    with fv.hf.apply(model, policy, **selection) as handle:
        ours = families.outputs(model, given)
    keep = families.real(given, expected)
    assert (expected - ours).abs()[keep].max() <= 1e-5
    return handle.report()


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("which", POLICIES)
def test_policy_equals_the_oracle(which, padded):
    policy, rule = POLICIES[which]
    if which == "global" and padded:
        rule_length = 9  # the shortest row keeps positions 0..8
        assert rule_length > 3
    report = compare("llama", families.inputs("llama", padded), policy, rule)
    assert 0 < report.density < 1


@pytest.mark.parametrize("name", ["mistral", "qwen3", "phi3", "gpt_neox", "gpt2", "opt"])
def test_policy_on_other_families(name):
    policy, rule = POLICIES["sinks"]
    compare(name, families.inputs(name, padded=True), policy, rule)


@pytest.mark.parametrize("layers", [[0], [1], range(2)])
def test_layers(layers):
    policy, rule = POLICIES["window"]
    report = compare("llama", families.inputs("llama"), policy, rule, layers=list(layers))
    for layer in report.layers:
        assert layer.restricted == (layer.layer in layers)
        assert (layer.density < 1) == (layer.layer in layers)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("heads", [[0], [1, 2], [3]])
def test_heads(heads, padded):
    policy, rule = POLICIES["sinks"]
    compare("llama", families.inputs("llama", padded), policy, rule, heads=heads, layers=[1])


def test_one_pattern_per_head():
    policy = (SlidingWindow(2), SlidingWindow(4), SlidingWindow(8), SlidingWindow(16))
    report = compare("llama", families.inputs("llama"), policy, _per_head)
    pairs = sum(min(i + 1, w) for w in (2, 4, 8, 16) for i in range(N))
    assert report.density == pytest.approx(pairs / (4 * N * (N + 1) / 2))


def _per_head(i, j):
    widths = torch.tensor([2, 4, 8, 16])[None, :, None, None]
    return i - j < widths


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
@pytest.mark.parametrize("which", ["window", "sinks"])
def test_phases_in_generate(which, phase):
    policy, rule = POLICIES[which]
    model, given = families.model("llama"), families.inputs("llama", padded=True)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with oracle(model, rule, phase=phase):
        expected = model.generate(**given, **options)
    with fv.hf.apply(model, policy, phase=phase) as handle:
        ours = model.generate(**given, **options)
    assert torch.equal(expected.sequences, ours.sequences)
    assert (torch.stack(expected.logits) - torch.stack(ours.logits)).abs().max() <= 1e-5
    for layer in handle.report().layers:
        assert layer.calls == 8
        assert layer.restricted == {"prefill": 1, "decode": 7, "both": 8}[phase]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 6},
        {"use_cache": False},
        {"num_beams": 2},
    ],
    ids=lambda o: "-".join(o) or "dynamic",
)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_every_cache_executes_the_same_policy(name, options):
    """Absolute and relative parts of a policy mean the same whatever the cache keeps (Mistral's drops old
    keys)."""
    policy, rule = POLICIES["sinks"]
    model, given = families.model(name), families.inputs(name, padded=True)
    options = {"max_new_tokens": 10, "output_logits": True, "return_dict_in_generate": True, **options}
    with oracle(model, rule):
        expected = model.generate(**given, **options, do_sample=False)
    with fv.hf.apply(model, policy):
        ours = model.generate(**given, **options, do_sample=False)
    assert torch.equal(expected.sequences, ours.sequences)
    assert (torch.stack(expected.logits) - torch.stack(ours.logits)).abs().max() <= 1e-5


@dataclass(frozen=True)
class Square(Pattern):
    """A pattern that lives on equal lengths only, such as the grids of images."""

    def check(self, ext):
        if ext.q_len != ext.k_len:
            raise ValueError(f"square only, got {ext}")

    def contains(self, ext, b, h, q, k):
        return (q + k) % 3 > 0


def test_a_padded_prefill_looks_like_an_unpadded_one():
    report = compare("llama", families.inputs("llama", padded=True), Square(), lambda i, j: (i + j) % 3 > 0)
    assert 0.5 < report.density < 0.8


@pytest.mark.parametrize("which", POLICIES)
def test_decoding_equals_one_forward(which):
    """Token by token through the cache gives the logits of one long forward under the same policy."""
    if which == "global":
        pytest.skip("a global query sees later keys: not a causal policy, so decoding differs by definition")
    policy, _ = POLICIES[which]
    model, ids = families.model("llama"), families.inputs("llama")["input_ids"]
    with fv.hf.apply(model, policy), torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :9], use_cache=True)
        steps = [out.logits]
        for t in range(9, N):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("which", POLICIES)
def test_a_padded_row_equals_the_row_alone(which):
    """Left padding must not become sinks, nor shift blocks: positions count from the first real token."""
    policy, _ = POLICIES[which]
    model, given = families.model("llama"), families.inputs("llama", padded=True)
    mask = given["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with fv.hf.apply(model, policy), torch.no_grad():
        together = model(**given, position_ids=positions).logits
        for row in range(len(mask)):
            real = mask[row].bool()
            alone = model(given["input_ids"][row : row + 1, real]).logits
            assert (together[row, real] - alone[0]).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------- selectors
@dataclass(frozen=True)
class Similar(fv.selectors.Selector):
    """Keys whose product with the query is positive, and the query's own: content based, element-wise,
    exact."""

    def layout(self, q, k, *, scale=None, is_causal=True):
        n, m = q.shape[2], k.shape[2]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        seen = q @ k.transpose(-1, -2) > 0
        own = torch.arange(n)[:, None] + (m - n) == torch.arange(m)[None]
        before = torch.arange(m)[None] <= torch.arange(n)[:, None] + (m - n)
        return fv.BlockLayout.from_mask((seen | own) & (before if is_causal else True))


def test_selector_runs_per_layer_and_ignores_padding():
    model, given = families.model("llama"), families.inputs("llama", padded=True)
    mask = given["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with fv.hf.apply(model, Similar()) as handle, torch.no_grad():
        together = model(**given, position_ids=positions).logits
        density = handle.report().density
        for row in range(len(mask)):
            real = mask[row].bool()
            alone = model(given["input_ids"][row : row + 1, real]).logits
            assert (together[row, real] - alone[0]).abs().max() <= 1e-5
    assert 0.3 < density < 0.9


def test_selector_on_some_heads():
    model, given = families.model("llama"), families.inputs("llama")
    with fv.hf.apply(model, Similar(), heads=[1], layers=[0]) as handle:
        families.outputs(model, given)
    first, second = handle.report().layers
    assert 0.8 < first.density < 1.0  # one head of four
    assert second.density == 1.0


def test_selector_in_decode_and_prefill():
    model, given = families.model("llama"), families.inputs("llama")
    with fv.hf.apply(model, Similar()) as handle:
        model.generate(**given, max_new_tokens=4, do_sample=False)
    assert handle.report().layers[0].restricted == 4


# ------------------------------------------------------------------------------------- report
def test_report_density_by_hand():
    model, given = families.model("llama"), families.inputs("llama", batch=2)
    with fv.hf.apply(model, SlidingWindow(4)) as handle:
        families.outputs(model, given)
        report = handle.report()
    own, window = N * (N + 1) / 2, 4 * N - 6
    assert report.density == window / own
    for layer in report.layers:
        assert (layer.calls, layer.tokens) == (1, 2 * N)
        assert layer.area == window * 2 * 4
        assert layer.rule_area == own * 2 * 4
        assert layer.nbytes == fv.patterns.SlidingWindow(4).layout(N).nbytes
    text = str(report)
    assert "SlidingWindow(4)" in text
    assert f"{window / own:.4f}" in text
    assert "model.layers.1.self_attn" in text


def test_report_counts_decoding_against_the_models_own_rule():
    model, given = families.model("llama"), families.inputs("llama", batch=1)
    with fv.hf.apply(model, SlidingWindow(4), phase="decode") as handle:
        model.generate(**given, max_new_tokens=4, do_sample=False)
    own = N * (N + 1) / 2 + sum(N + t for t in (1, 2, 3))
    assert handle.report().density == pytest.approx((N * (N + 1) / 2 + 3 * 4) / own)


def test_report_with_a_windowed_model():
    """Mistral's own window is 6: a policy of 3 keys is measured against it, not against causal."""
    model, given = families.model("mistral"), families.inputs("mistral", batch=1)
    with fv.hf.apply(model, SlidingWindow(3)) as handle:
        families.outputs(model, given)
    assert handle.report().density == pytest.approx((3 * N - 3) / (6 * N - 15))


def test_reset():
    model, given = families.model("llama"), families.inputs("llama")
    with fv.hf.apply(model, SlidingWindow(4)) as handle:
        families.outputs(model, given)
        handle.reset()
        assert handle.report().layers[0].calls == 0
        families.outputs(model, given)
        assert handle.report().layers[0].calls == 1


# --------------------------------------------------------------------------------- encoder-decoder, encoders
def test_encoder_decoder_restricts_self_attention_only():
    model, given = families.model("bart"), families.inputs("bart", padded=True)
    with fv.hf.apply(model, SlidingWindow(3), layers=[1]) as handle:
        families.outputs(model, given)
    for layer in handle.report().layers:
        assert layer.restricted == (layer.kind == "self" and layer.layer == 1), layer
    kinds = [layer.kind for layer in handle.report().layers]
    assert kinds.count("cross") == 2


def test_symmetric_window_on_an_encoder():
    model, given = families.model("bert"), families.inputs("bert", padded=True)
    policy = fv.patterns.SlidingWindow.symmetric(5)
    own = model.config._attn_implementation
    with fv.hf.apply(model, policy) as handle:
        ours = families.outputs(model, given)
    n = given["input_ids"].shape[1]
    near = (torch.arange(n)[:, None] - torch.arange(n)[None]).abs() <= 2
    four = near[None, None] & given["attention_mask"].bool()[:, None, None, :]
    additive = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    expected = families.outputs(model, {**given, "attention_mask": additive})
    # a row whose window holds only padding sees nothing here; eager spreads it over everything
    keep = given["attention_mask"].bool()
    assert model.config._attn_implementation == own
    assert (expected - ours).abs()[keep].max() <= 1e-5
    assert handle.report().density < 0.5


# ------------------------------------------------------------------------------------------- FlexPrefill
def test_flexprefill_with_its_full_budget_is_dense():
    model, given = families.model("llama"), families.inputs("llama", padded=True, length=120)
    eager = families.outputs(model, given)
    with fv.hf.apply(model, fv.selectors.FlexPrefill(block=64, gamma=1.5, min_budget=1024)) as handle:
        ours = families.outputs(model, given)
    assert handle.report().density == 1.0
    assert (eager - ours).abs()[families.real(given, eager)].max() <= 1e-5


def test_flexprefill_selects_and_decoding_stays_dense():
    model, ids = families.model("llama"), families.inputs("llama", length=380, batch=2)["input_ids"]
    with fv.hf.apply(
        model, fv.selectors.FlexPrefill(block=64, gamma=0.3, min_budget=64), phase="prefill"
    ) as handle:
        model.generate(ids, max_new_tokens=3, do_sample=False)
    first = handle.report().layers[0]
    assert 0.1 < first.density < 0.95
    assert (first.calls, first.restricted) == (3, 1)
