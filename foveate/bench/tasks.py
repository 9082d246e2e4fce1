"""What the model can still do: bits per byte on held-out text, and recall of a needle by depth.

More kinds of questions are in `foveate.bench.ruler`.

Both tasks read one prefill: a sequence of exactly `length` tokens goes through the model once, so every
query row, the question's and the answer's included, lives under the policy. Nothing is generated. An answer
counts when the argmax at each of its positions is the right token given the right ones before (teacher
forcing); that equals greedy decoding of the whole answer under the same policy, and a policy that is meant
for the prefill alone is not helped by a dense decode.

A task the dense model cannot do says nothing about a restriction, so both are gated on the dense ceiling:
needle recall must reach `Settings.gate`, bits per byte must be below the order-0 entropy of the text's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foveate.bench.errors import CompareError
from foveate.bench.subject import Subject
from foveate.bench.texts import Text

BINS = 8
"""Equal stretches of the window in which bits per byte are also counted, to see where a restriction costs."""


@dataclass(frozen=True)
class Window:
    """Token ids (n,) and the UTF-8 bytes each token stands for (n,); 0 bytes for special tokens."""

    ids: torch.Tensor
    bytes_of: np.ndarray


@dataclass(frozen=True)
class Question:
    """Token ids (n,) whose last ``answer_len`` are the answer; ``depth`` 0.0 (start) .. 1.0 (just before).

    ``parts``: [start, stop) within the answer of what is asked for, where that is several things; else all of it.
    """

    ids: torch.Tensor
    answer_len: int
    depth: float
    parts: tuple[tuple[int, int], ...] = ()


# -------------------- bits per byte


def token_windows(subject: Subject, text: Text, length: int, count: int) -> list[Window]:
    """At most ``count`` disjoint windows of exactly ``length`` tokens, evenly spread over the text.

    Raises:
        CompareError: the text holds less than one window.
    """
    return (
        _byte_windows(text, length, count)
        if subject.bytes_are_tokens
        else _hf_windows(subject, text, length, count)
    )


def _byte_windows(text: Text, length: int, count: int) -> list[Window]:
    data = np.frombuffer(text.data, dtype=np.uint8)
    count = min(count, len(data) // length)
    if count < 1:
        raise CompareError(
            f"--text {text.name}: {len(data)} bytes, too short for one window of --lengths {length}"
        )
    starts = np.linspace(0, len(data) - length, count).astype(int) if count > 1 else np.zeros(1, int)
    ones = np.ones(length)
    return [Window(torch.from_numpy(data[s : s + length].astype(np.int64)), ones) for s in starts]


def _hf_windows(subject: Subject, text: Text, length: int, count: int) -> list[Window]:
    sample = text.body[: 1 << 16]
    per_token = len(sample) / max(len(subject.tokenizer(sample, add_special_tokens=False)["input_ids"]), 1)
    span = math.ceil(per_token * length * 1.3) + 64  # characters, with room for denser places
    count = max(min(count, len(text.body) // span), 1)
    starts = np.linspace(0, max(len(text.body) - span, 0), count).astype(int)
    windows = []
    for start in starts:
        back = text.body.rfind("\n", max(start - 200, 0), start)  # the start of a line, if one is near
        at = back + 1 if back >= 0 else int(start)
        chunk = text.body[at : at + 2 * span]
        coded = subject.tokenizer(chunk, return_offsets_mapping=True)
        if len(coded["input_ids"]) < length:
            found = len(coded["input_ids"])
            raise CompareError(
                f"--text {text.name}: about {found} tokens, too short for one window of --lengths {length}"
            )
        ids = torch.tensor(coded["input_ids"][:length])
        # bytes up to each character, then bytes each token adds to what is spelled so far
        upto = np.concatenate([[0], np.cumsum([len(c.encode("utf-8")) for c in chunk])])
        ends = np.maximum.accumulate([end for _, end in coded["offset_mapping"][:length]])
        windows.append(Window(ids, np.diff(upto[ends], prepend=0).astype(float)))
    return windows


def window_bits(logits: torch.Tensor, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes of one window in ``BINS`` stretches: two arrays (BINS,).

    Token t >= 1 costs -log2 p(token t | tokens before t) bits; token 0 is given, not predicted.

    Args:
        logits: (n, vocabulary), position t predicts token t + 1.
    """
    n = len(window.ids)
    nats = torch.cat(
        [
            torch.nn.functional.cross_entropy(
                logits[a : min(a + 512, n - 1)].float(), window.ids[a + 1 : min(a + 513, n)], reduction="none"
            )
            for a in range(0, n - 1, 512)
        ]
    )  # (n - 1,)
    bits = nats.double().numpy() / math.log(2)
    stretch = np.arange(1, n) * BINS // n
    bins = np.bincount(stretch, weights=bits, minlength=BINS)
    return bins, np.bincount(stretch, weights=window.bytes_of[1:], minlength=BINS)


