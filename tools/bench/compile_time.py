"""Time from the model to the end of its first step, and how it grows with depth.

    python tools/bench/compile_time.py                  # ResNet-50, 224x224, 1000 classes
    python tools/bench/compile_time.py --depths 10 20 40 80 160 320 --no-kernels

Each row is a process of its own with an empty kernel cache. ``plan`` is the capture and all passes
for every kind of step; ``first step`` everything from the model to the first gradients, kernels
compiled; ``calibration`` the first step of the second kind. ``processor`` is the first step's
processor time without compile workers, which ``--depths`` turns off: it says what grows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

VARIANTS = ("compiled", "dfa", "grape")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--model", default="resnet50", help="a torchvision classifier")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--depths", type=int, nargs="+", help="MLPs of these depths, 64 wide, instead")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    p.add_argument("--no-kernels", action="store_true", help="the passes alone, no Inductor")
    p.add_argument("--one", nargs=2, metavar=("WHAT", "VARIANT"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.one:
        print(json.dumps(measure(*args.one, batch=args.batch, kernels=not args.no_kernels)))
        return 0
    print(
        "| network | variant | plan s | first step s | calibration s | processor s | nodes |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for what in [f"mlp{d}" for d in args.depths] if args.depths else [args.model]:
        for variant in args.variants:
            row = apart(what, variant, args.batch, not args.depths, not args.no_kernels)
            cells = [row["plan"], row["first"], row["calibration"], row["processor"]]
            text = " | ".join("" if c is None else f"{c:.1f}" for c in cells)
            print(f"| {what} | {variant} | {text} | {row['nodes'] or ''} |", flush=True)
    return 0


def apart(what: str, variant: str, batch: int, workers: bool, kernels: bool) -> dict[str, Any]:
    """One row, measured in a new process without caches."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        if not workers:
            env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, __file__, "--one", what, variant, "--batch", str(batch)]
        command += [] if kernels else ["--no-kernels"]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(what: str, variant: str, *, batch: int, kernels: bool) -> dict[str, Any]:
    """Seconds of each part, in this process."""
    import torch
    from torch import nn

    import grapefx
    from grapefx.choices import resolve
    from grapefx.plan import build_plan

    if what.startswith("mlp"):
        body: list[nn.Module] = []
        for _ in range(int(what[3:])):
            body += [nn.Linear(64, 64), nn.Tanh()]
        model: nn.Module = nn.Sequential(*body, nn.Linear(64, 10))
        x = torch.randn(batch, 64)
    else:
        import torchvision

        model, x = getattr(torchvision.models, what)(weights=None), torch.randn(batch, 3, 224, 224)
    backend = "inductor" if kernels else "eager"
    row: dict[str, Any] = {"plan": None, "calibration": None, "nodes": None}
    if variant != "compiled":
        method, options = resolve(variant, {"calib_every": None})
        start = time.perf_counter()
        plan = build_plan(model, (x,), {}, method=method, options=options)
        for kind in plan.kinds():
            plan.graph(kind)
        row |= {"plan": time.perf_counter() - start, "nodes": len(plan.joint.gm.graph.nodes)}
    cpu = time.process_time()
    if variant == "compiled":
        net: Any = torch.compile(model, backend=backend)
        row["first"] = _seconds(lambda: net(x).sum().backward())
        row["processor"] = time.process_time() - cpu
        return row
    net = grapefx.compile(model, method=variant, calib_every=None, backend=backend)
    row["first"] = _seconds(lambda: net(x).sum().backward())
    row["processor"] = time.process_time() - cpu

    def calibrate() -> None:
        with net.calibration():
            net(x).sum().backward()

    row["calibration"] = _seconds(calibrate)
    return row


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
