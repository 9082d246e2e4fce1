"""What a byte-level causal model can do: bits per byte, needle recall by depth, induction heads.

    python -m foveate.organisms.reader.evaluate                      # the shipped reader, the card's figures
    python -m foveate.organisms.reader.evaluate --run runs/reader    # the last checkpoint of a run

All functions take a transformers causal model (or any callable from ids (B, N) to an object with `.logits`)
over bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.organisms.reader import data


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids).logits  # (B, N, vocab)


def bits_per_byte(model: Any, length: int, windows: int | None = 32, text: bytes | None = None) -> float:
    """Mean of -log2 p(byte | the bytes before it in its window), over non-overlapping windows of `length`
    bytes.

    Args:
        length: bytes per window; the first byte of a window is context only.
        windows: how many, evenly spaced over the text; None = all of them.
        text: default the held-out standard-library modules.

    The early bytes of a window have little context, and count like the others.
    """
    text = data.stdlib_text(held_out=True) if text is None else text
    most = len(text) // length
    if most < 1:
        raise ValueError(f"text: {len(text)} bytes, but a window has {length}")
    count = most if windows is None else min(windows, most)
    total = 0.0
    for i in np.linspace(0, most - 1, count).round().astype(int).tolist():
        ids = torch.frombuffer(bytearray(text[i * length : (i + 1) * length]), dtype=torch.uint8).long()[None]
        logits = _logits(model, ids)[0, :-1]
        total += float(F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
    return total / (count * (length - 1)) / math.log(2)


def needle_recall(
    model: Any, length: int, count: int = 100, *, distractors: int = 3, seed: int = 0, bins: int = 5
) -> dict[str, Any]:
    """Share of `count` needles whose five digits are all the argmax (equal to greedy decoding), and the same
    per depth.

    Depths are (i + 1/2) / count, so every depth is asked equally often; the haystack is held-out text. Needle
    i comes from the generator seeded with (seed, length, i). Returns recall, count, and `by_depth`: bins
    equal parts of 0 .. 1.
    """
    text = data.stdlib_text(held_out=True)
    right = []
    for i in range(count):
        rng = np.random.default_rng([seed, length, i])
        ids, answer = data.needle(length, (i + 0.5) / count, rng, text, distractors=distractors)
        tensor = torch.from_numpy(ids)[None]
        guess = _logits(model, tensor)[0, answer.start - 1 : answer.stop - 1].argmax(-1)
        right.append(bool((guess == tensor[0, answer]).all()))
    parts = [p.mean() for p in np.array_split(np.array(right, dtype=float), min(bins, count))]
    return {
        "length": length,
        "recall": float(np.mean(right)),
        "count": count,
        "distractors": distractors,
        "seed": seed,
        "by_depth": [round(float(p), 4) for p in parts],
    }


def _attention_maps(model: Any, ids: Tensor) -> list[Tensor]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return list(model(ids, output_attentions=True).attentions)  # per layer (B, H, N, N)
    finally:
        model.set_attn_implementation(before)


PRINTABLE = bytes(range(33, 127))
"""94 printable ASCII bytes; mixtures of them were never repeated in training."""
ALPHANUMERIC = data.ALPHABET
"""Small letters and digits, 36 bytes: what the repeated lines in training are made of."""


def _repeated(half: int, rows: int, seed: int, alphabet: bytes) -> Tensor:
    picks = np.random.default_rng(seed).integers(len(alphabet), size=(rows, half))
    one = np.frombuffer(alphabet, dtype=np.uint8)[picks].astype(np.int64)
    return torch.from_numpy(np.concatenate([one, one], axis=1))  # (rows, 2 * half)


def induction_scores(
    model: Any, *, half: int = 128, rows: int = 8, seed: int = 0, alphabet: bytes = PRINTABLE
) -> tuple[Tensor, Tensor]:
    """Prefix-matching and previous-byte scores of every head, both (layers, heads), on repeated random bytes.

    A row is a random sequence of `half` bytes of `alphabet`, twice. At position i of the second copy an
    *induction head* attends to the byte that followed the same byte in the first copy, i - half + 1; the
    score is the mean attention weight there (Olsson et al., "In-context Learning and Induction Heads", 2022).
    The previous-byte score is the mean weight on i - 1. Uniform attention would score about 1 / (1.5 * half).
    """
    ids = _repeated(half, rows, seed, alphabet)
    maps = _attention_maps(model, ids)
    i = torch.arange(half, 2 * half - 1)
    match = torch.stack([m[:, :, i, i - half + 1].mean((0, 2)) for m in maps])
    j = torch.arange(1, 2 * half)
    previous = torch.stack([m[:, :, j, j - 1].mean((0, 2)) for m in maps])
    return match, previous


def repeat_gain(
    model: Any, *, half: int = 128, rows: int = 8, seed: int = 0, alphabet: bytes = PRINTABLE
) -> tuple[float, float]:
    """Bits per byte on the first and the second copy of repeated random bytes.

    The first copy cannot be below log2 of the alphabet's size: 6.55 for PRINTABLE, 5.17 for ALPHANUMERIC.
    """
    ids = _repeated(half, rows, seed, alphabet)
    logits = _logits(model, ids)[:, :-1].float()
    ce = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        rows, -1
    ) / math.log(2)
    return float(ce[:, : half - 1].mean()), float(ce[:, half:].mean())


def retrieval_scores(model: Any, length: int = 1024, count: int = 20, *, seed: int = 1) -> Tensor:
    """Mean attention weight (layers, heads) from the byte before the answer to the needle's first digit:
    retrieval heads.

    Needles as in `needle_recall`, three distractors (Wu et al., "Retrieval Head Mechanistically Explains
    Long-Context Factuality", 2024, score copying in generation; here it is the attention weight of one
    teacher-forced step).
    """
    text = data.stdlib_text(held_out=True)
    total = None
    for i in range(count):
        rng = np.random.default_rng([seed, length, i])
        ids, answer = data.needle(length, (i + 0.5) / count, rng, text)
        head = bytes(ids[answer.start - data._DIGITS_AT : answer.start].astype(np.uint8))
        place = bytes(ids.astype(np.uint8)).find(head) + data._DIGITS_AT
        maps = _attention_maps(model, torch.from_numpy(ids)[None])
        scores = torch.stack([m[0, :, answer.start - 1, place] for m in maps])
        total = scores if total is None else total + scores
    assert total is not None
    return total / count


def top_heads(scores: Tensor, count: int = 5) -> list[dict[str, Any]]:
    """The heads with the largest scores: layer, head (both from 0), score."""
    order = scores.flatten().argsort(descending=True)[:count].tolist()
    heads = scores.shape[1]
    return [
        {"layer": i // heads, "head": i % heads, "score": round(float(scores.flatten()[i]), 4)} for i in order
    ]


def report(
    model: Any,
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096),
    needles: int = 100,
    windows: int | None = 64,
) -> dict[str, Any]:
    """Everything the card states, as a JSON-able dict; prints a line per figure to stderr as it goes."""
    out: dict[str, Any] = {"bits_per_byte": {}, "needle_recall": []}

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    for length in lengths:
        value = bits_per_byte(model, length, windows)
        out["bits_per_byte"][str(length)] = round(value, 4)
        say(f"length {length}: {value:.4f} bits per byte")
        for distractors in (0, 3):
            entry = needle_recall(model, length, needles, distractors=distractors)
            out["needle_recall"].append(entry)
            depths = entry["by_depth"]
            say(
                f"length {length}: recall {entry['recall']:.3f}, {distractors} distractors, by depth {depths}"
            )
    for name, alphabet in (("printable", PRINTABLE), ("alphanumeric", ALPHANUMERIC)):
        match, previous = induction_scores(model, alphabet=alphabet)
        first, second = repeat_gain(model, alphabet=alphabet)
        out[f"repeated_{name}"] = {
            "induction_heads": top_heads(match),
            "previous_byte_heads": top_heads(previous, 3),
            "first_copy_bpb": round(first, 3),
            "second_copy_bpb": round(second, 3),
        }
        say(f"repeated {name} bytes: {out[f'repeated_{name}']}")
    out["retrieval_heads"] = top_heads(retrieval_scores(model))
    say(f"retrieval heads {out['retrieval_heads']}")
    return out


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m foveate.organisms.reader.evaluate",
        description="Bits per byte, needle recall, heads of a byte-level model.",
    )
    p.add_argument("--model", type=Path, help="Hugging Face folder (default: the shipped reader)")
    p.add_argument("--run", type=Path, help="a training run: its last checkpoint")
    p.add_argument("--lengths", default="512,1024,2048,4096")
    p.add_argument("--needles", type=int, default=100, help="per length and number of distractors")
    p.add_argument("--windows", type=int, default=64, help="text windows per length; 0 = all")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--json", type=Path, help="write the report here")
    a = p.parse_args(argv)
    torch.set_num_threads(a.threads)
    try:
        from transformers import LlamaForCausalLM
    except ImportError as error:
        raise ImportError("evaluation runs transformers models: pip install 'foveate[hf]'") from error
    from foveate import organisms
    from foveate.organisms.reader.train import export

    if a.run:
        folder = a.run / "exported"
        export(a.run, folder)
    else:
        folder = a.model or organisms.path("reader")
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32").eval()
    result = report(model, tuple(int(n) for n in a.lengths.split(",")), a.needles, a.windows or None)
    text = json.dumps(result, indent=1)
    print(text)
    if a.json:
        temp = a.json.with_name(a.json.name + ".tmp")
        temp.write_text(text + "\n", encoding="utf-8")
        os.replace(temp, a.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