@dataclass(frozen=True)
class Bits:
    """Bits and bytes of several windows, both (windows, BINS)."""

    bits: np.ndarray
    bytes: np.ndarray

    @property
    def per_byte(self) -> float:
        return float(self.bits.sum() / self.bytes.sum())


def paired_difference(
    mechanism: Bits, dense: Bits, seed: int = 0, draws: int = 2000
) -> tuple[float, float | None, float | None]:
    """Bits per byte lost against dense on the same windows, with a 95 % bootstrap interval over windows.

    difference = sum(bits_mechanism - bits_dense) / sum(bytes). The interval draws windows with replacement,
    so it is about other windows of the same text; None with fewer than 3 windows.
    """
    lost = (mechanism.bits - dense.bits).sum(1)  # (W,)
    size = dense.bytes.sum(1)
    value = float(lost.sum() / size.sum())
    if len(lost) < 3:
        return value, None, None
    pick = np.random.default_rng(seed).integers(len(lost), size=(draws, len(lost)))
    drawn = lost[pick].sum(1) / size[pick].sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return value, float(low), float(high)


# -------------------- needle


def questions(
    subject: Subject, text: Text, length: int, depths: Sequence[float], per_depth: int, seed: int
) -> list[Question]:
    """``per_depth`` seeded questions at each depth, each exactly ``length`` tokens long, answer included.

    ``reader`` is asked in the grammar it was trained on (`foveate.organisms.reader.data.needle`); any other
    model gets a pass key: a sentence hidden in the text, asked for at the end.
    """
    make = _reader_question if subject.bytes_are_tokens else _passkey_question
    rng = np.random.default_rng([seed, length])
    return [make(subject, text, length, depth, rng) for depth in depths for _ in range(per_depth)]


def _reader_question(
    subject: Subject, text: Text, length: int, depth: float, rng: np.random.Generator
) -> Question:
    from foveate.organisms.reader import data

    try:
        ids, answer = data.needle(
            length, depth, rng, text.data, distractors=0
        )  # one key, as for other models
    except ValueError as error:
        raise CompareError(f"task needle at --lengths {length}: {error}") from error
    return Question(torch.from_numpy(ids), answer.stop - answer.start, depth)


def _passkey_question(
    subject: Subject, text: Text, length: int, depth: float, rng: np.random.Generator
) -> Question:
    key = "".join(str(d) for d in rng.integers(10, size=5))

    def code(part: str) -> list[int]:
        return list(subject.tokenizer(part, add_special_tokens=False)["input_ids"])

    start = list(subject.tokenizer("")["input_ids"])  # what the tokenizer puts before every text, often <bos>
    head = start + code("Somewhere in the text below is a pass key. Remember it.\n\n")
    needle = code(f"\nThe pass key is {key}. Remember it: {key} is the pass key.\n")
    ask = "\n\nWhat is the pass key? The pass key is"
    question, asked = code(ask), code(f"{ask} {key}")
    answer = asked[len(question) :] if asked[: len(question)] == question else code(f" {key}")
    fill = length - len(head) - len(needle) - len(question) - len(answer)
    if fill < 0 or not answer:
        raise CompareError(
            f"task needle at --lengths {length}: too short to hold a pass key and its question"
        )
    at = int(rng.integers(max(len(text.body) - 16 * fill, 0) + 1))
    hay = code(text.body[at : at + 16 * fill])
    hay = (hay * math.ceil(fill / max(len(hay), 1)))[:fill]  # a short text is repeated
    cut = round(depth * fill)
    ids = head + hay[:cut] + needle + hay[cut:] + question + answer
    return Question(torch.tensor(ids), len(answer), depth)


def recalled(logits: torch.Tensor, question: Question) -> list[bool]:
    """For each part of the answer, whether the argmax at every position of it is the answer's token.

    Args:
        logits: (answer_len + 1, vocabulary), of the last answer_len + 1 positions; the last one predicts
        nothing asked.
    """
    answer = question.ids[-question.answer_len :]
    right = (logits[: question.answer_len].argmax(-1).to(answer.device) == answer).tolist()
    return [all(right[low:high]) for low, high in question.parts or ((0, question.answer_len),)]


def is_recalled(logits: torch.Tensor, question: Question) -> bool:
    """True when every part of the answer is right."""
    return all(recalled(logits, question))


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson interval of a proportion.

    >>> [round(x, 2) for x in wilson(20, 20)]
    [0.84, 1.0]
    """
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)
