"""Count what the tests and the recorded measurements cover, and write it into docs/trust.md.

    python -m tools.trust            print the table
    python -m tools.trust --write    and put it between the markers of docs/trust.md

Operators and architectures are counted in the results that ``tools.op_rules`` and
``tools.coverage`` left, with the torch that they ran on; tests, situations and random models in the
suite as it is.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools import ROOT
from tools.common import cli, results
from tools.common.table import Table

PAGE = ROOT / "docs" / "trust.md"
START, END = "<!-- counts:start -->", "<!-- counts:end -->"
TABLE = Table("what", "number:", "of it", "counted in")
Row = tuple[str, str, str, str]


def records(name: str) -> list[dict[str, Any]]:
    """The latest row of each operator or architecture in a results file."""
    path = ROOT / "docs" / "results" / f"{name}.jsonl"
    return list(results.latest(path, lambda r: f"{r.get('zoo')} {r['name']}").values())


def operators() -> Row:
    """Operators of torch's sample database, by how their tangent was checked."""
    found = records("op_rules")
    verdicts = Counter(r["verdict"] for r in found)
    samples = sum(r["samples"] for r in found)
    on = ", ".join(sorted({r["torch"] for r in found if "torch" in r}))
    said = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
    return (
        f"operators of torch's sample database (torch {on})",
        str(len(found)),
        f"{said}; {samples:,} samples",
        "docs/results/op_rules.jsonl",
    )


def architectures() -> Row:
    """Published architectures: captured, exact with bp, tangents equal to forward AD."""
    found = records("coverage")
    work = sum(bool(r["ok"]) for r in found)
    zoos = Counter(r["zoo"] for r in found)
    said = f"{work} work; " + ", ".join(f"{n} of {zoo}" for zoo, n in zoos.most_common())
    return ("architectures", str(len(found)), said, "docs/results/coverage.jsonl")


def situations() -> Row:
    """Changes between two calls after which a stale graph would go unnoticed."""
    cases = importlib.import_module("tests.staleness.cases")
    ranks = Counter(case.rank for case in cases.CASES)
    said = (
        f"{len(cases.SOURCES)} things that a forward reads, in 3 modes; {ranks[0]} in a normal "
        f"run, {ranks[0] + ranks[1]} in a long one"
    )
    return (
        "situations in which the model changes",
        f"{len(cases.CASES):,}",
        said,
        "tests/staleness",
    )


def fuzz() -> Row:
    """Random models compared with eager PyTorch."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    long = re.search(r"GRAPEFX_FUZZ_CASES=(\d+)", makefile)
    assert long is not None
    cases = importlib.import_module("tests.fuzz.test_fuzz").CASES
    said = f"in every run; {int(long[1]):,} by make fuzz"
    return ("random models", str(cases), said, "tests/fuzz")


def tests() -> Iterator[Row]:
    """Test cases as pytest collects them."""
    whole, short = _collected(), _collected("-m", "not slow")
    yield ("test cases", f"{whole:,}", f"{short:,} in make test, all in make test-all", "tests")


def _collected(*options: str) -> int:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    env = os.environ | {"GRAPEFX_FUZZ_CASES": "20"}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False, env=env
    )
    found = re.search(r"^(\d+)(?:/\d+)? tests? collected", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise SystemExit(f"pytest could not collect the tests:\n{done.stdout[-2000:]}{done.stderr}")
    return int(found[1])


def rows(count_tests: bool = True) -> list[Row]:
    """The table; collecting the tests takes a minute."""
    counted = [*tests()] if count_tests else []
    return [operators(), architectures(), situations(), fuzz(), *counted]


def write(path: Path, table: str) -> None:
    """Put the table between the markers of a page."""
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{path} has no {START} ... {END}")
    path.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = cli.parser("tools.trust", __doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/trust.md")
    args = parser.parse_args(argv)
    table = TABLE.markdown(rows())
    print(table)
    if args.write:
        write(PAGE, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
