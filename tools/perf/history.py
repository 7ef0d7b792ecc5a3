"""Plot the recorded figures over the commits that changed them.

    python -m tools.perf.history --out perf.png [--figure flops kernels]

Each commit that touched ``tools/perf/expected`` is one point; a figure is summed over all models
and methods, relative to its first point.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from tools import ROOT
from tools.common import cli

FOLDER = "tools/perf/expected"
FIGURES = (
    "flops", "critical_path_flops", "saved_bytes", "peak_bytes", "kernels", "bytes_moved",
    "pass_calls",
)  # fmt: skip


def git(root: Path, *args: str) -> str:
    """Output of a git command."""
    return subprocess.run(
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
    ).stdout


def history(root: Path) -> list[tuple[str, dict[str, int]]]:
    """(commit, sums by figure), oldest first; the newest torch of each commit."""
    points = []
    for commit in git(root, "log", "--reverse", "--format=%h", "--", FOLDER).split():
        files = git(root, "ls-tree", "--name-only", commit, f"{FOLDER}/").split()
        if not files:
            continue
        newest = max(files, key=lambda f: [int(n) for n in Path(f).stem[6:].split(".")])
        figures = json.loads(git(root, "show", f"{commit}:{newest}"))["figures"]
        points.append((commit, {f: sum(v.get(f, 0) for v in figures.values()) for f in FIGURES}))
    return points


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = cli.parser("tools.perf.history", __doc__)
    parser.add_argument("--out", type=Path, default=Path("perf.png"))
    parser.add_argument("--figure", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(argv)
    points = history(args.root)
    if not points:
        print(f"no commit has recorded figures under {FOLDER}")
        return 1
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name in args.figure:
        first = points[0][1][name] or 1
        axis.plot([c for c, _ in points], [v[name] / first for _, v in points], "o-", label=name)
    axis.set(title="Recorded figures, all models and methods", ylabel="relative to the first")
    axis.tick_params(axis="x", rotation=60)
    axis.legend()
    figure.savefig(args.out, dpi=110)
    for commit, values in points:
        print(commit, *(f"{k}={v}" for k, v in values.items()))
    print(f"plotted in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
