"""The common suite itself: good objects pass all of it, and every check catches an object that is broken."""

from __future__ import annotations

import broken_operators as ops
import broken_sets as sets
import pytest
import torch

import foveate as fv
from foveate.catalogue import vocabulary as words
from foveate.catalogue.conformance import FUNCTIONS, SLOW, Step, checks_for, checks_of_object
from foveate.catalogue.conformance.subject import make, value
from foveate.catalogue.entry import Cost, from_dict
from foveate.core.normalizers import Sigmoid, SoftmaxPlusOne
from foveate.core.scores import ALiBi, RelativeBias, SoftCap, T5Bias, Temperature
from foveate.patterns import Causal, Neighborhood, PowerOfTwo, Shards, Sinks, SlidingWindow
from foveate.selectors import FlexPrefill

ALL = tuple(words.CHECKED)


def bound(operator, **arguments):
    """A maker of an operator that is a function."""
    return lambda: lambda q, k, v: operator(q, k, v, **arguments)


def steps(maker, use, tags=(), **check) -> list[Step]:
    return checks_of_object(maker, use, tags, **check)


# ------------------------------------------------------------------------------------------------ good objects
GOOD = {
    "band": (sets.Band, "pattern", ("causal", "shift-equivariant"), {
        "arguments": {"width": 9}, "limits": ({"arguments": {"width": 131}, "equals": "causal"},)}),
    "window": (SlidingWindow, "pattern", ("shift-equivariant",), {"arguments": {"before": 8, "after": 5}}),
    "expression": (lambda: Causal() & (SlidingWindow(9) | Sinks(2)), "pattern", ("causal",), {}),
    "per head": (lambda: Causal() & (SlidingWindow(9), Sinks(2), SlidingWindow(3)), "pattern", ("causal",), {}),
    "neighbourhood": (Neighborhood, "pattern", ("shift-equivariant",), {
        "arguments": {"shape": (11, 13), "window": (5, 3), "dilation": 2, "order": "hilbert"}, "tokens": 143,
        "limits": ({"arguments": {"window": (11, 13), "dilation": 1}, "equals": "full"},)}),
    "power of two": (PowerOfTwo, "pattern", ("causal",), {"arguments": {"block": 8}}),
    "shards": (Shards, "pattern", ("causal",), {
        "arguments": {"block": 8, "local_blocks": 1, "stride": 2, "layouts": 2},
        "limits": ({"arguments": {"stride": 1, "layouts": 1}, "equals": "causal"},)}),
    "strongest": (sets.Strongest, "selector", ("causal",), {"tokens": 331}),
    "flexprefill": (FlexPrefill, "selector", ("causal",), {
        "arguments": {"block": 64, "min_budget": 64}, "tokens": 331,
        "limits": ({"arguments": {"gamma": 1.01}, "equals": "causal"},)}),
    "alibi": (lambda: ALiBi(torch.tensor([0.5, 0.25])), "score", (), {}),
    "soft-cap": (lambda: SoftCap(2.0), "score", (), {}),
    "temperature": (lambda: Temperature(value({"normal": [2, 131]})), "score", (), {}),
    "relative": (lambda: RelativeBias(value({"normal": [2, 21, 25]}), (11, 13)), "score", (), {"tokens": 143}),
    "t5": (lambda: T5Bias(value({"normal": [32, 2]}), True), "score", (), {}),
    "sigmoid": (lambda: Sigmoid(-2.0), "normalizer", (), {}),
    "softmax plus one": (SoftmaxPlusOne, "normalizer", (), {}),
    "softmax": (bound(ops.softmax), "operator", ("cross", "permutation-equivariant"), {}),
    "causal softmax": (bound(ops.softmax, causal=True), "operator", ("causal",), {}),
    "softmax limits": (lambda causal: lambda q, k, v: ops.softmax(q, k, v, causal=causal), "operator", ("causal",), {
        "arguments": {"causal": True}, "limits": ({"arguments": {"causal": False}, "equals": "full"},
                                                  {"arguments": {"causal": True}, "equals": "causal"})}),
    "linear": (ops.Linear, "operator", ("causal", "stateful"), {}),
    "mixer": (ops.Mixer, "layer", ("causal", "stateful"), {
        "cost": Cost(parameters="4*C*C + C"), "symbols": {"C": 32}}),
    "encoder": (lambda: ops.Mixer(causal=False), "layer", ("permutation-equivariant",), {}),
    "gate": (ops.Gate, "gate", (), {"cost": Cost(parameters="C*C + 3*C"), "symbols": {"C": 32}}),
    "map": (ops.Local, "map", (), {"cost": Cost(parameters="10*C"), "symbols": {"C": 32}, "grid": (7, 5)}),
    "backbone": (ops.Pyramid, "backbone", (), {"grid": (20, 24)}),
    "plain gate": (lambda: torch.nn.Conv2d(32, 32, 1), "gate", (), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_objects_pass(name):
    maker, use, tags, check = GOOD[name]
    for step in steps(maker, use, tags, **check):
        if not step.slow:
            step()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["band", "strongest", "soft-cap", "softmax plus one"])
def test_good_objects_pass_flex(name):
    maker, use, tags, check = GOOD[name]
    for step in steps(maker, use, tags, **check):
        if step.slow:
            step()


# ---------------------------------------------------------------------------------------------- broken objects
EAGER = (lambda: sets.EagerBand(9), {})
LIMIT = {"limits": ({"arguments": {"width": 130}, "equals": "causal"},), "arguments": {"width": 9}}
BROKEN = [  # (interface, check, what the message must say, maker, fields of the check)
    ("pattern", "layout_is_contains", "disagree at", *EAGER),
    ("pattern", "layout_is_contains", "disagree at", lambda: sets.LazyBand(9), {}),
    ("pattern", "classification", "classify.. says FULL", *EAGER),
    ("pattern", "classification", "classify.. says EMPTY", lambda: sets.LazyBand(9), {}),
    ("pattern", "equality", "not equal", lambda: sets.Unequal(9), {}),
    ("pattern", "equality", "evaluates to another", lambda: sets.Mumbling(9), {}),
    ("pattern", "engines_forward", "out exceeds its error budget", *EAGER),
    ("pattern", "engines_gradients", "the gradient of", *EAGER),
    ("pattern", "unseen_rows", "lse|out", *EAGER),
    ("pattern", "masked_nan", "out", *EAGER),
    ("pattern", "grouped_heads", "out exceeds", *EAGER),
    ("pattern", "strides", "out exceeds", *EAGER),
    ("pattern", "batch_rows", "out exceeds", *EAGER),
    ("pattern", "no_later_key", r"sees a later key at .*\(0, 0, 0, 1\)", lambda: sets.Ahead(9), {}),
    ("pattern", "prefix_causality", "tokens from 2 on change", lambda: sets.Ahead(9), {}),
    ("pattern", "prefix_causality", "the set on 2 tokens is not", sets.Stretching, {}),
    ("pattern", "shift", "moved along", sets.Blocks, {}),
    ("pattern", "shift", "as much room", Causal, {}),
    ("pattern", "limits", "is not causal attention", sets.Band, LIMIT),
    ("selector", "valid_layout", "is for 330 x 330", sets.Misfit, {}),
    ("selector", "valid_layout", "not canonical", sets.Untidy, {}),
    ("selector", "deterministic", "two layouts", sets.Fickle, {}),
    ("selector", "inputs_unchanged", "wrote into q", sets.Scribbling, {}),
    ("selector", "batch_rows", "batch row 1 alone", sets.Voting, {}),
    ("selector", "strides", "strided q and k", sets.Raw, {}),
    ("selector", "engines_forward", "exceeds its error budget", sets.Fickle, {}),
    ("selector", "engines_gradients", "the gradient of", sets.Fickle, {}),
    ("selector", "grouped_heads", "has 2 heads; q has 4", sets.PerKeyHead, {}),
    ("selector", "no_later_key", "selects a later key", sets.Acausal, {}),
    ("selector", "limits", "is not full attention", lambda keep: sets.Strongest(keep),
     {"arguments": {"keep": 1}, "limits": ({"arguments": {"keep": 2}, "equals": "full"},)}),
    ("score", "engines_forward", "exceeds its error budget", lambda: sets.Bias(0.5), {}),
    ("score", "engines_gradients", "the gradient of", lambda: sets.Bias(0.5), {}),
    ("score", "strides", "exceeds its error budget", lambda: sets.Bias(0.5), {}),
    ("score", "prefix_causality", "the first 2 of 131 tokens alone", lambda: sets.Stretched(1.0), {}),
    ("normalizer", "engines_forward", "exceeds|no lse", sets.ReLU, {}),
    ("normalizer", "engines_gradients", "the gradient of", sets.ReLU, {}),
    ("normalizer", "strides", "exceeds|no lse", sets.ReLU, {}),
    ("normalizer", "prefix_causality", "under a causal mask, tokens from 2", sets.Restless, {}),
    ("operator", "shape_and_dtype", r"returned shape \(2, 2, 16, 131\)", bound(ops.turned), {}),
    ("operator", "shape_and_dtype", "returned torch.float32", bound(ops.widened), {}),
    ("operator", "precision", "torch.float32: off by up to", bound(ops.coarse), {}),
    ("operator", "gradients", "not those of the function", bound(ops.stopped), {}),
    ("operator", "batch_rows", "batch row 0 alone", bound(ops.mixing), {}),
    ("operator", "strides", "strided inputs", bound(ops.raw), {}),
    ("operator", "grouped_heads", "grouped heads: differs", bound(ops.interleaved), {}),
    ("operator", "grouped_heads", "without naming", bound(ops.curt), {}),
    ("operator", "extreme_logits", "q and k times 1000: not finite", bound(ops.overflowing), {}),
    ("operator", "deterministic", "other bits", bound(ops.noisy), {}),
    ("operator", "inputs_unchanged", "wrote into q", bound(ops.scribbling), {}),
    ("operator", "prefix_causality", "tokens from 2 on changed", bound(ops.softmax), {}),
    ("operator", "prefix_causality", "the first 2 of 131 tokens alone", bound(ops.length_scaled), {}),
    ("operator", "other_lengths", "raised RuntimeError", bound(ops.squared), {}),
    ("operator", "permutation", "permuted tokens: differs", bound(ops.softmax, causal=True), {}),
    ("operator", "segments", "6|7 segments", ops.Forgetful, {}),
    ("operator", "segments", "the same state twice", ops.Overwriting, {}),
    ("operator", "segments", "has no initial_state", bound(ops.softmax), {}),
    ("operator", "limits", "must be full attention", lambda: ops.Linear(),
     {"limits": ({"arguments": {}, "equals": "full"},)}),
    ("layer", "shape_and_dtype", "accepted: the same shape", ops.Shrinking, {}),
    ("layer", "batch_rows", "batch row 0 alone", ops.Centred, {}),
    ("layer", "state_dict_round_trip", "loaded from another's state_dict", ops.Secretive, {}),
    ("layer", "parameter_gradients", "spare gets no gradient", ops.Idle, {}),
    ("layer", "parameter_gradients", "gradient of spare is 0 throughout", ops.Dead, {}),
    ("layer", "seeded", "out.bias differs", ops.Unseeded, {}),
    ("layer", "eval_deterministic", "run twice in eval mode", ops.Dropping, {}),
    ("layer", "parameter_count", r"has 4128 parameters .* gives 4096", ops.Mixer,
     {"cost": Cost(parameters="4*C*C"), "symbols": {"C": 32}}),
    ("layer", "inputs_unchanged", "wrote into its input", ops.Scribbler, {}),
    ("layer", "strides", "raised RuntimeError", ops.Viewing, {}),
    ("layer", "prefix_causality", "tokens from 2 on changed", ops.Looking, {}),
    ("layer", "permutation", "permuted tokens: differs", ops.Mixer, {}),
    ("layer", "segments", "segments ending at", ops.Restarting, {}),
    ("map", "shape_and_dtype", "accepted: the same shape", ops.FlatMap, {}),
    ("map", "batch_rows", "batch row 0 alone", ops.BatchMap, {}),
    ("backbone", "shape_and_dtype", r"accepted: \(2, 5\)", ops.FlatScores, {}),
    ("backbone", "batch_rows", "batch row 0 alone", ops.BatchPyramid, {}),
    ("backbone", "maps", "stride 2 and 4 channels give", ops.WrongStride, {}),
    ("backbone", "maps", "not a list of maps", ops.ScoresOnly, {}),
    ("backbone", "any_size", "without naming sizes", ops.Fixed, {}),
    ("map", "state_dict_round_trip", "loaded from another's state_dict", ops.flawed(ops.Local, "secret"), {}),
    ("map", "parameter_gradients", "spare gets no gradient", ops.flawed(ops.Local, "idle"), {}),
    ("map", "seeded", "differs", ops.flawed(ops.Local, "unseeded"), {}),
    ("map", "eval_deterministic", "run twice in eval mode", ops.flawed(ops.Local, "noisy"), {}),
    ("map", "inputs_unchanged", "wrote into its input", ops.flawed(ops.Local, "scribbling"), {}),
    ("map", "strides", "raised RuntimeError", ops.flawed(ops.Local, "raw"), {}),
    ("map", "parameter_count", r"has \d+ parameters .* gives 32", ops.Local,
     {"cost": Cost(parameters="C"), "symbols": {"C": 32}}),
    ("backbone", "state_dict_round_trip", "loaded from another's state_dict", ops.flawed(ops.Pyramid, "secret"), {}),
    ("backbone", "parameter_gradients", "spare gets no gradient", ops.flawed(ops.Pyramid, "idle"), {}),
    ("backbone", "seeded", "differs", ops.flawed(ops.Pyramid, "unseeded"), {}),
    ("backbone", "eval_deterministic", "run twice in eval mode", ops.flawed(ops.Pyramid, "noisy"), {}),
    ("backbone", "inputs_unchanged", "wrote into its input", ops.flawed(ops.Pyramid, "scribbling"), {}),
    ("backbone", "strides", "raised RuntimeError", ops.flawed(ops.Pyramid, "raw"), {}),
    ("backbone", "parameter_count", r"has \d+ parameters .* gives 32", ops.Pyramid,
     {"cost": Cost(parameters="C"), "symbols": {"C": 32}}),
    ("gate", "shape_and_dtype", "accepted: the same shape", ops.FlatGate, {}),
    ("gate", "batch_rows", "batch row 0 alone", ops.BatchGate, {}),
    ("gate", "state_dict_round_trip", "loaded from another's state_dict", ops.SecretGate, {}),
    ("gate", "parameter_gradients", "spare gets no gradient", ops.IdleGate, {}),
    ("gate", "seeded", "fc.bias differs", ops.UnseededGate, {}),
    ("gate", "eval_deterministic", "run twice in eval mode", ops.NoisyGate, {}),
    ("gate", "parameter_count", "has 1120 parameters", ops.Gate,
     {"cost": Cost(parameters="C*C"), "symbols": {"C": 32}}),
    ("gate", "inputs_unchanged", "wrote into its input", ops.ScribbleGate, {}),
    ("gate", "strides", "raised RuntimeError", ops.RawGate, {}),
    ("gate", "weight_range", r"leave \[0.0, 1.0\]", ops.WideGate, {}),
    ("gate", "weight_range", "no method weights", ops.VagueGate, {}),
]  # fmt: skip
BROKEN_FLEX = [
    ("pattern", "flex_engine", "engine flex", *EAGER),
    ("selector", "flex_engine", "engine flex", sets.Fickle, {}),
    ("score", "flex_engine", "engine flex", lambda: sets.Bias(0.5), {}),
    ("normalizer", "flex_engine", "engine flex", sets.ReLU, {}),
]


def named(cases):
    return [f"{use}-{name}-{number}" for number, (use, name, *_) in enumerate(cases)]


def caught(use, name, says, maker, check):
    check = {"tokens": 331, **check} if use == "selector" else check
    found = {step.name: step for step in steps(maker, use, ALL, **check)}
    with pytest.raises(AssertionError, match=says):
        found[name]()


@pytest.mark.parametrize(("use", "name", "says", "maker", "check"), BROKEN, ids=named(BROKEN))
def test_a_broken_object_is_caught(use, name, says, maker, check):
    caught(use, name, says, maker, check)


@pytest.mark.slow
@pytest.mark.parametrize(("use", "name", "says", "maker", "check"), BROKEN_FLEX, ids=named(BROKEN_FLEX))
def test_a_broken_object_is_caught_on_flex(use, name, says, maker, check):
    caught(use, name, says, maker, check)


def test_every_check_is_seen_to_fail():
    shown = {(use, name) for use, name, *_ in (*BROKEN, *BROKEN_FLEX)} | {("tool", "resolves")}
    assert shown == {(use, name) for use, functions in FUNCTIONS.items() for name in functions}


# -------------------------------------------------------------------------------------------- which checks run
def test_vocabulary_and_functions_agree():
    assert {use: set(functions) for use, functions in FUNCTIONS.items()} == {
        use: set(names) for use, names in words.CHECKS.items()
    }
    assert set(words.CHECKS) == set(words.INTERFACES)
    assert set(words.CHECKED) <= set(words.TAGS)
    known = {name for names in words.CHECKS.values() for name in names}
    for tag, names in words.CHECKED.items():
        assert set(names) <= known, tag
    assert set(SLOW) <= known


ENTRY = {
    "key": "made_up", "title": "Made Up", "name": "Made up", "date": "2024-01", "family": "pattern",
    "kind": "operator", "idea": "An idea.", "contribution": "A contribution.", "mechanism": "A mechanism.",
    "equation": ["x"], "symbols": {"x": "x"}, "claim": "A claim.", "invariants": ["one"], "experiment": "One.",
    "modality": ["text"], "complexity": "linear", "tags": ["causal", "static"], "phrases": ["a phrase"],
    "implementation": ["foveate.patterns.SlidingWindow", "foveate.core.normalizers.as_normalizer"],
    "verification": "smoke", "verified_by": "Looking.", "differs": "Nothing.", "snippet": "print(1)",
    "tests": ["tests/core/test_patterns.py"],
}  # fmt: skip


def entry_of(*checks):
    return from_dict({**ENTRY, "checks": list(checks)}, "made_up.toml")


def test_tags_of_the_check_come_before_those_of_the_entry():
    window = {"make": "foveate.patterns.SlidingWindow", "use": "pattern", "arguments": {"window": 5}}
    causal, plain = entry_of(window, {**window, "tags": ["static"]}).checks
    entry = entry_of(window)
    with_tag, without = ([step.name for step in checks_for(entry, check)] for check in (causal, plain))
    assert set(with_tag) - set(without) == {"no_later_key", "prefix_causality"}
    assert "limits" not in with_tag
    limited = entry_of({**window, "limits": [{"arguments": {"window": 131}, "equals": "causal"}]}).checks[0]
    assert "limits" in [step.name for step in checks_for(entry, limited)]
    assert all(callable(step) for step in checks_for(entry, causal))


def test_entries_steps_build_what_the_toml_says():
    symmetric = {"before": 2, "after": 2}
    check = {"make": "foveate.patterns.SlidingWindow", "use": "pattern", "arguments": symmetric}
    entry = entry_of(check)
    found = {step.name: step for step in checks_for(entry, entry.checks[0])}
    found["equality"]()
    with pytest.raises(AssertionError, match=r"pattern, no_later_key: .* sees a later key"):
        found["no_later_key"]()


def test_tool_that_leads_nowhere():
    entry = entry_of({"make": ENTRY["implementation"][1], "use": "tool"})
    checks_for(entry, entry.checks[0])[0]()
    gone = {**ENTRY, "implementation": ["foveate.patterns.Nowhere"]}
    entry = from_dict(
        {**gone, "checks": [{"make": "foveate.patterns.Nowhere", "use": "tool"}]}, "made_up.toml"
    )
    with pytest.raises(AssertionError, match="has no Nowhere"):
        checks_for(entry, entry.checks[0])[0]()


def test_arguments_from_toml():
    assert value([1, [2, "x"]]) == (1, (2, "x"))
    assert torch.equal(value({"tensor": [[1, 2]]}), torch.tensor([[1.0, 2.0]]))
    one, other = value({"normal": [2, 3]}), value({"normal": [2, 3], "seed": 1})
    assert one.shape == (2, 3)
    assert not torch.equal(one, other)
    assert torch.equal(one, value({"normal": [2, 3]}))
    assert value({"make": "foveate.patterns.SlidingWindow", "arguments": {"window": 3}}) == SlidingWindow(3)
    assert value({"a": [1]}) == {"a": (1,)}
    operator = make("foveate.attention", "operator", {"is_causal": True})
    x = torch.randn(1, 2, 7, 4)
    assert operator(x, x, x).shape == x.shape


@pytest.mark.parametrize(("use", "tags"), [("thing", []), ("pattern", ["quick"])])
def test_unknown_words_are_refused(use, tags):
    with pytest.raises(ValueError, match=r"accepted|one of"):
        checks_of_object(sets.Band, use, tags)


def together(q, k, v):
    """Query heads that share a key head attend as their mean does."""
    mean = (
        q.unflatten(1, (k.shape[1], -1))
        .mean(2, keepdim=True)
        .expand(-1, -1, q.shape[1] // k.shape[1], -1, -1)
    )
    return fv.attention(mean.flatten(1, 2), k, v)


def test_heads_that_decide_together_are_asked_with_equal_heads():
    """Under the tag shared-heads; another order of the heads is still caught."""

    def ask(operator, *tags):
        next(s for s in steps(bound(operator), "operator", tags) if s.name == "grouped_heads")()

    ask(together, "shared-heads")
    with pytest.raises(AssertionError, match="grouped heads: differs"):
        ask(together)
    with pytest.raises(AssertionError, match="grouped heads: differs"):
        ask(ops.interleaved, "shared-heads")
