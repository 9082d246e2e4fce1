"""`foveate.hf.Cache` against dense attention with the same kept set, and everything generation asks of a cache."""

from __future__ import annotations

import gc
import itertools
from contextlib import contextmanager

import pytest
import torch
import transformers as tf
from families import FAMILIES
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import foveate as fv
from foveate.cache import H2O, Policy, RandomKeep, SnapKV, Streaming
from foveate.cache.policy import Kept

MODELS = ("llama", "gemma2", "gpt_oss", "qwen3")
# (policy, settings) that give ragged sets: heads, layers and rows keep different tokens, some different numbers of them
SETTINGS = {
    "streaming": ("streaming", {"budget": 11}),
    "snapkv": (SnapKV(8, 3), {"budget": 12, "recent": 4}),
    "snapkv each step": (SnapKV(8, 3), {"budget": 12, "recent": 4, "evict": 1}),
    "snapkv, heads share": (
        SnapKV(8, 3),
        {"budget": 14, "recent": 4, "per": "layer", "evict": 2, "floor": 0.3},
    ),
    "snapkv, layers share": (
        SnapKV(8, 3),
        {"budget": 14, "recent": 4, "per": "model", "evict": 3, "floor": 0.3},
    ),
    "snapkv, append only": (SnapKV(8, 3), {"budget": 0.4, "recent": 4, "evict": "append"}),
    "h2o": ("h2o", {"budget": 12, "recent": 4}),
    "random fraction": (RandomKeep(1), {"budget": 0.35, "recent": 2, "sinks": 1}),
}


def made(name, seed=0):
    torch.manual_seed(seed)
    return FAMILIES[name].make().eval()


def prompts(rows=3, n=33, pads=(0, 9, 3), seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (rows, n), generator=g)
    mask = (torch.arange(n)[None] >= torch.tensor(pads[:rows])[:, None]).long()
    return ids * mask, mask


# -------------------------------------------------------------------- the dense reference
_held: dict = {}


