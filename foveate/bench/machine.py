"""Where a number was measured: the environment columns every result of this project carries."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ISA_OF_INTEREST = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip


def _cpuinfo() -> dict[str, str]:
    """First processor's block of /proc/cpuinfo, lower-case keys; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    block = path.read_text(encoding="utf-8", errors="replace").strip().split("\n\n")[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def cpu_model() -> str:
    """The processor's name as the operating system tells it."""
    info = _cpuinfo()
    for key in ("model name", "hardware", "cpu model"):
        if info.get(key):
            return info[key]
    return platform.processor() or platform.machine() or "unknown"


def isa_flags() -> list[str]:
    """The instruction sets this project's kernels care about, of those the processor reports."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("features") or "").split())
    return [flag for flag in ISA_OF_INTEREST if flag in flags]


def usable_cores() -> int:
    """Cores this process may run on (its affinity, not the machine's total)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory, or None where the operating system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def version_of(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(apart_from: str = "") -> str | None:
    """Commit of the checkout, with ``+changes`` if tracked files differ from it; None outside git.

    apart_from: a folder of the checkout whose changes do not count (that of the results being written).
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    where = [".", f":(exclude){apart_from}"] if apart_from else ["."]
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no", "--", *where) else "")


def environment() -> dict[str, Any]:
    """Environment columns for a result, JSON-ready.

    Keys: cpu, cores, threads (torch's intra-op pool), isa, memory_bytes, os, python, torch, transformers,
    numpy, foveate, commit, date (UTC, ISO 8601).

    >>> row = environment()
    >>> row["cores"] >= 1 and row["threads"] >= 1 and row["date"].endswith("+00:00")
    True
    """
    import torch

    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "isa": isa_flags(),
        "memory_bytes": memory_bytes(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "numpy": version_of("numpy"),
        "foveate": version_of("foveate"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
