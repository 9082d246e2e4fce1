"""A language model small enough to think through: it knows which byte follows which."""

from __future__ import annotations

import json
from pathlib import Path

import torch

CYCLE = "abcdefghijklmnopqrstuvwxyz .,\n"
HEADS, KV_HEADS = 4, 2


def cycle_text(n: int) -> str:
    """Text in which every character is followed by the next of `CYCLE`."""
    return (CYCLE * (n // len(CYCLE) + 1))[:n]


def save_tokenizer(directory: Path) -> int:
    """A byte-level tokenizer without merges, as transformers saves it; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(directory)
    return len(alphabet)


def tiny_llama(directory: Path, *, follows: bool, noise: float = 0.3, context: int = 2048) -> Path:
    """Save a Llama of 2 layers. With ``follows`` its head maps each byte of `CYCLE` to the next one."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    vocabulary = save_tokenizer(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        embedding = torch.nn.functional.normalize(torch.randn(vocabulary, 64), dim=-1)
        model.model.embed_tokens.weight.copy_(embedding)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.o_proj.weight.copy_(torch.randn(64, 64) * noise)
            layer.mlp.down_proj.weight.zero_()
        if follows:
            ids = AutoTokenizer.from_pretrained(directory)(CYCLE)["input_ids"]
            head = torch.zeros(vocabulary, 64)
            for here, there in zip(ids, ids[1:] + ids[:1], strict=True):
                head[there] = embedding[here]
            model.lm_head.weight.copy_(head)
    model.save_pretrained(directory)
    return directory


def read_results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))