def _attend(module, q, k, v, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **unused):
    """Plain softmax over all tokens ever seen, with a boolean mask per row and head: the kept set and the new ones."""
    batch, heads, n, _ = q.shape
    m = k.shape[2]
    group = heads // k.shape[1]
    seen = attention_mask.expand(batch, heads, n, m).clone()
    kept = _held["kept"]
    if kept is not None:
        may = torch.zeros(batch, heads, m, dtype=torch.bool)
        for b in range(batch):
            for h in range(heads):
                may[b, h, kept[module.layer_idx][b][h // group]] = True
        may[:, :, m - n :] = True
        seen &= may[:, :, None]
    logits = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(batch, heads, n, 1)], -1)
    p = torch.softmax(logits, -1).nan_to_num(0.0)[..., :m]
    return (p @ v.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


def _mask(**arguments):
    return sdpa_mask(**{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("kept", _attend)
AttentionMaskInterface.register("kept", _mask)


@contextmanager
def reference(model, kept):
    """The model on dense attention restricted to ``kept``[layer][row][KV head] and the tokens of the call."""
    before = model.config._attn_implementation
    _held["kept"] = kept
    model.set_attn_implementation("kept")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def positions(cache, layers):
    return [[[t.clone() for t in row] for row in cache.positions(layer)] for layer in range(layers)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_dense_attention_with_the_same_kept_set(name, setting):
    """Ragged sets in a left-padded batch, twelve steps: logits within 1e-5 of dense attention to the same tokens."""
    policy, kwargs = SETTINGS[setting]
    model = made(name)
    layers = model.config.num_hidden_layers
    ids, mask = prompts()
    cache = fv.hf.Cache(model, policy, **kwargs)
    dense = tf.DynamicCache()
    g = torch.Generator().manual_seed(2)
    feed = ids
    worst, counts = 0.0, set()
    with torch.no_grad():
        for step in range(13):
            kept = positions(cache, layers) if step else None
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -feed.shape[1] :]
            arguments = {"attention_mask": mask, "position_ids": position_ids}
            got = model(feed, past_key_values=cache, **arguments).logits
            with reference(model, kept):
                wanted = model(feed, past_key_values=dense, **arguments).logits
            real = mask[:, -feed.shape[1] :].bool()
            worst = max(worst, float((got - wanted)[real].abs().max()))
            counts |= {len(t) for layer in positions(cache, layers) for row in layer for t in row}
            feed = torch.randint(2, 60, (3, 1), generator=g)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    assert worst < 1e-5
    assert max(counts) < 33  # something was evicted
    cache.release()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["streaming", "snapkv", "h2o", "random", "oracle"])
def test_a_budget_for_everything_changes_nothing(name, policy):
    model = made(name)
    ids, mask = prompts()
    common = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **common)
    cache = fv.hf.Cache(model, policy, 1.0, **({} if policy == "oracle" else {"evict": 1}))
    got = model.generate(ids, past_key_values=cache, **common)
    assert torch.equal(got, wanted)
    held = cache.held()
    assert held.seen == (42, 33, 39)  # of 33 + 9, without padding


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_row_equals_the_row_alone(name):
    """Padding is never stored, never a sink: sets and tokens are those of the unpadded prompt."""
    model = made(name)
    ids, mask = prompts()
    for policy, kwargs in (
        ("streaming", {"budget": 11}),
        ("snapkv", {"budget": 12}),
        ("h2o", {"budget": 12}),
    ):
        cache = fv.hf.Cache(model, policy, **kwargs)
        together = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=9, do_sample=False, pad_token_id=0
        )
        for row, pad in enumerate((0, 9, 3)):
            alone = fv.hf.Cache(model, policy, **kwargs)
            out = model.generate(
                ids[row : row + 1, pad:],
                past_key_values=alone,
                max_new_tokens=9,
                do_sample=False,
                pad_token_id=0,
            )
            assert torch.equal(out[0, -9:], together[row, -9:])
            for layer in range(model.config.num_hidden_layers):
                mine = [t - pad for t in cache.positions(layer)[row]]
                assert all(int(t.min()) >= 0 for t in mine)
                assert all(torch.equal(a, b) for a, b in zip(mine, alone.positions(layer)[0], strict=True))


def test_positions_are_kept_per_slot_and_policies_see_them():
    """Heads of one layer hold different tokens, and the cache says which."""
    model = made("llama")
    ids, mask = prompts()
    cache = fv.hf.Cache(model, RandomKeep(2), 12, recent=2)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    sets = [tuple(t.tolist()) for layer in (0, 1) for row in cache.positions(layer) for t in row]
    assert len(set(sets)) == len(sets)
    assert all(len(s) == 12 for s in sets)
    for row, pad in enumerate((0, 9, 3)):
        for t in cache.positions(0)[row]:
            assert t[:4].tolist() == [pad, pad + 1, pad + 2, pad + 3]
            assert t[-2:].tolist() == [31, 32]


@pytest.mark.parametrize("per", ["head", "layer", "model"])
def test_memory_falls_as_the_budget_says(per):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = tf.LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 60, (2, 800))
    sizes = {}
    for budget in (0.5, 0.25, 200, 100):
        cache = fv.hf.Cache(model, "snapkv", budget, per=per)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        held = cache.held()
        tokens = budget if isinstance(budget, int) else round(800 * budget)
        assert held.tokens == pytest.approx(tokens, abs=1)
        slack = (
            3 * 2 * 2 * 32 * (2 * 64 * 4 + 13)
        )  # layers, rows, heads, free slots, bytes of a token and its position
        assert held.nbytes <= held.full_bytes * tokens / 800 * (1 + 13 / 512) + slack + 3 * 2 * 8
        sizes[budget] = held.nbytes
        flat = sum(layer.held.store.keys.untyped_storage().nbytes() for layer in cache.layers)
        assert flat <= (tokens + 33) * 3 * 2 * 2 * 64 * 4  # what torch really holds, not what views say
    assert sizes[200] == pytest.approx(sizes[0.25], rel=0.01)
    assert sizes[100] < 0.62 * sizes[200]
    assert sizes[0.25] < 0.56 * sizes[0.5]


