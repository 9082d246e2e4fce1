"""Fifteen families: the dense policy gives eager's logits and eager's tokens."""

from __future__ import annotations

import families
import pytest
import torch

import foveate as fv

STEPS = 8


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_dense_policy_gives_eager_logits(name, padded):
    model, given = families.model(name), families.inputs(name, padded)
    eager = families.outputs(model, given)
    with fv.hf.apply(model, "dense") as handle:
        ours = families.outputs(model, given)
    keep = families.real(given, eager)
    assert (eager - ours).abs()[keep].max() <= 1e-4
    report = handle.report()
    assert report.density == 1.0
    assert all(layer.calls == 1 and layer.restricted == 0 for layer in report.layers)
    expected = families.FAMILIES[name].layers * (
        3 if families.FAMILIES[name].kind == "encoder-decoder" else 1
    )
    assert len(report.layers) == expected


@pytest.mark.parametrize("name", families.FAMILIES)
def test_check_agrees_on_padded_inputs(name):
    model = families.model(name)
    with fv.hf.apply(model, fv.patterns.SlidingWindow(2)) as handle:
        result = handle.check(families.inputs(name, padded=True))
        assert handle.report().layers[0].calls == 0
    assert result.max_error <= result.tolerance == 1e-4


@pytest.mark.parametrize("name", families.FAMILIES)
def test_attention_matters_in_these_models(name):
    """If a policy did not change the logits by far more than the tolerance, the tests above would prove
    nothing."""
    model, given = families.model(name), families.inputs(name)
    eager = families.outputs(model, given)
    with fv.hf.apply(model, fv.patterns.SlidingWindow(2)):
        ours = families.outputs(model, given)
    assert (eager - ours).abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", families.GENERATIVE)
def test_generate_gives_eager_tokens(name, cache):
    model = families.model(name)
    given = families.inputs(name, padded=True)
    given = {k: v for k, v in given.items() if not k.startswith("decoder_")}
    options = {"max_new_tokens": STEPS, "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = "static"
    eager = model.generate(**given, **options)
    with fv.hf.apply(model, "dense"):
        ours = model.generate(**given, **options)
    assert torch.equal(eager, ours)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "cache_implementation": "static"},
        {"prefill_chunk_size": 6},
        {"use_cache": False},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=lambda o: "-".join(o),
)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate_in_other_ways(name, options):
    model, given = families.model(name), families.inputs(name, padded=True)
    eager = model.generate(**given, **options, max_new_tokens=STEPS, do_sample=False)
    with fv.hf.apply(model, "dense"):
        ours = model.generate(**given, **options, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(eager, ours)


def test_sampling_sees_the_same_distribution():
    model, given = families.model("llama"), families.inputs("llama")
    torch.manual_seed(0)
    eager = model.generate(**given, max_new_tokens=STEPS, do_sample=True)
    torch.manual_seed(0)
    with fv.hf.apply(model, "dense"):
        ours = model.generate(**given, max_new_tokens=STEPS, do_sample=True)
    assert torch.equal(eager, ours)
