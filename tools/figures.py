"""Draws the papers' claims next to what grapefx measures: docs/img/theory-*.png.

    python -m tools.figures [--out docs/img] [--only NAME]

The data are those of ``tests/theory``: every point comes from the function in
``tests/theory/measure.py`` that a test calls, every line from ``tests/theory/closed_forms.py``.
The numbers behind each picture are printed. Bars are two standard errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from tests.theory import closed_forms as theory
from tests.theory import measure
from tests.theory.measure import BATCHES, NS, Mean
from tools import ROOT
from tools.common import cli

COLOURS = ("#2f6690", "#c8553d", "#3a7d44", "#7d5ba6")
MARKS = ("o", "s", "^", "D")


def points(ax: Axes, xs: Iterable[float], ys: Iterable[Mean], k: int, label: str) -> None:
    """Measured means with bars, printed as well."""
    xs, ys = list(xs), list(ys)
    values, bars = [y.value for y in ys], [2 * y.se for y in ys]
    ax.errorbar(xs, values, bars, fmt=MARKS[k], color=COLOURS[k], ms=4, capsize=2, label=label)
    short = label.split(": slope")[0]
    for x, y in zip(xs, ys, strict=True):
        print(f"    {short}: {x:g} -> {y.value:.4g} +- {y.se:.2g}")


def line(ax: Axes, xs: Iterable[float], ys: Iterable[float], k: int, label: str = "") -> None:
    """A closed form."""
    xs, ys = list(xs), list(ys)
    ax.plot(xs, ys, color=COLOURS[k], lw=1, alpha=0.8, label=label or None)


def finish(ax: Axes, title: str, x: str, y: str, scales: str = "log log") -> None:
    """Title, labels, scales, legend."""
    across, up = scales.split()
    ax.set(title=title, xlabel=x, ylabel=y, xscale=across, yscale=up)
    ax.grid(alpha=0.25)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7)


def slope_label(name: str, xs: Iterable[float], ys: Iterable[Mean]) -> str:
    """The name with the fitted log-log slope."""
    fitted = measure.slope([float(x) for x in xs], list(ys))
    print(f"    {name}: slope {fitted.value:.3f} +- {fitted.se:.3f}")
    return f"{name}: slope {fitted.value:.2f} ± {fitted.se:.2f}"


def sphere(ax: Axes) -> None:
    """GrAPE 2026 eq. 11."""
    ns = list(range(2, 129))
    line(ax, ns, [theory.sphere_mean(n) / theory.sphere_bound(n) for n in ns], 0, "closed form")
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in (2, 4, 8, 32, 128):
        p = torch.randn(100_000, n, generator=generator, dtype=torch.float64)
        bound = theory.sphere_bound(n)
        found.append(Mean.of(p[:, 0].abs() / p.norm(dim=1) / bound))
    points(ax, (2, 4, 8, 32, 128), found, 0, "sampled")
    ax.axhline(1, color="k", lw=0.8, ls="--", label="bound of eq. 11")
    title = "GrAPE 2026 eq. 11 holds: E|s$_1$| ≥ √(2/πn)"
    finish(ax, title, "n", "E|s$_1$| / √(2/πn)", "log linear")


def bound(ax: Axes) -> None:
    """GrAPE 2026 eq. 4: E cos times sqrt(n), so that bound and bracket are level lines."""
    for k, spectrum in enumerate(("rank one", "decaying", "flat")):
        got = [measure.expected_cosine(spectrum, n, "gaussian") for n in NS]
        scaled = [Mean(e.value * n**0.5, e.se * n**0.5) for n, (_, e) in zip(NS, got, strict=True)]
        points(ax, NS, scaled, k, f"{spectrum} J")
        label = "eq. 4 for each" if k == 0 else ""
        line(ax, NS, [theory.cosine_bound(j) * j.shape[1] ** 0.5 for j, _ in got], k, label)
    got = [measure.expected_cosine("two coordinates", n, "rademacher") for n in NS]
    scaled = [Mean(e.value * n**0.5, e.se * n**0.5) for n, (_, e) in zip(NS, got, strict=True)]
    points(ax, NS, scaled, 3, "random signs, worst J")
    ax.axhspan((2 / torch.pi) ** 0.5, 1, color="k", alpha=0.07, label="bracket [√(2/π), 1]")
    ax.axhline(0.5**0.5, color=COLOURS[3], lw=0.8, ls="--", label="Khintchine √(1/2)")
    ax.set_ylim(0, 1.25)
    title = "GrAPE 2026 eq. 4 holds for Gaussian noise, loose by ‖J‖$_F$/‖J‖$_2$"
    finish(ax, title, "n", "√n · E cos$_F$(J, J^), one sample", "log linear")
    ax.legend(fontsize=6, ncols=2, loc="lower left")


def concentration(ax: Axes) -> None:
    """GrAPE 2026 appendix B.3."""
    found = measure.concentration()
    stds = []
    for c in found.values():
        v = Mean.of((c - c.mean()) ** 2)
        stds.append(Mean(v.value**0.5, v.se / (2 * v.value**0.5)))
    points(ax, BATCHES, stds, 0, slope_label("Std of the mean cosine", BATCHES, stds))
    one = (1 / 32 - theory.sphere_mean(32) ** 2) ** 0.5
    line(ax, BATCHES, [one * b**-0.5 for b in BATCHES], 0, "Std(C) / √B")
    title = "GrAPE 2026 B.3: Std of the mean of B cosines is O(1/√B)"
    finish(ax, title, "B", "Std")


def batch_mean(ax: Axes) -> None:
    """The cosine of a batch mean."""
    for k, noise in enumerate(("gaussian", "rademacher")):
        found = measure.batch_mean(noise)
        points(ax, BATCHES, [m.cosine for m in found.values()], k, f"cos of the mean, {noise}")
        ratio = theory.noise_to_signal(32, noise)
        line(ax, BATCHES, [theory.batch_cosine(ratio, b) for b in BATCHES], k)
    means = [Mean.of(c) for c in measure.concentration().values()]
    points(ax, BATCHES, means, 2, "mean of the cosines (GrAPE 2026 B.3)")
    line(ax, BATCHES, [theory.sphere_mean(32)] * len(BATCHES), 2)
    title = "Averaging J^ first: cos = (1 + (n±1)/B)$^{-1/2}$ → 1"
    finish(ax, title, "B (n = 32)", "cosine with J", "log linear")


def composition(ax: Axes) -> None:
    """GrAPE 2026 lemma B.2 along a run of grape."""
    run = measure.alignment_run()
    low = [theory.composed(t.learned, t.estimated)[0] for t in run]
    for k, layer in enumerate(sorted({t.layer for t in run})):
        here = [(t.true, b) for t, b in zip(run, low, strict=True) if t.layer == layer]
        ax.plot([b for _, b in here], [c for c, _ in here], MARKS[k], ms=2.5, color=COLOURS[k],
                label=f"layer {layer}")  # fmt: skip
    margin = min(t.true - b for t, b in zip(run, low, strict=True))
    print(
        f"    {len(run)} triples, least margin {margin:.3g}, {sum(b > 0 for b in low)} bounds > 0"
    )
    ax.plot([-1, 1], [-1, 1], "k--", lw=0.8, label="equality")
    title = "GrAPE 2026 lemma B.2: cos(B, J) ≥ ab - √(1-a²)√(1-b²)"
    finish(ax, title, "bound from cos(B, J^), cos(J^, J)", "cos$_F$(B, J)", "linear linear")


def variance_alpha(ax: Axes) -> None:
    """FDFA 2024 proposition 2, and a map that runs."""
    found = measure.variance_in_alpha()
    values = [m for m, _ in found.values()]
    points(ax, found, values, 0, slope_label("from B = W", found, values))
    unit = found[1.0][1]
    line(ax, found, [e for _, e in found.values()], 0, "a² Var(FG-A)")
    points(ax, measure.RUNNING, [measure.running(a).variance for a in measure.RUNNING], 1,
           "B left to run")  # fmt: skip
    line(ax, found, [theory.running_factor(a) * unit for a in found], 1, "a/(2-a) Var(FG-A)")
    title = "FDFA 2024 prop. 2: Var(FDFA) has slope 2 from B = W, 1 if B runs"
    finish(ax, title, "a", "variance of the gradient")


def _variance(ax: Axes, which: str) -> None:
    for k, method in enumerate(("fg-w", "fg-a")):
        found = measure.variance_in_size(method, which)
        values = [m for m, _ in found.values()]
        points(ax, NS, values, k, slope_label(method, NS, values))
        line(ax, NS, [e for _, e in found.values()], k)


def variance_n0(ax: Axes) -> None:
    """FDFA 2024 figure 6a."""
    _variance(ax, "n0")
    title = "FDFA 2024 prop. 5, 6: Var(FG-W) = O(n$_0$), Var(FG-A) = O(1)"
    finish(ax, title, "n$_0$ (n$_1$ = 16)", "variance of a gradient entry")


def variance_n1(ax: Axes) -> None:
    """FDFA 2024 figure 6b."""
    _variance(ax, "n1")
    found = measure.variance_in_size("fg-a", "n1", True)
    values = [m for m, _ in found.values()]
    points(ax, NS, values, 2, slope_label("fg-a, W$^{(2)}$/√n$_1$", NS, values))
    line(ax, NS, [e for _, e in found.values()], 2)
    title = "FDFA 2024 prop. 5, 6: Var(FG-W), Var(FG-A) = O(n$_1$)"
    finish(ax, title, "n$_1$ (n$_0$ = 16)", "variance of a gradient entry")


def penultimate(ax: Axes) -> None:
    """FDFA 2024 eq. 13."""
    found = measure.approach()
    steps = range(1, found.shape[1] + 1)
    shown = steps[::8]
    points(ax, shown, [Mean.of(found[:, t - 1]) for t in shown], 0, "10 chains, fdfa, a = 0.05")
    line(ax, steps, [1 - 0.95**t for t in steps], 0, "1 - (1-a)$^t$")
    ax.axhline(1, color="k", lw=0.8, ls="--", label="B = W$^{(L)}$")
    title = "FDFA 2024 eq. 13: E[B$^{(L-1)}$] → W$^{(L)}$"
    finish(ax, title, "step", "⟨B, W⟩ / ‖W‖²", "linear linear")


def depth(ax: Axes) -> None:
    """GrAPE 2024 figure 2: against the batch, for each depth."""
    for k, d in enumerate(measure.DEPTHS):
        sizes = measure.SIZES
        found = [measure.first_layer(d, b) for b in sizes]
        points(ax, sizes, [f.found.cosine for f in found], k, f"{d} layers behind")
        line(
            ax,
            sizes,
            [theory.batch_cosine(f.ratio, b) for f, b in zip(found, sizes, strict=True)],
            k,
        )
    found = [measure.first_layer(8, b, "per_layer") for b in sizes]
    points(ax, sizes, [f.found.cosine for f in found], 3, "8, a tangent pass each")
    line(ax, sizes, [theory.batch_cosine(f.ratio, b) for f, b in zip(found, sizes, strict=True)], 3)
    title = "GrAPE 2024 fig. 2: first layer's cosine, up with B, down with depth"
    finish(ax, title, "batch size B (one JVP)", "cos$_F$(J$_1$, J^$_1$)", "log linear")


def iterations(ax: Axes) -> None:
    """GrAPE 2024 figure 2: against the JVPs averaged."""
    for k, b in enumerate(measure.SIZES):
        f = measure.first_layer(2, b)
        steps = range(1, len(f.cumulative) + 1)
        ax.plot(steps, f.cumulative, MARKS[k], ms=2.5, color=COLOURS[k], label=f"B = {b}")
        print(f"    B = {b}: {float(f.cumulative[0]):.3f} -> {float(f.cumulative[-1]):.3f}")
        line(ax, steps, [theory.batch_cosine(f.ratio, b * t) for t in steps], k)
    title = "GrAPE 2024 fig. 2: averaging t JVPs is a batch of B t (2 layers behind)"
    finish(ax, title, "JVPs averaged, t", "cos$_F$(J$_1$, mean J^$_1$)", "log linear")


FIGURES: dict[str, Callable[[Axes], None]] = {
    "sphere": sphere,
    "bound": bound,
    "concentration": concentration,
    "batch-mean": batch_mean,
    "composition": composition,
    "variance-alpha": variance_alpha,
    "variance-n0": variance_n0,
    "variance-n1": variance_n1,
    "penultimate": penultimate,
    "depth": depth,
    "iterations": iterations,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all, or one."""
    parser = cli.parser("tools.figures", __doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--only", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 9})
    for name, draw in FIGURES.items():
        if args.only in (None, name):
            figure, ax = plt.subplots(figsize=(4.8, 3.2), layout="constrained")
            path = args.out / f"theory-{name}.png"
            print(path)
            draw(ax)
            figure.savefig(path, dpi=110, metadata={"Software": None})
            plt.close(figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
