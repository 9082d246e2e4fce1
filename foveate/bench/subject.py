"""The model under comparison: loaded from local files only, with what the tasks must know of it."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.bench.errors import CompareError
from foveate.bench.mechanisms import Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A causal language model and its tokenizer.

    ``bytes_are_tokens``: the organism ``reader``, whose token ids are byte values; else a fast transformers
    tokenizer. ``context``: the most tokens the model was made for, None if its configuration does not say.
    ``shape``: how many query and key/value heads each layer has.
    """

    name: str
    model: Any
    tokenizer: Any
    bytes_are_tokens: bool
    context: int | None
    shape: Shape
    facts: dict[str, Any]
    keeps_logits: bool

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, keep: int = 0, use_cache: bool = False) -> torch.Tensor:
        """Next-token logits (1, n, vocabulary) of ids (n,), or of the last ``keep`` positions only."""
        options: dict[str, Any] = {"use_cache": use_cache}
        if self.keeps_logits and keep:
            options["logits_to_keep"] = keep
        out = self.model(input_ids=ids[None].to(self.model.device), **options).logits  # (1, n or keep, V)
        return out[:, -keep:] if keep else out


def _fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:  # whole of a small file, both ends of a large one
            digest.update(file.read(1 << 20))
            file.seek(max(path.stat().st_size - (1 << 20), 0))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


def _check_directory(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(spec, ["reader"], n=1, cutoff=0.6)
        hint = (
            f"; did you mean '{near[0]}'?"
            if near
            else "; give the directory of a transformers model, or 'reader'"
        )
        raise CompareError(f"--model {spec}: no such directory{hint}")
    if not path.is_dir():
        raise CompareError(
            f"--model {spec}: a file; give the directory that holds config.json and *.safetensors"
        )
    if not (path / "config.json").is_file():
        raise CompareError(
            f"--model {spec}: no config.json in it, so it is not a transformers model directory"
        )
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompareError(f"--model {spec}: its config.json cannot be read: {error}") from error
    if not any(path.glob("*.safetensors")):
        raise CompareError(
            f"--model {spec}: no *.safetensors weights in it (other weight formats are not loaded)"
        )
    return path


def load_subject(spec: str, dtype: str = "float32") -> Subject:
    """Load ``reader`` or a local transformers directory: no network, no foreign code, safetensors only.

    Raises:
        CompareError: no such directory, not a causal language model, no fast tokenizer, damaged files.
    """
    if dtype not in DTYPES:
        raise CompareError(f"--dtype {dtype}: accepted {', '.join(DTYPES)}")
    if spec == "reader":
        from foveate import organisms

        try:
            model, tokenizer = organisms.load("reader")
        except (OSError, ValueError) as error:
            raise CompareError(f"--model reader: {error}") from error
        fingerprint, path, by_bytes = _fingerprint(organisms.path("reader")), "reader", True
    else:
        directory = _check_directory(spec)
        model, tokenizer = _load_directory(spec, directory, dtype)
        fingerprint, path, by_bytes = _fingerprint(directory), str(directory), False
    model = model.to(DTYPES[dtype]).eval()
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    if not heads:
        raise CompareError(
            f"--model {spec}: its configuration names no num_attention_heads, so it cannot be restricted"
        )
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    context = getattr(config, "max_position_embeddings", None)
    facts = {
        "name": spec if spec == "reader" else Path(spec).expanduser().resolve().name,
        "path": path,
        "type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": getattr(config, "num_hidden_layers", None),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "context": context,
        "vocabulary": getattr(config, "vocab_size", None),
        "dtype": dtype,
        "fingerprint": fingerprint,
    }
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    return Subject(facts["name"], model, tokenizer, by_bytes, context, Shape(heads, kv_heads), facts, keeps)


def _load_directory(spec: str, directory: Path, dtype: str) -> tuple[Any, Any]:
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=DTYPES[dtype],
        )
    except Exception as error:  # transformers raises anything here; the user needs the reason on one line
        raise CompareError(
            f"--model {spec}: cannot be loaded as a causal language model: {_first(error)}"
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise CompareError(f"--model {spec}: its tokenizer cannot be loaded: {_first(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise CompareError(
            f"--model {spec}: its tokenizer is not a fast one (tokenizer.json), needed to count bytes"
        )
    return model, tokenizer


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:300]
