"""What each pass that exists for speed brings: steps with it and without it, interleaved.

    python -m tools.bench.what_pays                          # every pass, where it works
    python -m tools.bench.what_pays --only order --models resnet20 vgg16 --variants dfa

``ratio`` is the median of the paired ratios of a step with the pass to one without, between its
quartiles; ``MiB`` is what one step allocates at most, with and without. Passes without which
nothing would be saved (cuts, zero tangents) are not switched off.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from grapefx.passes.runner import without
from tools.bench import models
from tools.bench.measure import peak_memory, period
from tools.bench.models import MODELS, VARIANTS, Step, make
from tools.common import cli
from tools.common.table import Table
from tools.common.timing import interleaved, median_ms, ratios, seconds

TABLE = Table(
    "what", "network", "variant", "with, ms:", "without, ms:", "ratio:", "quartiles", "MiB"
)


@dataclass(frozen=True)
class Feature:
    """Something for speed: what it is, how it is switched off, where to look at it.

    ``off`` names the pass that is left out; ``options`` are compile options that do without it.
    """

    what: str
    models: tuple[str, ...]
    variants: tuple[str, ...]
    off: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def without(self, variant: str) -> Iterator[None]:
        """Networks compiled inside do without it."""
        options, steps = VARIANTS[variant]
        changed = {variant: (options | self.options, steps)}
        off = [self.off] if self.off else []
        with without(*off), mock.patch.dict(models.VARIANTS, changed):
            yield


FEATURES: dict[str, Feature] = {
    "masks": Feature(
        "input gradients that nobody reads are not computed (passes/graph/prune.py)",
        ("cnn", "resnet20"), ("dfa",), "prune_masks",
    ),
    "join": Feature(
        "a product and its tangent's as one (passes/peephole/join_products.py)",
        ("mlp8x1024", "mlp32x256"), ("grape", "grape 1/8"),
        "join_products",
    ),
    "bias": Feature(
        "a product's bias is added where it is read (passes/peephole/late_bias.py)",
        ("mlp8x1024", "mlp3x1024", "mlp32x256"), ("bp", "dfa"),
        "late_bias",
    ),
    "pools": Feature(
        "max pooling without scatter (passes/peephole/pooling.py)",
        ("lenet", "cnn"), ("bp", "dfa", "grape"), "tile_pools",
    ),
    "order": Feature(
        "cotangents in the memory order of saved planes (passes/peephole/channels_last.py)",
        ("resnet20", "vgg16"), ("dfa", "grape"),
        "channels_last",
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


def compare(
    feature: Feature, model: str, variant: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of a step by round and MiB, "with" the feature and "without" it."""
    batch = 32 if model == "vgg16" else 128
    torch.compiler.reset()
    steps: dict[str, Step] = {}
    for how in ("with", "without"):
        with feature.without(variant) if how == "without" else contextlib.nullcontext():
            steps[how] = make(model, variant, batch)
            for _ in range(2 * period(variant) + 1):
                steps[how]()
    times = interleaved({k: functools.partial(seconds, s) for k, s in steps.items()}, rounds)
    return times, {k: peak_memory(step, period(variant)) for k, step in steps.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table, a line as soon as it is known."""
    p = cli.parser("tools.bench.what_pays", __doc__)
    p.add_argument("--only", nargs="+", choices=list(FEATURES))
    p.add_argument("--models", nargs="+", choices=list(MODELS), metavar="MODEL")
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    p.add_argument("--rounds", type=cli.count(2, "quartiles need "), default=20)
    a = p.parse_args(argv)
    warnings.simplefilter("ignore")
    print(TABLE.head())
    for name in a.only or FEATURES:
        feature = FEATURES[name]
        for model in a.models or feature.models:
            for variant in a.variants or feature.variants:
                times, peaks = compare(feature, model, variant, a.rounds)
                low, middle, high = ratios(times["with"], times["without"])
                cells = [f"{median_ms(t):.1f}" for t in times.values()]
                cells += [f"{middle:.2f}", f"{low:.2f}-{high:.2f}"]
                cells += [", ".join(f"{p:.1f}" for p in peaks.values())]
                print(TABLE.line(feature.what, model, variant, *cells), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
