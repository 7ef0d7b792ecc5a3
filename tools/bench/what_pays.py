"""What each pass that exists for speed brings: steps with it and without it, interleaved.

    python tools/bench/what_pays.py                          # every pass, where it works
    python tools/bench/what_pays.py --only order --models resnet20 vgg16 --variants dfa

``ratio`` is the median of the paired ratios of a step with the pass to one without, between its
quartiles; ``MiB`` is what one step allocates at most, with and without. Passes without which
nothing would be saved (cuts, zero tangents) are not switched off.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools" / "bench"), str(ROOT / "tools"), str(ROOT)]

import bench_models  # noqa: E402
from bench_measure import peak_memory  # noqa: E402
from bench_models import MODELS, VARIANTS, Step, make  # noqa: E402


@dataclass(frozen=True)
class Feature:
    """Something for speed: what it is, what stands for it when it is off, where to look at it.

    ``off`` maps "module.function" to what is called instead; ``options`` are compile options that
    do without it.
    """

    what: str
    models: tuple[str, ...]
    variants: tuple[str, ...]
    off: dict[str, Callable[..., Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def without(self, variant: str) -> Iterator[None]:
        """Networks compiled inside do without it."""
        options, period = VARIANTS[variant]
        with contextlib.ExitStack() as stack:
            for name, instead in self.off.items():
                stack.enter_context(mock.patch(name, instead))
            changed = {variant: (options | self.options, period)}
            stack.enter_context(mock.patch.dict(bench_models.VARIANTS, changed))
            yield


def nothing(*_: Any) -> int:
    """A pass that finds nothing to do."""
    return 0


FEATURES: dict[str, Feature] = {
    "masks": Feature(
        "input gradients that nobody reads are not computed (passes/graph/prune.py)",
        ("cnn", "resnet20"), ("dfa",), {"grapefx.plan.prune_masks": nothing},
    ),
    "join": Feature(
        "a product and its tangent's as one (passes/peephole/join_products.py)",
        ("mlp8x1024", "mlp32x256"), ("grape", "grape 1/8"),
        {"grapefx.lowering.join_products": nothing},
    ),
    "bias": Feature(
        "a product's bias is added where it is read (passes/peephole/late_bias.py)",
        ("mlp8x1024", "mlp3x1024", "mlp32x256"), ("bp", "dfa"),
        {"grapefx.lowering.add_bias_late": nothing},
    ),
    "pools": Feature(
        "max pooling without scatter (passes/peephole/pooling.py)",
        ("lenet", "cnn"), ("bp", "dfa", "grape"), {"grapefx.lowering.tile_pools": nothing},
    ),
    "order": Feature(
        "cotangents in the memory order of saved planes (passes/peephole/channels_last.py)",
        ("resnet20", "vgg16"), ("dfa", "grape"),
        {"grapefx.runtime.parallel.channels_last": nothing},
    ),
    "signs": Feature(
        'random signs instead of normal numbers (noise="rademacher")',
        ("mlp8x1024", "resnet20"), ("grape",), options={"noise": "gaussian"},
    ),
    "sizes": Feature(
        "fixed batch sizes for the first variant (dynamic=None)",
        ("cnn",), ("dfa",), options={"dynamic": True},
    ),
}  # fmt: skip


Pair = tuple[float, float]


def compare(feature: Feature, model: str, variant: str, rounds: int) -> tuple[list[Pair], Pair]:
    """Seconds of a step with the feature and without, by round; MiB with and without."""
    batch = 32 if model == "vgg16" else 128
    torch.compiler.reset()
    steps: list[Step] = []
    for off in (False, True):
        with feature.without(variant) if off else contextlib.nullcontext():
            steps.append(make(model, variant, batch))
            for _ in range(2 * VARIANTS[variant][1] + 1):
                steps[-1]()
    found = []
    for _ in range(rounds):
        seconds = [0.0, 0.0]
        for k in random.sample((0, 1), 2):
            start = time.perf_counter()
            steps[k]()
            seconds[k] = time.perf_counter() - start
        found.append((seconds[0], seconds[1]))
    most = [peak_memory(step, VARIANTS[variant][1]) for step in steps]
    return found, (most[0], most[1])


def main(argv: list[str] | None = None) -> int:
    """Print a markdown table, a line as soon as it is known."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--only", nargs="+", choices=list(FEATURES))
    p.add_argument("--models", nargs="+", choices=list(MODELS), metavar="MODEL")
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    p.add_argument("--rounds", type=int, default=20)
    a = p.parse_args(argv)
    if a.rounds < 2:
        p.error("--rounds: quartiles need 2 or more")
    warnings.simplefilter("ignore")
    print("| what | network | variant | with, ms | without, ms | ratio | quartiles | MiB |")
    print("| --- | --- | --- | ---: | ---: | ---: | --- | --- |")
    for name in a.only or FEATURES:
        feature = FEATURES[name]
        for model in a.models or feature.models:
            for variant in a.variants or feature.variants:
                found, peaks = compare(feature, model, variant, a.rounds)
                on, off = (1e3 * statistics.median(s) for s in zip(*found, strict=True))
                low, middle, high = statistics.quantiles([x / y for x, y in found], n=4)
                print(
                    f"| {feature.what} | {model} | {variant} | {on:.1f} | {off:.1f} "
                    f"| {middle:.2f} | {low:.2f}-{high:.2f} | {peaks[0]:.1f}, {peaks[1]:.1f} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
