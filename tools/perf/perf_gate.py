"""Compare the compiler's deterministic figures with those that were recorded.

    make perf                        compare; exit 1 on any change that was not accepted
    make perf ARGS=--accept          record the present figures
    make perf ARGS=--wall            also time steps against compiled BP (never fails)

A regression fails, and so does an improvement: recorded, it cannot be lost unnoticed. Figures are
kept by torch's minor version, since Inductor's kernels are its own; with a torch that has none
recorded the figures are printed and nothing is compared. Exit codes: 0, 1 (changed), 2 (usage).
"""

from __future__ import annotations

import json
import random
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.bench.measure import paired
from tools.common import cli
from tools.common.table import Table
from tools.perf.perf_measure import MODELS, Figures, measure

EXPECTED = Path(__file__).resolve().parent / "expected"
MARGINS = {"pass_calls": 0.05}  # everything else must be equal
ALARM = 1.10  # wall time: the whole interval above the recorded ratio by so much


@dataclass(frozen=True)
class Change:
    """One figure that is not what was recorded; None: not there."""

    where: str
    figure: str
    before: int | None
    after: int | None

    @property
    def worse(self) -> bool:
        """Every figure is a cost."""
        return (self.after or 0) > (self.before or 0)

    def __str__(self) -> str:
        by = ""
        if self.before and self.after is not None:
            by = f" ({100 * (self.after - self.before) / self.before:+.1f} %)"
        word = "WORSE " if self.worse else "better"
        return f"{word}  {self.where:28} {self.figure:40} {self.before} -> {self.after}{by}"


def expected_path(folder: Path) -> Path:
    """Where the figures of this torch are."""
    return folder / f"torch-{'.'.join(torch.__version__.split('.')[:2])}.json"


def flat(figures: Figures) -> Iterator[tuple[tuple[str, str], int]]:
    """(where, figure) and value; nodes by phase and operator are figures of their own."""
    for where, values in figures.items():
        for name, value in values.items():
            if isinstance(value, dict):
                yield from (((where, f"{name}: {op}"), n) for op, n in value.items())
            else:
                yield (where, name), value


def compare(before: Figures, after: Figures) -> list[Change]:
    """What changed beyond its margin; totals first, since they say most."""
    old, new = dict(flat(before)), dict(flat(after))
    changes = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        margin = MARGINS.get(key[1], 0.0)
        if a is None or b is None or abs(b - a) > margin * a:
            changes.append(Change(*key, a, b))
    return sorted(changes, key=lambda c: (not c.worse, c.figure.startswith("nodes")))


def bootstrap(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Median of the paired ratios, with its 95 % interval."""
    pick = random.Random(0)
    medians = sorted(statistics.median(pick.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[draws // 40], medians[-draws // 40]


def wall(rounds: int = 60) -> dict[str, tuple[float, float, float]]:
    """Step time over compiled BP's, interleaved in this process."""
    found = paired("mlp3x1024", ["compiled", "dfa", "grape"], batch=128, rounds=rounds)
    base = found.pop("compiled")["step"]
    return {
        f"mlp3x1024/{v}": bootstrap([a / b for a, b in zip(t["step"], base, strict=True)])
        for v, t in found.items()
    }


def markdown(changes: Sequence[Change]) -> str:
    """A table for a pull request."""
    if not changes:
        return "No deterministic figure changed."
    rows: list[tuple[object, ...]] = [
        ("worse" if c.worse else "better", c.where, f"`{c.figure}`", c.before, c.after)
        for c in changes[:60]
    ]
    if len(changes) > 60:
        rows.append(("", f"and {len(changes) - 60} more"))
    return Table("", "where", "figure", "before:", "after:").markdown(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = cli.parser("tools.perf.perf_gate", __doc__)
    parser.add_argument("--accept", action="store_true", help="record the present figures")
    parser.add_argument("--wall", action="store_true", help="time steps too (report only)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--expected", type=Path, default=EXPECTED)
    parser.add_argument("--replacement", type=Path, help="write the new file here when it differs")
    parser.add_argument("--markdown", type=Path, help="write the changes as a table")
    args = parser.parse_args(argv)
    whole = args.models == list(MODELS)
    if args.accept and not whole:
        parser.error("--accept records all models: leave --models out")
    warnings.simplefilter("ignore")
    figures = measure(args.models)
    timed = wall() if args.wall else {}
    path = expected_path(args.expected)
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    times = {k: list(v) for k, v in timed.items()} or kept.get("wall", {})
    text = json.dumps({"torch": torch.__version__, "figures": figures, "wall": times}, indent=1)
    for name, (mid, low, high) in timed.items():
        line = f"wall    {name:28} {mid:.2f} x compiled BP, 95 % in [{low:.2f}, {high:.2f}]"
        if name in kept.get("wall", {}):
            recorded = kept["wall"][name][0]
            line += f"; recorded {recorded:.2f}" + (
                "  ALARM: slower by more than 10 %" if low > ALARM * recorded else ""
            )
        print(line)
    if args.accept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        print(f"recorded {sum(1 for _ in flat(figures))} figures in {path}")
        return 0
    if not kept:
        print(f"no figures recorded for torch {torch.__version__}: nothing to compare; --accept")
        return 0
    recorded = {k: v for k, v in kept["figures"].items() if k.split("/")[0] in args.models}
    ours = figures
    if not whole:  # calls depend on what ran before in the process
        for table in (recorded, ours):
            for values in table.values():
                values.pop("pass_calls", None)
    changes = compare(recorded, ours)
    for c in changes:
        print(c)
    if args.markdown:
        args.markdown.write_text(markdown(changes) + "\n")
    if not changes:
        print(f"{sum(1 for _ in flat(ours))} figures as recorded")
        return 0
    print(f"{len(changes)} figures changed; if they should, record them: make perf ARGS=--accept")
    if args.replacement:
        args.replacement.write_text(text + "\n")
        print(f"the replacement of {path} is {args.replacement}")
    else:
        print(f"the replacement of {path}:\n{text}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