@pytest.mark.parametrize("per", ["head", "layer", "model"])
def test_append_only_keeps_what_it_decided_whoever_shares_the_budget(per):
    """What the prompt's cut kept outside the recent tokens is there after 70 more tokens."""
    model = made("llama")
    ids, mask = prompts(n=60)
    cache = fv.hf.Cache(model, SnapKV(8, 3), 0.4, recent=6, evict="append", per=per)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        before = positions(cache, 2)
        for step in range(70):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            model(torch.full((3, 1), 2 + step % 50), attention_mask=mask, past_key_values=cache)
    after = positions(cache, 2)
    for layer, row, head in itertools.product(range(2), range(3), range(2)):
        decided = {int(p) for p in before[layer][row][head] if p < 60 - 6}
        assert decided <= set(after[layer][row][head].tolist())
    assert max(len(t) for layer in after for row in layer for t in row) < 120  # and others went


def test_grouped_heads_are_never_expanded():
    model = made("llama")  # four query heads on two
    cache = fv.hf.Cache(model, "snapkv", 12)
    with torch.no_grad():
        model(prompts()[0], past_key_values=cache)
    assert all(layer.held.store.heads == 2 for layer in cache.layers)


# -------------------------------------------------------------------- generate
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 8, "do_sample": False},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=lambda how: "-".join(how),
)
def test_generate_with_everything_kept_equals_the_dynamic_cache(name, how):
    """Sampling, beams (reorder), several sequences and chunked prefill."""
    model = made(name)
    ids, mask = prompts()
    if "prefill_chunk_size" in how:
        ids, mask = ids[:1], mask[:1]
    common = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, **how}
    torch.manual_seed(5)
    wanted = model.generate(ids, **common)
    cache = fv.hf.Cache(model, "snapkv", 1.0, evict=1)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, past_key_values=cache, **common), wanted)


@pytest.mark.parametrize("how", [{"do_sample": True}, {"num_beams": 3}, {"prefill_chunk_size": 8}], ids=str)
@pytest.mark.parametrize("policy", ["streaming", "snapkv", "h2o", "oracle"])
def test_generate_under_a_small_budget(policy, how):
    model = made("llama")
    ids, _ = prompts(pads=(0, 0, 0))
    cache = fv.hf.Cache(model, policy, 12)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=8, pad_token_id=0, **how)
    assert out.shape == (3, 41)
    held = cache.held()
    if policy != "oracle":
        assert max(n for layer in held.layers for row in layer.tokens for n in row) <= 12 + 8
    assert held.seen[0] == 40


def test_beams_carry_their_own_sets():
    """After a reorder each beam holds the tokens of the beam it continues."""
    model = made("llama")
    ids, _ = prompts(rows=2, pads=(0, 0))
    cache = fv.hf.Cache(model, "snapkv", 12)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    before = positions(cache, 2)
    keys = cache.layers[0].held.store.padded("keys").clone()
    cache.reorder_cache(torch.tensor([1, 1]))
    after = positions(cache, 2)
    assert all(
        torch.equal(a, b) for layer in (0, 1) for a, b in zip(after[layer][0], before[layer][1], strict=True)
    )
    assert torch.equal(cache.layers[0].held.store.padded("keys")[0], keys[1])
    cache.batch_repeat_interleave(2)
    assert len(cache.positions(0)) == 4
    cache.batch_select_indices(torch.tensor([0]))
    assert len(cache.positions(0)) == 1


def test_crop_takes_back_tokens_or_refuses():
    model = made("llama")
    ids, _ = prompts(rows=2, pads=(0, 0))
    cache = fv.hf.Cache(model, "snapkv", 20)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        first = model(ids[:, :1], past_key_values=cache).logits
        for n in (1, 3):
            model(ids[:, :1], past_key_values=cache)
            for _ in range(n - 1):
                model(ids[:, 1:2], past_key_values=cache)
            cache.crop(-(n + 1))
            again = model(ids[:, :1], past_key_values=cache).logits
            torch.testing.assert_close(again, first, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="what it evicted is gone"):
        cache.crop(-5)
    with pytest.raises(ValueError, match="negative int; got 3"):
        cache.crop(3)
    assert not cache.layers[0].is_croppable


