"""Attention kernels: times against libraries on a GPU, and builds for GPUs that are not there.

    python eval/attention.py                            # all suites on the GPU; rows of this device in attention.json
    python eval/attention.py --suites steer --only SDXL
    python eval/attention.py --enable                   # shapes with >= 5 % gain become the default (enabled.json)
    python eval/attention.py --compile-only             # every configuration for sm_80, 89, 90; kernels_compile.json

Contestants alternate; times are medians. ``eager`` calls from Python as a sampler does, ``graph`` replays a CUDA graph
of the same calls, where launching costs nothing. Needs torch, triton and this repository alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from attention_cases import Case, plans

HERE = Path(__file__).resolve().parent
RECORDS, BUILDS = HERE / "attention.json", HERE / "kernels_compile.json"
ENABLED = HERE.parent / "stepdistill" / "kernels" / "enabled.json"
PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100-SXM4-80GB": (312e12, 2.04e12)}
"""FLOP/s in bfloat16 and bytes/s, by what stands in the device's name (vendor's data sheets)."""
GAIN = 1.05
LIBRARIES = ("sdpa", "flex", "ours (xformers)", "eager", "compiled", "naive")
CALLS = 10
"""Calls between two clock readings."""


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda; cpu is timed only if asked for by name")
    parser.add_argument("--dtype", default=None, choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--suites", nargs="+", default=["steer", "rope", "sparse", "dense"])
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--enable", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    given = parser.parse_args()
    if given.compile_only:
        compile_all(BUILDS if given.out == RECORDS else given.out)
    elif given.enable:
        enable(given.out)
    else:
        if given.device.startswith("cuda") and not torch.cuda.is_available():
            parser.error("no CUDA device here; --compile-only needs none, --device cpu times the CPU")
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """Time every case of the suites; rows of this device and dtype in the records are replaced, case by case."""
    device = torch.device(given.device)
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    kept = json.loads(given.out.read_text())["rows"] if given.out.is_file() else []
    for suite in given.suites:
        for plan in plans(suite):
            if given.only not in plan.name:
                continue
            torch.manual_seed(0)
            row = {"suite": suite, "device": where, "dtype": str(dtype).removeprefix("torch."), "versions": versions()}
            row |= measure_case(plan.make(device, dtype), where, given.repeats)
            kept = [r for r in kept if any(r[k] != row[k] for k in ("case", "device", "dtype"))] + [row]
            show(row)
            given.out.write_text(json.dumps({"rows": kept}, indent=1) + "\n")


def measure_case(case: Case, where: str, repeats: int) -> dict[str, Any]:
    """Errors against float64 and alternating times of all contestants that can run."""
    refused: dict[str, str] = {}
    errors: dict[str, float] = {}
    runners: dict[str, dict[str, Callable[[], float]]] = {"eager": {}, "graph": {}}
    truth = case.reference()
    with torch.no_grad():
        for name, call in case.contestants.items():
            try:
                errors[name] = (case.part(call()).double() - truth).abs().max().item()
                runners["eager"][name] = timer(call, truth.device)
                if truth.is_cuda:
                    runners["graph"][name] = timer(captured(call), truth.device)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                refused[name] = str(error).strip().splitlines()[0]
                runners["eager"].pop(name, None)
        seconds: dict[str, dict[str, list[float]]] = {}
        for how, named in runners.items():
            seconds[how] = {name: [] for name in named}
            for _ in range(repeats):
                for name, run in named.items():
                    seconds[how][name].append(run())
    peak = next((p for key, p in PEAKS.items() if key in where), None)
    floor = max(case.flops / peak[0], case.bytes / peak[1]) if peak else None
    microseconds = {how: {n: 1e6 * statistics.median(v) for n, v in named.items()} for how, named in seconds.items()}
    return {
        "case": case.name, "kernel": case.kernel, "shape": list(case.shape), "flops": case.flops, "bytes": case.bytes,
        "floor_us": None if floor is None else 1e6 * floor, "microseconds": microseconds, "max_error": errors,
        "refused": refused,
    }  # fmt: skip


def timer(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Seconds of one call, over several in a row; warms up first."""
    for _ in range(3):
        call()

    def on_cuda() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / CALLS

    def on_cpu() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return on_cuda if device.type == "cuda" else on_cpu


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def gains(row: dict[str, Any]) -> dict[str, float]:
    """Best library's time over our Triton kernel's, eager and as a graph."""
    found = {}
    for how, times in row["microseconds"].items():
        others = [t for name, t in times.items() if name.removeprefix("dense ").startswith(LIBRARIES)]
        if "ours (triton)" in times and others:
            found[how] = min(others) / times["ours (triton)"]
    return found


def show(row: dict[str, Any]) -> None:
    """One row for people."""
    print(f"{row['case']} ({row['dtype']}, {row['device']})")
    for how, times in row["microseconds"].items():
        for name, t in sorted(times.items(), key=lambda item: item[1]):
            share = f"{row['floor_us'] / t:6.1%} of floor" if row["floor_us"] else ""
            print(f"  {how:<6} {name:<22} {t:12.1f} us  {share}  error {row['max_error'][name]:.1e}")
    for name, why in row["refused"].items():
        print(f"  refused {name}: {why}")
    print("  gain over the best library:", {how: round(g, 3) for how, g in gains(row).items()} or "not measured")


def enable(records: Path) -> None:
    """Write the shapes whose gain is at least 5 %, eager and as a graph, on a GPU."""
    rows = [
        {"kernel": r["kernel"], "device": r["device"], "dtype": r["dtype"], "shape": r["shape"]}
        for r in json.loads(records.read_text())["rows"]
        if not r["device"].startswith("cpu") and len(gains(r)) == 2 and min(gains(r).values()) >= GAIN
    ]
    about = json.loads(ENABLED.read_text())["about"]
    ENABLED.write_text(json.dumps({"about": about, "rows": rows}, indent=4) + "\n")
    print(f"{len(rows)} shapes enabled in {ENABLED.name}")


def compile_all(out: Path) -> None:
    """Build every configuration for every architecture; exit status 1 if any may not be launched."""
    from stepdistill.kernels.ahead import build, cases, edges

    rows = []
    for sm in (80, 89, 90):
        for case in (*cases(sm), *(edges() if sm == 90 else ())):
            rows.append(asdict(build(case, sm)))
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
            out.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")
    bad = [r for r in rows if r["problem"]]
    print(f"{len(rows)} built, {len(bad)} with problems: {bad}")
    raise SystemExit(bool(bad))


def versions() -> dict[str, str]:
    """Of what decides about times."""
    found = {"torch": torch.__version__}
    for name in ("triton", "xformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


if __name__ == "__main__":
    main()
