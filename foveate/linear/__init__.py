"""Linear: a state instead of a cache: the chunked scan, feature maps, memories that learn while reading."""

from __future__ import annotations

from foveate.linear.neural_memory import MemoryState, memorise, memory_read, surprise

__all__ = ["MemoryState", "memorise", "memory_read", "surprise"]