def test_reset_makes_it_empty_and_usable_again():
    model = made("llama")
    ids, _ = prompts(rows=2, pads=(0, 0))
    cache = fv.hf.Cache(model, "h2o", 12)
    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    one = model.generate(ids, past_key_values=cache, **common)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.held().nbytes == 0
    assert torch.equal(model.generate(ids, past_key_values=cache, **common), one)


# -------------------------------------------------------------------- the model's attention
def test_the_model_gets_its_attention_back():
    model = made("llama")
    before = model.config._attn_implementation
    cache = fv.hf.Cache(model, "streaming", 12)
    assert model.config._attn_implementation == "foveate"
    cache.release()
    assert model.config._attn_implementation == before
    cache = fv.hf.Cache(model, "streaming", 12)
    del cache
    gc.collect()
    assert model.config._attn_implementation == before
    two = [fv.hf.Cache(model, "streaming", 12) for _ in range(2)]
    two[0].release()
    assert model.config._attn_implementation == "foveate"
    two[1].release()
    assert model.config._attn_implementation == before


def test_another_attention_gets_an_error_not_wrong_numbers():
    model = made("llama")
    cache = fv.hf.Cache(model, "streaming", 12)
    for other in ("sdpa", "eager"):
        model.set_attn_implementation(other)
        cache.reset()
        with pytest.raises(RuntimeError, match="can only be read by foveate's attention"):
            model(prompts()[0], past_key_values=cache)


def test_it_goes_together_with_a_sparse_prefill():
    """apply() decides what the prompt's tokens saw, the cache what stays."""
    model = made("llama")
    ids, mask = prompts()
    window = fv.patterns.SlidingWindow(5)
    common = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with fv.hf.apply(model, window, phase="prefill"):
        wanted = model.generate(ids, **common)
        cache = fv.hf.Cache(model, "snapkv", 1.0)
        assert torch.equal(model.generate(ids, past_key_values=cache, **common), wanted)
        small = fv.hf.Cache(model, "snapkv", 12)
        model.generate(ids, past_key_values=small, **common)
    with fv.hf.apply(model, window):  # the window holds while decoding too, on the tokens that stayed
        wanted = model.generate(ids, **common)
        cache = fv.hf.Cache(model, "snapkv", 1.0)
        assert torch.equal(model.generate(ids, past_key_values=cache, **common), wanted)
    selector = fv.selectors.FlexPrefill(block=64, min_budget=64)
    with fv.hf.apply(model, selector), pytest.raises(ValueError, match="phase='prefill'"):
        model.generate(ids, past_key_values=fv.hf.Cache(model, "snapkv", 12), **common)


