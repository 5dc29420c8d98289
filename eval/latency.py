"""Time of few-step sampling: plain diffusers against ``stepdistill.optimize``, the same student, the same images.

    python eval/latency.py --out eval/latency.json
    python eval/latency.py --students shapes_sd_dmd2 --batches 1 --compile default --out eval/latency.json
    python eval/latency.py --device cuda --dtype bfloat16 --cuda-graph --out eval/latency.json

On one thread of a CPU the process's own time is taken, which neighbours disturb less than the wall clock.
Students are pipelines under runs/eval, which ``eval/shapes.py`` trains. Both sides take turns, 20 runs each after 3 of
warm-up. A measurement replaces its own rows in the file and leaves those of other students, batches and devices.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from common import RUNS, put_into_readme
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.evaluation.records import device_name, installed_versions
from stepdistill.exported import load_exported
from stepdistill.inference import Optimized, optimize
from stepdistill.sampling import sample_rngs

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


@dataclass(frozen=True)
class Arguments:
    """Time few-step sampling."""

    students: tuple[str, ...] = ("shapes_sd_dmd2", "shapes_sd_dmd2_4step", "shapes_sd3_dmd2", "shapes_sd3_dmd2_4step")
    """Runs, whose first seed's pipeline is taken."""
    batches: tuple[int, ...] = (1, 8)
    """Samples of a call."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """Mode of torch.compile for the optimised side."""
    cuda_graph: bool = False
    """Record the few-step loop as one CUDA graph."""
    device: str = "cpu"
    """Where."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of all weights, on both sides."""
    threads: int = 1
    """Of torch."""
    repeats: int = 20
    """Pairs of timed runs."""
    runs: Path = RUNS
    """Where the runs lie."""
    out: Path | None = None
    """JSON file to write into; the table in the project's README is written with it."""


