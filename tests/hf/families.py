"""Tiny random models of 15 families, and inputs for them. Two layers, 32 to 64 dimensions; nothing is
downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

VOCAB = 64
LENGTH = 21

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 128}


def _with_sinks(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)  # they are what is to be honoured: make them count
    return model


def _with_bias(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def _gemma3():
    config = tf.Gemma3TextConfig(
        **_GROUPED, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    )
    return tf.Gemma3ForCausalLM(config)


def _gpt_oss():
    config = tf.GptOssConfig(
        **{**_GROUPED, "intermediate_size": 32},
        head_dim=8,
        sliding_window=6,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
    )
    return _with_sinks(tf.GptOssForCausalLM(config))


def _qwen3():
    config = tf.Qwen3Config(
        **_GROUPED, head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=1
    )
    return tf.Qwen3ForCausalLM(config)


def _gpt2():
    config = tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        scale_attn_by_inverse_layer_idx=True,
    )
    return tf.GPT2LMHeadModel(config)


def _opt():
    config = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return tf.OPTForCausalLM(config)


def _t5():
    config = tf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=None,
        decoder_start_token_id=0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )
    return _with_bias(tf.T5ForConditionalGeneration(config))


def _bart():
    config = tf.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    return tf.BartForConditionalGeneration(config)


def _vit():
    config = tf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=24,
        patch_size=4,
        num_labels=5,
    )
    return tf.ViTForImageClassification(config)


def _modernbert():
    config = tf.ModernBertConfig(
        **{**_TEXT, "num_hidden_layers": 3},
        max_position_embeddings=128,
        local_attention=8,
        global_attn_every_n_layers=3,
        cls_token_id=1,
        sep_token_id=2,
    )
    return tf.ModernBertForMaskedLM(config)


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    kind: str  # "causal", "encoder", "encoder-decoder" or "vision"
    layers: int = 2


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)), "causal"),
    "gemma2": Family(
        lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(
                **_GROUPED,
                head_dim=8,
                sliding_window=6,
                attn_logit_softcapping=0.05,
                query_pre_attn_scalar=3,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        "causal",
    ),
    "gemma3": Family(_gemma3, "causal"),
    "gpt_oss": Family(_gpt_oss, "causal"),
    "qwen3": Family(_qwen3, "causal"),
    "mistral": Family(
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GROUPED, sliding_window=6)), "causal"
    ),
    "phi3": Family(lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GROUPED)), "causal"),
    "gpt_neox": Family(
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_TEXT, max_position_embeddings=128)), "causal"
    ),
    "gpt2": Family(_gpt2, "causal"),
    "opt": Family(_opt, "causal"),
    "t5": Family(_t5, "encoder-decoder"),
    "bart": Family(_bart, "encoder-decoder"),
    "bert": Family(
        lambda: tf.BertForMaskedLM(tf.BertConfig(**_TEXT, max_position_embeddings=128)), "encoder"
    ),
    "vit": Family(_vit, "vision"),
    "modernbert": Family(_modernbert, "encoder", 3),
}
CAUSAL = [name for name, family in FAMILIES.items() if family.kind == "causal"]
GENERATIVE = [name for name, family in FAMILIES.items() if family.kind in ("causal", "encoder-decoder")]

_cache: dict[str, Any] = {}


def model(name: str) -> Any:
    """A seeded random model in eval mode with eager attention; one instance per family and process."""
    if name not in _cache:
        torch.manual_seed(len(name) + 7)
        made = FAMILIES[name].make().eval()
        made.set_attn_implementation("eager")
        with torch.no_grad():  # sharper attention than a fresh initialisation gives
            for key, parameter in made.named_parameters():
                if key.rsplit(".", 1)[0].endswith(
                    ("q_proj", "k_proj", "query", "key", "qkv_proj", "c_attn", ".q", ".k")
                ):
                    parameter.mul_(2.0 if name == "t5" else 8.0)
        _cache[name] = made
    return _cache[name]


def inputs(name: str, padded: bool = False, length: int = LENGTH, batch: int = 3) -> dict[str, torch.Tensor]:
    """Random inputs of a family; padded ones have rows with no, some and much padding (left for causal
    models)."""
    kind = FAMILIES[name].kind
    generator = torch.Generator().manual_seed(5)
    if kind == "vision":
        return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=generator)}
    out = {"input_ids": torch.randint(3, VOCAB, (batch, length), generator=generator)}
    if padded:
        mask = torch.ones(batch, length, dtype=torch.long)
        for row, pads in enumerate((0, 5, 12, 1)[:batch]):
            if pads and kind == "causal":
                mask[row, :pads] = 0
            elif pads:
                mask[row, -pads:] = 0
        out["attention_mask"] = mask
        out["input_ids"] = out["input_ids"].masked_fill(mask == 0, 0)
    if kind == "encoder-decoder":
        out["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, 11), generator=generator)
        if padded:
            decoder = torch.ones(batch, 11, dtype=torch.long)
            decoder[1, -4:] = 0
            out["decoder_attention_mask"] = decoder
    return out


def outputs(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


def real(given: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """Bool over the leading axes of the logits: positions of real tokens."""
    mask = given.get("decoder_attention_mask" if "decoder_input_ids" in given else "attention_mask")
    if mask is None or logits.ndim < 3:
        return torch.ones(logits.shape[:1] if logits.ndim < 3 else logits.shape[:2], dtype=torch.bool)
    return mask.bool()