# -------------------------------------------------------------------- refusals
def test_wrong_arguments_get_one_clear_error_each():
    model = made("llama")
    before = model.config._attn_implementation
    for arguments, text in (
        (("lru", 12), r"unknown policy 'lru'; accepted: "),
        (("snapkv",), "needs a budget: tokens .int. or a fraction"),
        (("snapkv", 0), "budget in tokens must be >= 1, got 0"),
        (("snapkv", 1.2), r"must lie in \(0, 1\], got 1.2"),
        (("snapkv", 3), r"budget = 3 tokens is less than sinks \+ recent = 4"),
        (("snapkv", "12"), "got '12'"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            fv.hf.Cache(model, *arguments)
    for kwargs, text in (
        ({"per": "token"}, "per must be one of head, layer, model; got 'token'"),
        ({"evict": "often"}, "evict must be 'prefill', 'append' or a number of tokens >= 1; got 'often'"),
        ({"evict": 0}, "got 0"),
        ({"evict": "append"}, "must be a fraction"),
        ({"sinks": -1}, "sinks must be >= 0, got -1"),
        ({"recent": 40}, "less than sinks"),
    ):
        with pytest.raises(ValueError, match=text):
            fv.hf.Cache(model, "snapkv", 32, **kwargs)
    with pytest.raises(ValueError, match="no scores that heads could share"):
        fv.hf.Cache(model, "streaming", 32, per="layer")
    with pytest.raises(ValueError, match="evicts by age"):
        fv.hf.Cache(model, "streaming", 0.5, evict="append")
    with pytest.raises(ValueError, match="evicts nothing; leave evict out"):
        fv.hf.Cache(model, "oracle", 32, evict=3)
    with pytest.raises(TypeError, match=r"must be a name or a foveate\.cache\.Policy, got 7"):
        fv.hf.Cache(model, 7, 32)  # pyright: ignore[reportArgumentType]
    assert model.config._attn_implementation == before  # nothing was switched on the way


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
        fv.hf.Cache(torch.nn.Linear(2, 2), "streaming", 12)  # pyright: ignore[reportArgumentType]
    falcon = tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="cannot switch its attention"):
        fv.hf.Cache(falcon, "streaming", 12)
    with pytest.raises(ValueError, match="encoder-decoder"):
        fv.hf.Cache(made("bart"), "streaming", 12)


def test_a_policy_of_ones_own():
    """Twenty lines: keep even positions."""

    class Even(Policy):
        name = ""
        needs_budget = False

        def first(self, view, budget):
            keep = view.valid & (view.positions % 2 == 0)
            return Kept(keep, keep, torch.full(keep.shape[:2], -1))

    model = made("llama")
    cache = fv.hf.Cache(model, Even())
    with torch.no_grad():
        model(prompts(pads=(0, 0, 0))[0], past_key_values=cache)
    assert cache.positions(1)[2][1].tolist() == list(range(0, 33, 2))


def test_a_score_of_ones_own_sees_the_keys_while_decoding_too():
    """The example of docs/caches.md, deciding at every step: what stays are the largest keys, then as later."""

    class Loud(Policy):
        def score(self, view):
            return view.keys.norm(dim=3).masked_fill(~view.valid, 0)

    model = made("llama")
    cache = fv.hf.Cache(model, Loud(), 12, sinks=0, recent=1, evict=1)
    full = tf.DynamicCache()
    with torch.no_grad():
        for step, ids in enumerate((prompts(pads=(0, 0, 0))[0], *torch.randint(2, 60, (5, 3, 1)))):
            model(ids, past_key_values=cache)
            with reference(model, None):
                model(ids, past_key_values=full)
            if step == 0:
                held = [set(t.tolist()) for row in cache.positions(0) for t in row]
                norms = full.layers[0].keys.norm(dim=3)
                for r, mine in enumerate(held):
                    line = norms[r // 2, r % 2]
                    assert mine == {32, *line[:32].topk(11).indices.tolist()}
            else:
                line = full.layers[0].keys.norm(dim=3)
                for r, tokens in enumerate(t for row in cache.positions(0) for t in row):
                    candidates = sorted(held[r] | {32 + step})
                    candidates.remove(32 + step)
                    best = sorted(candidates, key=lambda j: -float(line[r // 2, r % 2, j]))[:11]
                    held[r] = {*best, 32 + step}
                    assert set(tokens.tolist()) == held[r]


def test_batches_of_many_sizes(tmp_path):
    """Prime sizes, one head, one token of prompt, all rows padded differently."""
    torch.manual_seed(0)
    for heads, hkv, n in itertools.product((1, 3), (1,), (1, 2, 17)):
        config = tf.LlamaConfig(
            vocab_size=61,
            hidden_size=heads * 6,
            intermediate_size=10,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=hkv,
            pad_token_id=0,
            eos_token_id=None,
        )
        model = tf.LlamaForCausalLM(config).eval()
        ids = torch.randint(1, 61, (5, n))
        mask = (torch.arange(n)[None] >= torch.arange(5)[:, None].clamp(max=n - 1)).long()
        common = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        wanted = model.generate(ids, **common)
        for policy in (Streaming(), SnapKV(3, 3), H2O()):
            cache = fv.hf.Cache(model, policy, 64, sinks=1)
            assert torch.equal(model.generate(ids, past_key_values=cache, **common), wanted)
