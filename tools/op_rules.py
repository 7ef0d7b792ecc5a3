"""How each operator of torch's own sample database gets its tangent, and whether it is right.

    python -m tools.op_rules            # everything not measured yet, then docs/op_rules.md
    python -m tools.op_rules --only softmax addmm --again

Every sample input of the database in float64 on the CPU; the oracle is that of
``tests/passes/test_rules_opinfo.py`` (torch's forward AD, its double backward, or differences). One
JSON line an operator is written as soon as it is known: a killed run goes on where it was.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from grapefx.passes.differentiate.rules import rules_table
from tools import ROOT
from tools.common import cli, process, results
from tools.common.results import Row
from tools.common.table import Table

# the tests' own oracle, by name: the tests are no part of what mypy checks
oracle = importlib.import_module("tests.passes.test_rules_opinfo")

ORDER = ("rule", "pointwise", "derived")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the table."""
    p = cli.parser("tools.op_rules", __doc__)
    p.add_argument("--only", nargs="+", metavar="NAME", help="these operators only")
    p.add_argument("--again", action="store_true", help="run what has a result once more")
    p.add_argument("--timeout", type=float, default=120, help="seconds an operator may take")
    p.add_argument("--jsonl", type=Path, default=ROOT / "docs/results/op_rules.jsonl")
    p.add_argument("--out", type=Path, default=ROOT / "docs/op_rules.md")
    args = p.parse_args(argv)
    known = results.latest(args.jsonl, lambda r: str(r["name"]))
    if unknown := sorted(set(args.only or ()) - set(oracle.OPS)):
        print(f"the database has no operator {', '.join(unknown)}", file=sys.stderr)
        return 2
    names = [n for n in sorted(oracle.OPS) if not args.only or n in args.only]
    names = [n for n in names if args.again or n not in known]
    for k, name in enumerate(names):
        known[name] = row = guarded(name, args.timeout)
        results.append(args.jsonl, row)
        print(f"[{k + 1}/{len(names)}] {name}: {row['verdict']} {row['note']}", flush=True)
    args.out.write_text(document([known[n] for n in sorted(known)]))
    print(f"wrote {args.out}")
    return int(any(r["verdict"] == "wrong" for r in known.values()))


def guarded(name: str, timeout: float) -> Row:
    """One operator in a process of its own: stopped between two samples, or killed."""

    def report(send: Callable[[Row], None]) -> None:
        send(examine(name, timeout))

    out = process.run(report, timeout=timeout * 2)
    row = out.row or {"name": name, "verdict": "crashed", "note": out.death}
    if out.stop and not out.row:
        row |= {"verdict": "stopped", "note": f"a sample takes over {timeout:.0f} s"}
    return row | {"torch": torch.__version__.partition("+")[0]}


def examine(name: str, timeout: float) -> Row:
    """Every sample of one operator; the verdict is that of the worst."""
    op = oracle.OPS[name]
    started = time.monotonic()
    row: Row = {
        "name": name,
        "samples": 0,
        "of": 0,
        "refused": 0,
        "untraced": 0,
        "kinds": {},
        "note": "",
    }
    samples = oracle.samples(op, every=True)
    row["of"] = len(samples)
    for i, sample in enumerate(samples):
        if time.monotonic() - started > timeout:
            row["note"] = f"stopped after {timeout:.0f} s"
            break
        try:
            row["kinds"] |= oracle.check(op, sample)
        except oracle.TangentError as e:
            row["refused"] += 1
            row["note"] = str(e).splitlines()[0]
            continue
        except Exception as e:
            if why := untraced(sample):
                row["untraced"] += 1
                row["note"] = why
                continue
            if isinstance(e, AssertionError):
                text = f"sample {i}: {process.one_line(e)}"
                return row | {"verdict": "wrong", "note": text[:200]}
            # torch does not differentiate it: nothing to compare
            text = f"sample {i}: {process.error_text(e)}"
            return row | {"verdict": "no oracle", "note": text[:200]}
        row["samples"] += 1
    if row["refused"] and not row["samples"]:
        return row | {"verdict": "unsupported"}
    if row["untraced"] and not row["samples"]:
        return row | {"verdict": "untraced"}
    kinds = set(row["kinds"].values())
    return row | {"verdict": next((k for k in reversed(ORDER) if k in kinds), "no tangent")}


def untraced(sample: Any) -> str:
    """Why torch cannot make a graph of it; empty if it can."""
    try:
        oracle.trace(sample.fn, sample.tensors, sample.which)
    except Exception as e:
        return process.error_text(e)[:200]
    return ""


def _missed(names: list[str]) -> list[str]:
    if not names:
        return []
    text = ", ".join(f"`{n}`" for n in names)
    head = [
        "Not reached: torch takes them apart while it traces, or another device has them (most of",
        "the former are called directly in `tests/passes/test_rules.py`):",
    ]
    return [*head, text, ""]


def document(rows: Iterable[Row]) -> str:
    """The Markdown page."""
    rows = list(rows)
    count = Counter(r["verdict"] for r in rows)
    checked = sum(r.get("samples", 0) for r in rows)
    ours = {k for r in rows for k, v in r.get("kinds", {}).items() if v != "derived"}
    table = rules_table()
    versions = ", ".join(sorted({r["torch"] for r in rows}))
    how = {
        "rules of ours for all that it consists of": "rule",
        "the same, some by the formula for pointwise operators": "pointwise",
        "some by torch's derivatives, transposed or dual (derived)": "derived",
        "nothing to do (an identity, or the derivative is zero)": "no tangent",
        "unsupported: refused with a `TangentError`": "unsupported",
        "torch cannot trace it": "untraced",
        "torch gives nothing to compare with": "no oracle",
    }
    counts: list[tuple[str, object]] = [(text, count[verdict]) for text, verdict in how.items()]
    counts += [("not finished, crashed", count["stopped"] + count["crashed"])]
    counts += [("**wrong**", count["wrong"])]
    plain = [r for r in rows if r["verdict"] in ("rule", "pointwise") and not r["note"]]
    lines = [
        "# Operators: rule, derived, unsupported",
        "",
        "How operators of torch's sample database (`op_db`) get their tangents. Written by",
        f"`python -m tools.op_rules`; torch {versions}, CPU, float64, {checked:,} samples.",
        "",
        Table("how", "operators of the database:").markdown(counts),
        "",
        f"{len(table)} ATen overloads have a rule ({list(table.values()).count('rule')} their own, "
        "the rest",
        f"pointwise); the samples above reach {len(ours & set(table))} of them.",
        "",
        *_missed(sorted(k for k, v in table.items() if v == "rule" and k not in ours)),
        "## What is not a rule",
        "",
        Table("operator", "verdict", "samples:", "ATen operators derived, or the reason").markdown(
            _cells(r) for r in rows if r not in plain
        ),
        "",
        "## Rules",
        "",
        Table("operator", "samples:").markdown((r["name"], r["samples"]) for r in plain),
    ]
    return "\n".join(lines) + "\n"


def _cells(r: Row) -> tuple[str, ...]:
    """What is to be said of an operator that has no plain rule."""
    derived = [f"`{k}`" for k, v in r.get("kinds", {}).items() if v == "derived"]
    note = [r["note"].replace("|", "\\|")] if r["note"] else []
    done = f"{r.get('samples', 0)} of {r.get('of', 0)}"
    for k in ("refused", "untraced"):
        done += f", {r[k]} {k}" if r.get(k) else ""
    return r["name"], r["verdict"], done, "; ".join([*derived, *note])


if __name__ == "__main__":
    raise SystemExit(main())
