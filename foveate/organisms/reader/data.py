"""Text of the Python standard library, and key-value needles hidden in it: all the data the organism `reader`
ever saw.

Bytes are tokens: id = byte value, 0..255. The text is whatever ``*.py`` the running interpreter ships,
without its own tests, the bundled 2to3 and pip, the code page tables of ``encodings``; the modules in
`HELD_OUT` are never trained on.

A needle is one comment line,

    # key kapo=48213

with a pronounceable four-letter key (consonant, vowel, twice: 11,025 of them) and five random digits. The
first line of a key defines it; a later line with the same key is a query, and its five digits are the answer.
"""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np

HELD_OUT = frozenset(
    {
        "asyncio.tasks",
        "calendar",
        "concurrent.futures.process",
        "csv",
        "difflib",
        "email.message",
        "fractions",
        "heapq",
        "http.cookiejar",
        "imaplib",
        "ipaddress",
        "json.decoder",
        "logging.config",
        "mailbox",
        "multiprocessing.pool",
        "pathlib",
        "shlex",
        "statistics",
        "tarfile",
        "textwrap",
        "unittest.loader",
        "urllib.request",
        "xml.dom.minidom",
        "zipfile",
    }
)
"""Module names that are never trained on; a name also holds out the submodules of a package of that name."""

_SKIP_PARTS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "lib2to3",
        "ensurepip",
        "encodings",
        "__pycache__",
    }
)

CONSONANTS = b"bcdfghjklmnpqrstvwxyz"
VOWELS = b"aeiou"
KEY_LETTERS = 4
DIGITS = 5
PREFIX, MIDDLE = b"# key ", b"="
LINE = len(PREFIX) + KEY_LETTERS + len(MIDDLE) + DIGITS + 1
"""Bytes of one needle line with its newline: 17."""
_DIGITS_AT = len(PREFIX) + KEY_LETTERS + len(MIDDLE)

ALPHABET = b"abcdefghijklmnopqrstuvwxyz0123456789"
"""What repeated lines are made of."""

TEXT, IGNORE, ANSWER, REPEAT = 0, 1, 2, 3
"""Roles of a byte in a training sequence: predicted as text, not predicted, digit of an answer, byte of a
repeated line.
"""


