"""Print what the staleness suite comes to on the torch that is installed, by kind and mode.

Run ``python tests/staleness/report.py [--all] [--torch] [pattern ...]`` in the repository: each
source in each mode. ``--all`` runs the full product; a pattern (``globals/*``) selects cases;
``--torch`` shows what ``torch.compile`` makes of them. What is not right is listed below the table,
and on the error stream as it is found.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

OUTCOMES = ("right", "refused", "wrong", "crashed", "broken")


def main() -> None:
    """Run the cases and print the table."""
    import torch

    from tests.staleness.cases import CASES, MODES, OURS, TORCH, Outcome, run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--all", action="store_true", help="with every use of every number")
    parser.add_argument("--torch", action="store_true", help="torch.compile instead of grapefx")
    options = parser.parse_args()
    front = TORCH if options.torch else OURS
    counts: Counter[tuple[str, str, str]] = Counter()
    rest = []
    for case in CASES:
        if (case.rank == 2 and not options.all) or not any(
            fnmatch.fnmatchcase(case.name, p) for p in options.patterns
        ):
            continue
        try:
            outcome = run(case, front)
        except Exception as e:
            outcome = Outcome("broken", f"the eager model: {type(e).__name__}: {e}")
        counts[case.source.kind, case.mode, outcome.name] += 1
        if outcome.name != "right":
            rest.append((outcome.name, case.name, " ".join(outcome.detail.split())[:300]))
            print(*rest[-1], sep=": ", file=sys.stderr, flush=True)
    shown = [o for o in OUTCOMES if o in OUTCOMES[:3] or any(k[2] == o for k in counts)]
    print(f"{front.name}, torch {torch.__version__}: {', '.join(shown)}")
    print(f"{'kind':14}" + "".join(f"{m:>18}" for m in MODES))
    every = {k[0] for k in counts}

    def kinds(kind: str) -> set[str]:
        return every if kind == "all" else {kind}

    for kind in [*dict.fromkeys(c.source.kind for c in CASES), "all"]:
        cells = [
            "/".join(
                str(sum(n for (k, *r), n in counts.items() if k in kinds(kind) and r == [m, o]))
                for o in shown
            )
            for m in MODES
        ]
        print(f"{kind:14}" + "".join(f"{c:>18}" for c in cells))
    for name, case, detail in sorted(rest):
        print(f"{name}: {case}: {detail}")


if __name__ == "__main__":
    main()
