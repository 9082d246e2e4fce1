"""Small trained models shipped with the library, in Hugging Face format, and the scripts that trained them.

    import foveate as fv
    model, tokenizer = fv.organisms.load("reader")

`reader` is a byte-level causal language model (Llama architecture, 2.4 M parameters, context 4096) that reads
Python and answers key-value questions about what it read; its card is
``foveate/organisms/reader/weights/README.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.organisms.reader.data import ByteTokenizer

_HERE = Path(__file__).resolve().parent
_NAMES = ("reader",)

__all__ = ["ByteTokenizer", "load", "names", "path"]


def names() -> tuple[str, ...]:
    """Names of the organisms that `load` accepts.

    >>> names()
    ('reader',)
    """
    return _NAMES


def path(name: str = "reader") -> Path:
    """Folder of an organism's weights, config and card; a Hugging Face model path.

    Raises:
        ValueError: unknown name, or the weights are not in this installation.
    """
    if name not in _NAMES:
        raise ValueError(f"name: {name!r}, accepted one of {', '.join(_NAMES)}")
    folder = _HERE / name / "weights"
    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"name: {name!r} has no weights in {folder}; foveate.organisms.{name}.train makes them"
        )
    return folder


def load(name: str = "reader") -> tuple[Any, ByteTokenizer]:
    """An organism and its tokenizer: a transformers model in eval mode, float32, on CPU.

    Errors: ImportError naming the extra when transformers is missing; ValueError for an unknown name.

    >>> model, tokenizer = load("reader")
    >>> ids = tokenizer.encode("import os\\n")
    """
    folder = path(name)
    try:
        from transformers import LlamaForCausalLM
    except ImportError as error:
        raise ImportError("organisms are transformers models: pip install 'foveate[hf]'") from error
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    return model.eval(), ByteTokenizer()
