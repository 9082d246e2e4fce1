"""The native engine beside the peers a user would pick, in one run: dense and windowed attention, layouts, first call.

    make bench                                  # everything; JSON and plot into benchmarks/results
    .venv/bin/python benchmarks/cpu_forward.py --quick

Peers take turns within each repetition, so that a machine whose speed drifts slows all of them alike; figures are
medians and ratios of medians. What is measured once per process (first call, memory, import) runs in fresh ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import foveate as fv
from foveate.bench.machine import environment
from foveate.core.build import build_layout
from foveate.patterns import Causal, SlidingWindow

HERE = Path(__file__).parent
SDPA = torch.nn.functional.scaled_dot_product_attention


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(peers: dict, repeats: int, budget: float) -> dict[str, float]:
    """Median seconds of each peer, one call of each per round; stops early once `budget` seconds are spent."""
    for run in peers.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in peers}
    start = time.perf_counter()
    for number in range(repeats):
        for name, run in peers.items():
            times[name].append(seconds(run))
        if number >= 2 and time.perf_counter() - start > budget:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def tensors(n: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, n, dim, generator=g).to(dtype) for _ in range(3))


def dense(n: int, heads: int, dim: int, dtype: torch.dtype, repeats: int) -> dict:
    q, k, v = tensors(n, heads, dim, dtype)
    a = torch.randn(2048, 2048, dtype=dtype)
    times = alternate(
        {
            "native": lambda: fv.attention(q, k, v, engine="native"),
            "sdpa": lambda: SDPA(q, k, v),
            "native causal": lambda: fv.attention(q, k, v, is_causal=True, engine="native"),
            "sdpa causal": lambda: SDPA(q, k, v, is_causal=True),
            "matmul 2048": lambda: a @ a,
        },
        repeats,
        budget=45,
    )
    flops = 4 * n * n * dim * heads
    rate = 2 * 2048**3 / times["matmul 2048"]
    return {
        "n": n,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": times,
        "native_over_sdpa": times["sdpa"] / times["native"],
        "native_over_sdpa_causal": times["sdpa causal"] / times["native causal"],
        "native_gflops": flops / times["native"] / 1e9,
        "matmul_gflops": rate / 1e9,
        "share_of_matmul_rate": flops / times["native"] / rate,
    }


def windowed(n: int, heads: int, dim: int, dtype: torch.dtype, repeats: int, window: int = 512) -> dict:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = tensors(n, heads, dim, dtype)
    pattern = Causal() & SlidingWindow(window)
    build = statistics.median(seconds(lambda: build_layout(pattern, n, n)) for _ in range(15))
    start = time.perf_counter()
    block_mask = create_block_mask(
        lambda b, h, i, j: (i >= j) & (i - j < window), None, None, n, n, device="cpu"
    )
    flex_mask = time.perf_counter() - start
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    flex_first = seconds(lambda: compiled(q, k, v, block_mask=block_mask))
    i = torch.arange(n)
    start = time.perf_counter()
    mask = (i[:, None] >= i[None, :]) & (i[:, None] - i[None, :] < window)
    sdpa_mask = time.perf_counter() - start
    times = alternate(
        {
            "native": lambda: fv.attention(q, k, v, pattern, engine="native"),
            "flex": lambda: compiled(q, k, v, block_mask=block_mask),
            "sdpa": lambda: SDPA(q, k, v, attn_mask=mask),
        },
        repeats,
        budget=45,
    )
    layout = pattern.layout(n)
    return {
        "n": n,
        "window": window,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": times,
        "native_over_flex": times["flex"] / times["native"],
        "native_over_sdpa_mask": times["sdpa"] / times["native"],
        "native_gflops_by_area": 4 * layout.area * dim * heads / times["native"] / 1e9,
        "mask_seconds": {
            "native layout": build,
            "flex create_block_mask": flex_mask,
            "sdpa boolean": sdpa_mask,
        },
        "flex_first_call_seconds": flex_first,
        "layout_share_of_attention": build / times["native"],
    }


FIRST_CALL = """
import json, time
import torch
import foveate as fv
q, k, v = (torch.randn(1, 8, 8192, 64) for _ in range(3))
torch.mm(q[0, 0, :64], q[0, 0, :64].T)  # torch's own start-up is not ours
pattern = fv.patterns.Causal() & fv.patterns.SlidingWindow(512)
times = []
for _ in range(8):
    start = time.perf_counter()
    fv.attention(q, k, v, pattern)
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""

LAYOUT = """
import json, time
import torch
import foveate as fv
from foveate.patterns import Causal, Sinks, SlidingWindow
fv.patterns.Causal().layout(128)  # imports
def peak_kib():  # since the last reset
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

open("/proc/self/clear_refs", "w").write("5")
before = peak_kib()
start = time.perf_counter()
layout = (Causal() & (SlidingWindow(4096) | Sinks(64))).layout(131072)
took = time.perf_counter() - start
peak = peak_kib()
print(json.dumps({"seconds": took, "extra_mib": (peak - before) / 1024, "tiles": layout.nnz, "bytes": layout.nbytes}))
"""

