"""Interleaved step times, floors, peak memory and compile time."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from grapefx.analysis.device import DeviceModel
from grapefx.torch_compat import inductor_counts
from tools.bench.compile_time import compile_seconds
from tools.bench.models import PLAIN, VARIANTS, Step, make, peers
from tools.common.results import Row
from tools.common.timing import interleaved, median_ms, ratios, seconds


def period(variant: str) -> int:
    """Steps that make up one measurement."""
    return VARIANTS[variant][1] if variant in VARIANTS else 1


def paired(
    name: str,
    variants: Sequence[str],
    *,
    batch: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    steps: dict[str, Step] | None = None,
    bytes_of: dict[str, float] | None = None,
    calibrate: bool = True,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each variant in each round: "step", "forward", "update" and "calibration".

    In a round every variant runs once, in shuffled order; ``steps`` receives the steps. The two
    halves are timed apart only where one step is a period. ``bytes_of`` receives what ``moved``
    would find, of those variants of which nothing came from Inductor's cache on disk. Without
    ``calibrate`` no calibration step is compiled and timed.
    """
    own = steps if steps is not None else {}
    for v in variants:
        own[v] = make(name, v, batch)
        counts = []
        for _ in range(2 * period(v) + 1):
            with inductor_counts(compiled=True) as found:
                own[v]()
            counts.append(found)
        if bytes_of is not None and not any(c.cached for c in counts):
            bytes_of[v] = mean_bytes([c.bytes for c in counts], v)
    for v in variants:
        if calibrate and _calibrates(v):
            calibration_step(own[v])

    def measure(v: str) -> dict[str, float]:
        start = clock()
        if period(v) > 1:
            for _ in range(period(v)):
                own[v]()
            found = {"step": (clock() - start) / period(v)}
        else:
            loss = own[v].forward()
            middle = clock()
            loss.backward()
            end = clock()
            found = {"step": end - start, "forward": middle - start, "update": end - middle}
        if calibrate and _calibrates(v):
            found["calibration"] = seconds(lambda: calibration_step(own[v]), clock)
        return found

    measurements = {v: functools.partial(measure, v) for v in variants}
    kinds = ("step", "forward", "update", "calibration")
    return {
        v: {kind: [f[kind] for f in found if kind in f] for kind in kinds}
        for v, found in interleaved(measurements, rounds, warm_up=2).items()
    }


def calibration_step(step: Step) -> None:
    """One step with exact gradients, from which the feedback maps are refitted."""
    with step.net.calibration():  # type: ignore[operator]
        step()


def _calibrates(variant: str) -> bool:
    return variant == "grape"  # once is enough: a calibration step is the same for all


def products(net: Any, batch: int) -> dict[str, float]:
    """FLOPs of the products in a step of each kind, counted on the step graph itself."""
    plan = net.plan
    out = {}
    for kind in plan.kinds():
        step = plan.graph(kind)
        inputs = []
        for node in step.placeholders():
            val = node.meta["val"]
            # every symbolic dim stands for the batch, or for the samples that carry tangents
            rows = plan.rows(batch) if node.meta.get("grapefx_role") == "noise" else batch
            shape = [rows if isinstance(s, torch.SymInt) else s for s in val.shape]
            inputs.append(torch.zeros(shape, dtype=val.dtype))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            step.gm(*inputs)
        out[kind] = float(counter.get_total_flops())
    return out


def variant_products(net: Any, variant: str, batch: int) -> float:
    """FLOPs of products in a mean step."""
    flops = products(net, batch)
    if variant == "grape k=8":
        return flops["align"] / 8 + flops["update"] * 7 / 8
    return next(flops[k] for k in ("align", "update", "calibration") if k in flops)


def moved(name: str, variant: str, batch: int) -> float:
    """Bytes that a mean step's kernels and library calls read and write.

    As Inductor counts them: every operand of every kernel once, in a cache or not.
    """
    torch.compiler.reset()
    step = make(name, variant, batch)
    counts = []
    for _ in range(min(2, period(variant))):
        with inductor_counts() as found:
            step()
        counts.append(found.bytes)
    return mean_bytes(counts, variant)


