"""Small trained models shipped with the library, in Hugging Face format, and the scripts that trained them.

    import foveate as fv
    model, tokenizer = fv.organisms.load("reader")
    viewer, scenes = fv.organisms.load("viewer")

`reader` is a byte-level causal language model (Llama architecture, 2.4 M parameters, context 4096) that reads
Python and answers key-value questions about what it read; its card is
``foveate/organisms/reader/weights/README.md``. `viewer` is a small window transformer (Swin, 0.6 M parameters) that
finds, names and counts handwritten digits in scenes; its card is ``foveate/organisms/viewer/weights/README.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from foveate.organisms.reader.data import ByteTokenizer

if TYPE_CHECKING:
    from foveate.organisms.viewer.model import Viewer
    from foveate.organisms.viewer.scenes import Scenes

_HERE = Path(__file__).resolve().parent
_NAMES = ("reader", "viewer")

__all__ = ["ByteTokenizer", "load", "names", "path"]


def names() -> tuple[str, ...]:
    """Names of the organisms that `load` accepts.

    >>> names()
    ('reader', 'viewer')
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


@overload
def load(name: Literal["reader"] = "reader") -> tuple[Any, ByteTokenizer]: ...
@overload
def load(name: Literal["viewer"]) -> tuple[Viewer, Scenes]: ...
def load(name: str = "reader") -> tuple[Any, Any]:
    """An organism in eval mode, float32, on CPU, and what makes its inputs.

    Args:
        name: "reader": a transformers model and its tokenizer; "viewer": a `viewer.model.Viewer` and the
            `viewer.scenes.Scenes` that it was trained on.

    Errors: ImportError naming the extra when transformers is missing (reader) or scikit-learn, once scenes are drawn
    (viewer); ValueError for an unknown name.

    >>> model, tokenizer = load("reader")
    >>> ids = tokenizer.encode("import os\\n")
    >>> viewer, scenes = load("viewer")
    >>> found = viewer.find(scenes.sample(0, 1, held_out=True).images)[0]
    """
    folder = path(name)
    if name == "viewer":
        from foveate.organisms.viewer.train import load as load_viewer

        return load_viewer(folder)
    try:
        from transformers import LlamaForCausalLM
    except ImportError as error:
        raise ImportError("reader is a transformers model: pip install 'foveate[hf]'") from error
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    return model.eval(), ByteTokenizer()
