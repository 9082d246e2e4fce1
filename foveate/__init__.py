"""foveate: every published attention mechanism, defined once and executed by a few fast engines.

>>> import torch, foveate as fv
>>> q = k = v = torch.randn(1, 4, 100, 32)
>>> fv.attention(q, k, v, fv.patterns.SlidingWindow(16)).shape
torch.Size([1, 4, 100, 32])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_NAMES = {
    "attention": "foveate.core.attention",
    "explain": "foveate.core.attention",
    "BlockLayout": "foveate.core.layout",
    "merge": "foveate.core.merge",
    "EngineRefusal": "foveate.core.request",
    "SoftCap": "foveate.core.scores",
    "Bias": "foveate.core.scores",
    "ALiBi": "foveate.core.scores",
    "RelativeBias": "foveate.core.scores",
    "T5Bias": "foveate.core.scores",
    "Temperature": "foveate.core.scores",
    "alibi_slopes": "foveate.core.scores",
    "Softmax": "foveate.core.normalizers",
    "SoftmaxPlusOne": "foveate.core.normalizers",
    "Sigmoid": "foveate.core.normalizers",
    "ReLU": "foveate.core.normalizers",
}
_MODULES = {
    "patterns": "foveate.patterns",
    "selectors": "foveate.selectors",
    "cache": "foveate.cache",
    "composite": "foveate.composite",
    "compress": "foveate.compress",
    "linear": "foveate.linear",
    "dist": "foveate.dist",
    "layers": "foveate.layers",
    "vision": "foveate.vision",
    "hf": "foveate.hf",
    "organisms": "foveate.organisms",
    "statistics": "foveate.core.statistics",
}

__all__ = [
    "ALiBi",
    "Bias",
    "BlockLayout",
    "EngineRefusal",
    "ReLU",
    "RelativeBias",
    "Sigmoid",
    "SoftCap",
    "Softmax",
    "SoftmaxPlusOne",
    "T5Bias",
    "Temperature",
    "__version__",
    "alibi_slopes",
    "attention",
    "cache",
    "composite",
    "compress",
    "dist",
    "explain",
    "hf",
    "layers",
    "linear",
    "merge",
    "organisms",
    "patterns",
    "selectors",
    "statistics",
    "vision",
]

if TYPE_CHECKING:
    from foveate import (
        cache,
        composite,
        compress,
        dist,
        hf,
        layers,
        linear,
        organisms,
        patterns,
        selectors,
        vision,
    )
    from foveate.core import statistics
    from foveate.core.attention import attention, explain
    from foveate.core.layout import BlockLayout
    from foveate.core.merge import merge
    from foveate.core.normalizers import ReLU, Sigmoid, Softmax, SoftmaxPlusOne
    from foveate.core.request import EngineRefusal
    from foveate.core.scores import ALiBi, Bias, RelativeBias, SoftCap, T5Bias, Temperature, alibi_slopes


def __getattr__(name: str):
    """Import what is asked for; with the first name of the core all of the core, so that no call pays for it later."""
    if name not in _NAMES and name not in _MODULES:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    for part in ("patterns", "selectors", "engines", "attention"):
        importlib.import_module(f"foveate.core.{part}")
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    else:
        value = importlib.import_module(_MODULES[name])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