def mean_bytes(counts: Sequence[int], variant: str) -> float:
    """Of a period's first step and another one, as they were compiled: the mean of all."""
    n = period(variant)
    return counts[0] if n == 1 else (counts[0] + (n - 1) * counts[1]) / n


def peaks() -> DeviceModel:
    """What this machine sustains now, of a product of 1,024 x 1,024 and of its memory.

    The best of some tries, with torch's present number of threads.
    """
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    x = torch.ones(2**24)  # 64 MiB: larger than the caches
    y = torch.empty_like(x)

    def best(call: Callable[[], object], tries: int = 20) -> float:
        return min(seconds(call) for _ in range(tries))

    copied = best(lambda: torch.add(x, 1.0, out=y))
    rate = {"float32": 2 * 1024**3 / best(lambda: a @ b.T)}
    return DeviceModel("here", rate, rate, 2 * x.nbytes / copied, launch_overhead=0.0)


def peak_memory(step: Step, count: int) -> float:
    """Most MiB that ``count`` steps hold above a network without gradients, by the allocator.

    It knows only the sizes of blocks that it gave out under a profiler, so a step goes first.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            step()
            step.clear()
            with record_function("from here"):
                pass
            for _ in range(count):
                step()
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    start = next(e["ts"] for e in events if e.get("name") == "from here")
    changes = sorted(
        (e["ts"], e["args"]["Bytes"])
        for e in events
        if e.get("name") == "[memory]" and e.get("ts", start) > start
    )
    return max(itertools.accumulate((change for _, change in changes), initial=0)) / 2**20


def run_model(
    name: str,
    variants: Sequence[str],
    batch: int,
    rounds: int,
    *,
    clock: Callable[[], float],
    memory: bool,
    count_bytes: bool,
    calibrate: bool,
    compile_time: bool,
) -> list[Row]:
    """One row a variant."""
    bytes_of: dict[str, float] = {}
    torch.compiler.reset()  # else torch.compile takes other sizes for dynamic, or gives up
    steps: dict[str, Step] = {}
    everything = [*PLAIN, *peers(name), *variants]
    times = paired(
        name,
        everything,
        batch=batch,
        rounds=rounds,
        clock=clock,
        steps=steps,
        bytes_of=bytes_of,
        calibrate=calibrate,
    )
    exact = make(name, "bp", batch, backend="eager")
    exact()
    reference = variant_products(exact.net, "bp", batch)
    rows = []
    for v in everything:
        ratio = ratios(times[v]["step"], times["compiled"]["step"])
        row: Row = {"model": name, "variant": v, "batch": batch}
        for key, values in times[v].items():
            row[f"{key}_ms"] = median_ms(values) if values else None
        row |= {"ratio": ratio.median, "low": ratio.low, "high": ratio.high, "floor": None}
        if v in VARIANTS:
            mine = variant_products(steps[v].net, v, batch)
            row["floor"] = mine / reference
            net: Any = steps[v].net
            maps = net.plan.maps if v != "bp" else ()
            row["maps_mib"] = sum(m.bytes for m in maps) / 2**20
            row["gflop"] = mine / 1e9
        if memory:
            row["peak_mib"] = peak_memory(steps[v], period(v))
        rows.append(row)
    steps.clear()
    compiled = [r for r in rows if r["variant"] == "compiled" or r["variant"] in VARIANTS]
    for row in compiled if count_bytes else ():
        v = row["variant"]
        if v not in bytes_of:
            bytes_of[v] = moved(name, v, batch)
        row["moved_mib"] = bytes_of[v] / 2**20
        row["floor_bytes"] = bytes_of[v] / bytes_of["compiled"]
    for row in compiled if compile_time else ():
        row["compile_s"] = compile_seconds(name, row["variant"], batch)
    return rows
