"""Text to measure on: a file, a directory of text files, or held-out modules of the standard library."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from foveate.bench.errors import CompareError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".csv", ".tsv", ".html", ".xml", ".tex", ".c", 
            ".cpp", ".h", ".java", ".js", ".ts", ".go", ".rs", ".toml", ".yaml", ".yml")  # fmt: skip
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Text:
    """``name`` as the user gave it, the ``body``, and how many files it came from."""

    name: str
    body: str = field(repr=False)
    files: int = 1

    @property
    def data(self) -> bytes:
        return self.body.encode("utf-8")

    def facts(self) -> dict[str, object]:
        """JSON-ready: name, files, bytes, sha256 and the order-0 entropy of its bytes in bits."""
        data = self.data
        return {
            "name": self.name,
            "files": self.files,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "byte_entropy": order0_entropy(data),
        }


def order0_entropy(data: bytes) -> float:
    """Bits per byte of a model that knows byte frequencies and nothing else.

    H = - sum_b p_b log2 p_b over the byte values present.

    >>> order0_entropy(b"aabb"), order0_entropy(b"aaaa")
    (1.0, 0.0)
    """
    total = len(data)
    return abs(sum(n / total * math.log2(total / n) for n in Counter(data).values()))


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CompareError(f"--text {path}: {size >> 20} MiB; at most {MAX_BYTES >> 20} MiB are read")
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CompareError(f"--text {path}: not UTF-8 text (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise CompareError(f"--text {path}: {error.strerror or error}") from error


def load_text(spec: str) -> Text:
    """Load ``stdlib``, a file, or every text file of a directory (sorted by path, joined by form feeds).

    Raises:
        CompareError: nothing there, empty, not UTF-8, or more than 64 MiB.
    """
    if spec == "stdlib":
        from foveate.organisms.reader import data as reader_data

        return Text(
            "stdlib",
            reader_data.stdlib_text(held_out=True).decode("utf-8"),
            len(reader_data.held_out_files()),
        )
    path = Path(spec).expanduser()
    if path.is_file():
        text = Text(spec, _read(path))
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not found:
            raise CompareError(
                f"--text {spec}: no text files in this directory (looked for {' '.join(SUFFIXES)})"
            )
        total = sum(p.stat().st_size for p in found)
        if total > MAX_BYTES:
            raise CompareError(
                f"--text {spec}: {len(found)} files with {total >> 20} MiB; at most {MAX_BYTES >> 20} MiB "
                "are read, give a smaller directory or one file"
            )
        text = Text(spec, "\f\n".join(_read(p) for p in found), len(found))
    else:
        raise CompareError(f"--text {spec}: no such file or directory (or the word 'stdlib')")
    if not text.body.strip():
        raise CompareError(f"--text {spec}: empty")
    return text