class ByteTokenizer:
    """Bytes <-> ids 0..255, no special tokens.

    >>> ByteTokenizer().encode("no")
    [110, 111]
    >>> ByteTokenizer().decode([110, 111])
    'no'
    """

    vocab_size = 256

    def encode(self, text: str | bytes) -> list[int]:
        """UTF-8 bytes of a str, or the bytes themselves, as a list of ids."""
        return list(text.encode("utf-8") if isinstance(text, str) else bytes(text))

    def decode(self, ids) -> str:
        """Ids (a list, array or tensor of integers in 0..255) as a str; broken UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")


def _module(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_held_out(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in HELD_OUT)


@lru_cache(maxsize=2)
def _files(held_out: bool) -> tuple[Path, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not _SKIP_PARTS.intersection(p.relative_to(root).parts))
    files = [p for p in files if not any(s in p.as_posix() for s in ("_sysconfigdata", "config-3"))]
    found = tuple(p for p in files if _is_held_out(_module(p, root)) == held_out)
    if not found:
        raise ValueError(f"no Python sources of the standard library under {root}")
    return found


def held_out_files() -> tuple[Path, ...]:
    """The standard-library files that are never trained on, sorted by path."""
    return _files(True)


def train_files() -> tuple[Path, ...]:
    """The standard-library files that training reads, sorted by path."""
    return _files(False)


@lru_cache(maxsize=2)
def stdlib_text(held_out: bool = False) -> bytes:
    """All the files, joined in path order with a form feed and a newline between them (about 0.8 MB held out,
    9 MB not).
    """
    return b"\f\n".join(p.read_bytes().replace(b"\r\n", b"\n") for p in _files(held_out))


def random_key(rng: np.random.Generator) -> bytes:
    """A pronounceable key of four letters, for example ``b"kapo"``."""
    c = rng.integers(len(CONSONANTS), size=2)
    v = rng.integers(len(VOWELS), size=2)
    return bytes([CONSONANTS[c[0]], VOWELS[v[0]], CONSONANTS[c[1]], VOWELS[v[1]]])


def random_keys(n: int, rng: np.random.Generator) -> list[bytes]:
    """`n` different keys."""
    keys: dict[bytes, None] = {}
    while len(keys) < n:
        keys[random_key(rng)] = None
    return list(keys)


def random_value(rng: np.random.Generator) -> bytes:
    """Five random digits, for example ``b"48213"``."""
    return bytes(48 + int(d) for d in rng.integers(10, size=DIGITS))


def line(key: bytes, value: bytes) -> bytes:
    """The needle line of a pair, newline included.

    >>> line(b"kapo", b"48213")
    b'# key kapo=48213\\n'
    """
    return PREFIX + key + MIDDLE + value + b"\n"


def _slice(text: bytes, n: int, rng: np.random.Generator) -> bytes:
    """`n` bytes of the text from a random place that starts a line, made to end with a newline."""
    if n <= 0:
        return b""
    if len(text) < n:
        raise ValueError(f"text: {len(text)} bytes, but {n} are needed")
    start = int(rng.integers(len(text) - n + 1))
    back = text.rfind(b"\n", max(0, start - 200), start)
    start = back + 1 if back >= 0 else start
    return text[start : start + n - 1] + b"\n"


def _snap(chunk: bytes, at: int) -> int:
    """The start of a line of `chunk` nearest before or at `at`."""
    return chunk.rfind(b"\n", 0, at) + 1


def needle(
    length: int, depth: float, rng: np.random.Generator, text: bytes, *, distractors: int = 3
) -> tuple[np.ndarray, slice]:
    """One retrieval question: real text, a hidden needle line, other keys as distractors, and the query at
    the very end.

    Args:
        length: bytes of the whole sequence, answer included; at least 17 * (distractors + 2).
        depth: 0.0 (the needle is the first line) .. 1.0 (just before the query).
        rng: source of the text's place, of keys, values and the distractors' places.
        text: the haystack, for example ``stdlib_text(held_out=True)``.
        distractors: lines with other keys and values, at uniformly random places.

    Returns:
        ids (length,) int64, and the slice of the five answer digits (the last five ids). The model is right
        when its argmax at positions ``answer.start - 1 .. answer.stop - 2`` equals ``ids[answer]``: given the
        earlier digits this is the same as greedy decoding of all five.

    >>> rng = np.random.default_rng(0)
    >>> ids, answer = needle(200, 0.5, rng, b"x = 1\\n" * 100)
    >>> len(ids), bytes(ids[answer].astype(np.uint8)).isdigit()
    (200, True)
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth: {depth}, accepted 0.0 .. 1.0")
    if distractors < 0:
        raise ValueError(f"distractors: {distractors}, accepted 0 or more")
    fill = length - LINE * (distractors + 2) + 1
    if fill < 0:
        raise ValueError(
            f"length: {length}, accepted at least {LINE * (distractors + 2) - 1} at {distractors} distractors"
        )
    chunk = _slice(text, fill, rng)
    keys = random_keys(distractors + 1, rng)
    values = [random_value(rng) for _ in keys]
    places = [_snap(chunk, round(depth * fill))] + [
        _snap(chunk, int(rng.integers(fill + 1))) for _ in keys[1:]
    ]
    ends = {0: 2 if depth > 0.5 else 0}  # at equal places the needle is the outermost line on its side
    order = sorted(range(len(keys)), key=lambda i: (places[i], ends.get(i, 1)))
    out, last = [], 0
    for i in order:
        out += [chunk[last : places[i]], line(keys[i], values[i])]
        last = places[i]
    out += [chunk[last:], line(keys[0], values[0])[:-1]]
    ids = np.frombuffer(b"".join(out), dtype=np.uint8).astype(np.int64)
    return ids, slice(length - DIGITS, length)


def _weave(
    length: int,
    inserts: list[tuple[bytes, np.ndarray]],
    at: np.ndarray,
    rng: np.random.Generator,
    text: bytes,
) -> tuple[np.ndarray, np.ndarray]:
    """Real text with whole lines (bytes, roles) inserted at the sorted places `at` of it; ids and roles, both
    (length,).

    In sequences of 1024 bytes and more a place moves back to the start of its line. In shorter ones the text
    is cut where the place is (the byte before becomes a newline, not predicted): short slices have few lines,
    and needles that stand back to back are solved by copying from a fixed distance, without reading the key.
    """
    chunk = bytearray(_slice(text, length - sum(len(b) for b, _ in inserts), rng))
    text_roles = np.zeros(len(chunk), np.int8)
    ids, roles, last = [], [], 0
    for (block, role), place in zip(inserts, at.tolist(), strict=True):
        if length >= 1024:
            place = max(last, chunk.rfind(b"\n", 0, place) + 1)
        elif place > last:
            chunk[place - 1] = 10
            text_roles[place - 1] = IGNORE
        ids += [bytes(chunk[last:place]), block]
        roles += [text_roles[last:place], role]
        last = place
    ids.append(bytes(chunk[last:]))
    roles.append(text_roles[last:])
    return np.frombuffer(b"".join(ids), dtype=np.uint8).astype(np.int64), np.concatenate(roles)