MEMORY = """
import json, sys
import torch
import foveate as fv

def peak_kib():  # since the last reset
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

n = int(sys.argv[1])
pattern = fv.patterns.Causal() & fv.patterns.SlidingWindow(512)
small = torch.randn(1, 8, 1024, 64)
fv.attention(small, small, small, pattern)  # library and threads
q, k, v = (torch.randn(1, 8, n, 64) for _ in range(3))
open("/proc/self/clear_refs", "w").write("5")
before = peak_kib()
out = fv.attention(q, k, v, pattern)
peak = peak_kib()
sizes = {"out_mib": out.nbytes / 2**20, "qkv_mib": 3 * q.nbytes / 2**20}
print(json.dumps({"n": n, "extra_mib": (peak - before) / 1024, **sizes}))
"""


def fresh(code: str, *arguments: str):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=HERE.parent
    )
    return json.loads(done.stdout)


def import_cost(repeats: int) -> dict:
    def once(module: str) -> float:
        return seconds(
            lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True, cwd=HERE.parent)
        )

    ours = "torch, foveate; foveate.attention, foveate.patterns, foveate.merge"
    once(ours)
    pairs = [(once("torch"), once(ours)) for _ in range(repeats)]
    return {
        "torch_seconds": statistics.median(a for a, _ in pairs),
        "foveate_seconds": statistics.median(b for _, b in pairs),
        "extra_seconds": statistics.median(b - a for a, b in pairs),
    }


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(f"dense {d['dtype']}\nover SDPA", d["native_over_sdpa"], 1.15 if d["dtype"] == "float32" else 1.4)
            for d in result["dense"]]  # fmt: skip
    rows += [(f"causal {d['dtype']}\nover SDPA", d["native_over_sdpa_causal"], None) for d in result["dense"]]
    for w in result["windowed"]:
        rows.append((f"window {w['window']} {w['dtype']}\nover FlexAttention", w["native_over_flex"], 1.8))
        rows.append((f"window {w['window']} {w['dtype']}\nover SDPA + mask", w["native_over_sdpa_mask"], 8.0))
    figure, axis = plt.subplots(figsize=(8, 0.55 * len(rows) + 1.2), layout="constrained")
    labels = [row[0] for row in rows]
    bars = axis.barh(labels, [row[1] for row in rows], color="#3b6ea5", height=0.6)
    axis.bar_label(bars, fmt="%.2fx", padding=4)
    for y, (_, _, target) in enumerate(rows):
        if target:
            axis.plot([target, target], [y - 0.38, y + 0.38], color="#c44e52", lw=2)
    axis.axvline(1, color="0.6", lw=0.8)
    axis.set_xscale("log")
    axis.set_xlim(0.8, 1.6 * max(row[1] for row in rows))
    axis.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axis.minorticks_off()
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(
        f"times as fast, N={result['n']}, 8 heads, D=64, {result['threads']} threads (red: what was aimed at)"
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=8192, help="sequence length")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in which the peers take turns")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quick", action="store_true", help="N=2048, three rounds, nothing written")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    n, repeats = (2048, 3) if options.quick else (options.n, options.repeats)
    torch.set_num_threads(options.threads)
    heads, dim = 8, 64
    result: dict = {
        "benchmark": "cpu_forward",
        "environment": environment(),
        "isa": fv.explain(*tensors(64, 1, 8, torch.float32)).splitlines()[-1].strip(),
        "batch": 1,
        "heads": heads,
        "dim": dim,
        "n": n,
        "threads": options.threads,
        "repeats": repeats,
    }
    steps = [
        (
            "dense",
            lambda: [dense(n, heads, dim, dtype, repeats) for dtype in (torch.float32, torch.bfloat16)],
        ),
        ("windowed", lambda: [windowed(n, heads, dim, torch.float32, repeats)]),
        ("first_call_seconds", lambda: [fresh(FIRST_CALL) for _ in range(3 if options.quick else 5)]),
        ("layout_131072", lambda: fresh(LAYOUT)),
        ("window_memory", lambda: [fresh(MEMORY, str(size)) for size in (16384, 32768, 65536, 131072)]),
        ("import", lambda: import_cost(3 if options.quick else 7)),
    ]
    for name, step in steps:
        print(f"{name} ...", flush=True)
        result[name] = step()
        print(json.dumps(result[name]), flush=True)
    result["first_minus_second_ms"] = 1e3 * statistics.median(
        t[0] - statistics.median(t[1:]) for t in result["first_call_seconds"]
    )
    summary = {
        **{f"dense {d['dtype']} over SDPA": d["native_over_sdpa"] for d in result["dense"]},
        **{f"dense {d['dtype']} share of matmul": d["share_of_matmul_rate"] for d in result["dense"]},
        "window over FlexAttention": result["windowed"][0]["native_over_flex"],
        "window over SDPA with mask": result["windowed"][0]["native_over_sdpa_mask"],
        "layout share of the attention": result["windowed"][0]["layout_share_of_attention"],
        "first call minus later ones, ms": result["first_minus_second_ms"],
        "layout at 131072, s": result["layout_131072"]["seconds"],
        "layout at 131072, extra MiB": result["layout_131072"]["extra_mib"],
        "window at 131072, extra MiB": result["window_memory"][-1]["extra_mib"],
        "import beyond torch, s": result["import"]["extra_seconds"],
    }
    result["summary"] = summary
    for name, value in summary.items():
        print(f"{name:<34} {value:10.3f}")
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        machine = re.sub(
            r"[^a-z0-9]+", "_", platform.processor().lower() or platform.machine().lower()
        ).strip("_")
        path = options.out / f"cpu_forward-{machine or 'cpu'}-t{options.threads}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        plot(result, path.with_suffix(".png"))
        print(f"written: {path}")


if __name__ == "__main__":
    main()