def main(given: Arguments) -> list[dict[str, Any]]:
    """Measure, print and store."""
    torch.set_num_threads(given.threads)
    rows = [measure(name, batch, given) for name in given.students for batch in given.batches]
    if given.out is not None:
        stored = json.loads(given.out.read_text())["rows"] if given.out.is_file() else []
        fresh = {_key(row) for row in rows}
        rows = sorted([row for row in stored if _key(row) not in fresh] + rows, key=_key)
        record = {"versions": installed_versions(), "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n")
        put_into_readme("latency", table(rows))
    print(table(rows))
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["device"], row["dtype"], row["student"], row["batch"], row["compile"], row["cuda_graph"]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = (
        "| student | steps | batch | compiled | diffusers ms (p95) | ours ms (p95) | faster | with new prompts | "
        "sampler / networks | diffusers' |"
    )
    lines = [head, "|" + " --- |" * 10]
    for r in rows:
        lines.append(
            f"| {r['student']} | {r['steps']} | {r['batch']} | {r['compile']} | "
            f"{r['diffusers']['p50']:.1f} ({r['diffusers']['p95']:.1f}) | {r['ours']['p50']:.1f} "
            f"({r['ours']['p95']:.1f}) | {r['speedup']:.2f} | {r['speedup_new_prompts']:.2f} | {r['over_bare']:.3f} | "
            f"{r['diffusers_over_bare']:.2f} |"
        )
    devices = "; ".join(dict.fromkeys(f"{r['device']}, {r['dtype']}" for r in rows))
    note = (
        f"{devices}; CPU time. Medians (95th percentile) of {rows[0]['repeats']} alternating runs, ratios over pairs. "
        "Prompts are known and so encoded already, but in *with new prompts*. *sampler / networks*: a whole call over "
        "the bare evaluations of denoiser and decoder in it. Images differ by at most "
        f"{max(r['difference'] for r in rows):.1e}."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def measure(name: str, batch: int, given: Arguments) -> dict[str, Any]:
    """One student at one batch size."""
    plain, ours = load(name, given), load(name, given)
    start = time.perf_counter()
    parts = {"compile": False if given.compile == "no" else given.compile, "cuda_graph": given.cuda_graph}
    optimized = optimize(ours, **parts)
    record, numbers = plain.scheduler.config["_student"], count()
    known = prompts(next(numbers), batch)

    def stock(texts: Sequence[str]) -> Tensor:
        return plain(prompt=list(texts), **record["call"], generator=sample_rngs(0, range(batch)), output_type="pt")[0]

    def fast(texts: Sequence[str]) -> Tensor:
        return optimized.sampler.images(list(texts), sample_rngs(0, range(batch)))

    difference = float((stock(known).float() - fast(known).float()).abs().max())
    compiled_in = time.perf_counter() - start
    net = optimized.sampler.family.module
    (text, denoise, decode), (o_text, o_denoise, o_decode) = (
        segments(plain, net, lambda: stock(known), known, None),
        segments(ours, net, lambda: fast(known), known, optimized),
    )
    timed = {
        "diffusers": lambda: stock(known),
        "ours": lambda: fast(known),
        "bare": lambda: (o_denoise(), o_decode()),
        "diffusers_bare": lambda: (denoise(), decode()),
        "ours_new_prompts": lambda: fast(prompts(next(numbers), batch)),
        "text": text, "denoiser": denoise, "decode": decode,
        "ours_text": o_text, "ours_denoiser": o_denoise, "ours_decode": o_decode,
    }  # fmt: skip
    seconds = alternating(timed, given.repeats, given)
    row: dict[str, Any] = {
        "student": name,
        "steps": record["call"]["num_inference_steps"],
        "batch": batch,
        "compile": given.compile,
        "cuda_graph": given.cuda_graph,
        "device": device_name(given.device),
        "dtype": given.dtype,
        "threads": given.threads,
        "repeats": given.repeats,
        "speedup": ratio(seconds["diffusers"], seconds["ours"]),
        "speedup_new_prompts": ratio(seconds["diffusers"], seconds["ours_new_prompts"]),
        "over_bare": ratio(seconds["ours"], seconds["bare"]),
        "diffusers_over_bare": ratio(seconds["diffusers"], seconds["diffusers_bare"]),
        "difference": difference,
        "first_calls_seconds": round(compiled_in, 1),
    }
    row |= {key: {"p50": p(values, 50), "p95": p(values, 95)} for key, values in seconds.items()}
    print(
        f"{name} x {batch}: {row['speedup']:.2f} times as fast, sampler / networks {row['over_bare']:.3f}", flush=True
    )
    optimized.undo()
    return row


def load(name: str, given: Arguments) -> DiffusionPipeline:
    """A run's pipeline.

    Raises:
        FileNotFoundError: if it was never trained here.
    """
    folder = given.runs / name / "seed0" / "pipeline"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; train it: stepdistill distill {name} --out {folder.parent}")
    pipeline = load_exported(folder, getattr(torch, given.dtype)).to(given.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompts(number: int, batch: int) -> list[str]:
    """Another list of prompts for each number."""
    n = len(COLOURS)
    return [
        f"a {COLOURS[(number + i) % n]} {SHAPES[(number // n + i) % len(SHAPES)]} on a {COLOURS[(number // 48) % n]} "
        "background"
        for i in range(batch)
    ]


def segments(
    pipeline: DiffusionPipeline, net: str, call: Callable[[], object], texts: list[str], optimized: Optimized | None
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
    """Text, all denoiser evaluations, and the decoder of one call, each alone, on what they were given in it."""
    seen: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {"net": [], "vae": [], "text": []}

    def record(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            seen[key].append((args, kwargs))
            return function(*args, **kwargs)

        return wrapped

    network, vae = pipeline.components[net], pipeline.vae
    hook = network.register_forward_pre_hook(lambda m, a, k: seen["net"].append((a, k)), with_kwargs=True)
    decode, encode = vae.decode, pipeline.encode_prompt
    vae.decode, pipeline.encode_prompt = record("vae", decode), record("text", encode)
    graph = optimized is not None and optimized.sampler.cuda_graph
    if graph:
        optimized.sampler.cuda_graph = False  # or the networks would not be called from here
    try:
        call()
    finally:
        hook.remove()
        del vae.decode
        pipeline.encode_prompt = encode
        if optimized is None:
            del pipeline.encode_prompt
        elif graph:
            optimized.sampler.cuda_graph = True

    @torch.no_grad()
    def text() -> None:
        for args, kwargs in seen["text"]:
            encode(*args, **kwargs)

    @torch.inference_mode()
    def denoise() -> None:
        for args, kwargs in seen["net"]:
            network(*args, **kwargs)

    @torch.inference_mode()
    def decoded() -> None:
        for args, kwargs in seen["vae"]:
            decode(*args, **kwargs)

    return text, denoise, decoded


def alternating(timed: dict[str, Callable[[], object]], repeats: int, given: Arguments) -> dict[str, list[float]]:
    """Seconds of each, one after the other ``repeats`` times, backwards every second time; 3 rounds of warm-up."""
    clock = time.process_time if given.device == "cpu" and given.threads == 1 else time.perf_counter
    wait = torch.cuda.synchronize if given.device.startswith("cuda") else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(repeats + 3):
        for name in list(timed) if i % 2 else reversed(timed):
            wait()
            start = clock()
            timed[name]()
            wait()
            seconds[name].append(clock() - start)
    return {name: values[3:] for name, values in seconds.items()}


def ratio(a: list[float], b: list[float]) -> float:
    """Median over pairs."""
    return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 4)


def p(values: list[float], percent: int) -> float:
    """A percentile, in milliseconds."""
    return round(1e3 * statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 2)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