def retrieval_sequence(length: int, rng: np.random.Generator, text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A training sequence with many needles: `length` ids and their roles, both (length,).

    Between 2 and 24 lines (at most 60 % of the bytes), shared by fewer keys so that every key is asked at
    least once. Half of the longer sequences ask only in their last quarter (distances as uniform as the
    definitions' depths), the others anywhere. Text is predicted, answers are predicted and weighted,
    everything else of a needle line is not predicted, so that the model does not learn to expect needles in
    ordinary text.
    """
    n = int(rng.integers(2, max(2, min(int(0.65 * length / LINE), 24)) + 1))
    k = int(rng.integers(1, max(1, n // 2) + 1)) if rng.random() < 0.5 else max(1, n // 2)
    keys = random_keys(k, rng)
    values = [random_value(rng) for _ in keys]
    fill = length - LINE * n
    if length >= 256 and rng.random() < 0.5:  # definitions anywhere, questions late
        which = np.concatenate([rng.permutation(k), rng.integers(k, size=n - k)])
        late = rng.integers(int(0.75 * fill), fill + 1, size=n - k)
        at = np.concatenate([rng.integers(fill + 1, size=k), late])
        order = np.argsort(at, kind="stable")
        which, at = which[order], at[order]
    else:
        which = rng.permutation(np.concatenate([np.arange(k), np.arange(k), rng.integers(k, size=n - 2 * k)]))
        at = np.sort(rng.integers(fill + 1, size=n))
    inserts, seen = [], set()
    for i in which.tolist():
        role = np.full(LINE, IGNORE, np.int8)
        role[-1] = TEXT  # a line ends after its digits
        if i in seen:
            role[_DIGITS_AT : _DIGITS_AT + DIGITS] = ANSWER
        seen.add(i)
        inserts.append((line(keys[i], values[i]), role))
    return _weave(length, inserts, at, rng, text)


def repeat_sequence(length: int, rng: np.random.Generator, text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Real text with comment lines of random letters and digits that come back: the plainest induction.

    One to three strings of 8 to 32 characters, as many lines as fill 65 % of the bytes, at most 24. In a line
    that is not the first of its string all but the first three characters are predicted (REPEAT).
    """
    size = int(rng.integers(8, min(32, length // 2 - 6) + 1)) + 3
    n = max(2, min(24, int(0.65 * length / size)))
    k = int(rng.integers(1, max(1, min(3, n // 2)) + 1))
    letters = rng.integers(len(ALPHABET), size=(k, size - 3))
    blocks = [b"# " + bytes(ALPHABET[i] for i in row) + b"\n" for row in letters]
    first = np.full(size, IGNORE, np.int8)
    later = first.copy()
    later[5:-1] = REPEAT
    inserts, seen = [], set()
    for i in rng.permutation(np.arange(n) % k).tolist():
        inserts.append((blocks[i], later if i in seen else first))
        seen.add(i)
    return _weave(length, inserts, np.sort(rng.integers(length - n * size + 1, size=n)), rng, text)


def text_sequence(length: int, rng: np.random.Generator, text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """`length` consecutive bytes from anywhere in the text, and their roles (all TEXT)."""
    start = int(rng.integers(len(text) - length + 1))
    ids = np.frombuffer(text, dtype=np.uint8, count=length, offset=start).astype(np.int64)
    return ids, np.zeros(length, np.int8)


def batch(
    count: int, length: int, retrieval: float, rng: np.random.Generator, text: bytes, *, repeats: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """ids and roles, both (count, length + 1).

    A fraction `retrieval` of the rows has inserted lines (of these a fraction `repeats` repeated random
    lines, the others needles), the rest is plain text.
    """
    rows = []
    for _ in range(count):
        if rng.random() >= retrieval:
            make = text_sequence
        else:
            make = repeat_sequence if rng.random() < repeats else retrieval_sequence
        rows.append(make(length + 1, rng, text))
    ids, roles = zip(*rows, strict=True)
    return np.stack(ids), np.stack(roles)


def stretched_positions(
    count: int, length: int, span: int, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Rotary positions (count, length): a `share` of the rows jumps ahead at up to three places, ending
    before `span`.

    So distances up to the full context are met while sequences are still short (Zhu et al., "PoSE: Efficient
    Context Window Extension of LLMs via Positional Skip-wise Training", 2023).
    """
    positions = np.tile(np.arange(length), (count, 1))
    for row in positions:
        if span > length and rng.random() < share:
            cuts = np.sort(rng.integers(1, length, size=int(rng.integers(1, 4))))
            total = int(rng.integers(span - length + 1))
            jumps = np.diff(
                np.concatenate([[0], np.sort(rng.integers(total + 1, size=len(cuts) - 1)), [total]])
            )
            for cut, jump in zip(cuts.tolist(), jumps.tolist(), strict=True):
                row[cut:] += jump
    return positions
