"""Peak resident memory of one call, in this process.

What is measured: the process's resident set at its highest while the call ran, minus its resident set just
before. On Linux the kernel keeps that high-water mark (``VmHWM``) and resets it on request (``5`` written to
``/proc/self/clear_refs``), so no sampling can miss a short peak. Before the call, free heap pages are handed
back (``malloc_trim``), otherwise memory kept by the allocator from an earlier call would hide what this one
needs. Where the mark cannot be reset, a thread samples the resident set every 2 ms (method ``"rss
samples"``); where there is no ``/proc`` the figure is None (method ``"not measured"``), never a guess.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """``bytes``: additional resident memory at the highest point, None if not measured; ``method``: how."""

    bytes: int | None
    method: str


def _status_kib(field: str) -> int | None:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return None


def _trim() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to hand back
        ctypes.CDLL(None).malloc_trim(0)


def _reset_mark() -> bool:
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    now, mark = _status_kib("VmRSS"), _status_kib("VmHWM")
    return (
        now is not None and mark is not None and mark <= now + 4096
    )  # the reset took effect (4 MiB of slack)


def _sampled(call: Callable[[], Any]) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    done = threading.Event()
    high = 0

    def watch() -> None:
        nonlocal high
        while not done.is_set():
            high = max(high, int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * page)
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return high


def peak_of(call: Callable[[], Any]) -> Peak:
    """Run ``call`` once and say how much resident memory it added at its highest point.

    >>> import torch
    >>> peak = peak_of(lambda: torch.ones(16 << 20).sum())      # 64 MiB of float32
    >>> peak.bytes is None or peak.bytes > 48 << 20
    True
    """
    if not _STATUS.exists():
        call()
        return Peak(None, "not measured")
    _trim()
    before = (_status_kib("VmRSS") or 0) * 1024
    if _reset_mark():
        call()
        return Peak(max((_status_kib("VmHWM") or 0) * 1024 - before, 0), "high-water mark")
    return Peak(max(_sampled(call) - before, 0), "rss samples")
