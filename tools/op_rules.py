"""How each operator of torch's own sample database gets its tangent, and whether it is right.

    python tools/op_rules.py            # everything not measured yet, then docs/op_rules.md
    python tools/op_rules.py --only softmax addmm --again

Every sample input of the database in float64 on the CPU; the oracle is that of
``tests/passes/test_rules_opinfo.py`` (torch's forward AD, its double backward, or differences). One
JSON line an operator is written as soon as it is known: a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# the oracle is the tests' own
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import apart
from grapefx.passes.differentiate.rules import rules_table

oracle = importlib.import_module("tests.passes.test_rules_opinfo")

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("rule", "pointwise", "derived")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the table."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--only", nargs="+", metavar="NAME", help="these operators only")
    p.add_argument("--again", action="store_true", help="run what has a result once more")
    p.add_argument("--timeout", type=float, default=120, help="seconds an operator may take")
    p.add_argument("--jsonl", type=Path, default=ROOT / "docs/results/op_rules.jsonl")
    p.add_argument("--out", type=Path, default=ROOT / "docs/op_rules.md")
    args = p.parse_args(argv)
    known = apart.read(args.jsonl, lambda r: str(r["name"]))
    if unknown := sorted(set(args.only or ()) - set(oracle.OPS)):
        print(f"the database has no operator {', '.join(unknown)}", file=sys.stderr)
        return 2
    names = [n for n in sorted(oracle.OPS) if not args.only or n in args.only]
    names = [n for n in names if args.again or n not in known]
    for k, name in enumerate(names):
        known[name] = row = guarded(name, args.timeout)
        apart.append(args.jsonl, row)
        print(f"[{k + 1}/{len(names)}] {name}: {row['verdict']} {row['note']}", flush=True)
    args.out.write_text(document([known[n] for n in sorted(known)]))
    print(f"wrote {args.out}")
    return int(any(r["verdict"] == "wrong" for r in known.values()))


def guarded(name: str, timeout: float) -> apart.Row:
    """One operator in a process of its own: stopped between two samples, or killed."""

    def report(send: Callable[[apart.Row], None]) -> None:
        send(examine(name, timeout))

    out = apart.run(report, timeout=timeout * 2)
    row = out.row or {"name": name, "verdict": "crashed", "note": out.death}
    if out.stop and not out.row:
        row |= {"verdict": "stopped", "note": f"a sample takes over {timeout:.0f} s"}
    return row | {"torch": torch.__version__.partition("+")[0]}


def examine(name: str, timeout: float) -> apart.Row:
    """Every sample of one operator; the verdict is that of the worst."""
    op = oracle.OPS[name]
    started = time.monotonic()
    row: apart.Row = {
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
                text = f"sample {i}: {apart.one_line(e)}"
                return row | {"verdict": "wrong", "note": text[:200]}
            # torch does not differentiate it: nothing to compare
            text = f"sample {i}: {error_text(e)}"
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
        return error_text(e)[:200]
    return ""


def error_text(error: Exception) -> str:
    """The error on one line."""
    return f"{type(error).__name__}: {apart.one_line(error)}"


def _missed(names: list[str]) -> list[str]:
    if not names:
        return []
    text = ", ".join(f"`{n}`" for n in names)
    head = [
        "Not reached: torch takes them apart while it traces, or another device has them (most of",
        "the former are called directly in `tests/passes/test_rules.py`):",
    ]
    return [*head, text, ""]


def document(rows: Iterable[apart.Row]) -> str:
    """The Markdown page."""
    rows = list(rows)
    count = Counter(r["verdict"] for r in rows)
    checked = sum(r.get("samples", 0) for r in rows)
    ours = {k for r in rows for k, v in r.get("kinds", {}).items() if v != "derived"}
    table = rules_table()
    versions = ", ".join(sorted({r["torch"] for r in rows}))
    lines = [
        "# Operators: rule, derived, unsupported",
        "",
        "How operators of torch's sample database (`op_db`) get their tangents. Written by",
        f"`python tools/op_rules.py`; torch {versions}, CPU, float64, {checked:,} samples.",
        "",
        "| how | operators of the database |",
        "| --- | ---: |",
        f"| rules of ours for all that it consists of | {count['rule']} |",
        f"| the same, some by the formula for pointwise operators | {count['pointwise']} |",
        f"| some by torch's derivatives, transposed or dual (derived) | {count['derived']} |",
        f"| nothing to do (an identity, or the derivative is zero) | {count['no tangent']} |",
        f"| unsupported: refused with a `TangentError` | {count['unsupported']} |",
        f"| torch cannot trace it | {count['untraced']} |",
        f"| torch gives nothing to compare with | {count['no oracle']} |",
        f"| not finished, crashed | {count['stopped'] + count['crashed']} |",
        f"| **wrong** | {count['wrong']} |",
        "",
        f"{len(table)} ATen overloads have a rule ({list(table.values()).count('rule')} their own, "
        "the rest",
        f"pointwise); the samples above reach {len(ours & set(table))} of them.",
        "",
        *_missed(sorted(k for k, v in table.items() if v == "rule" and k not in ours)),
        "## What is not a rule",
        "",
        "| operator | verdict | samples | ATen operators derived, or the reason |",
        "| --- | --- | ---: | --- |",
    ]
    for r in rows:
        if r["verdict"] in ("rule", "pointwise") and not r["note"]:
            continue
        derived = [f"`{k}`" for k, v in r.get("kinds", {}).items() if v == "derived"]
        why = "; ".join([*derived, *([r["note"].replace("|", "\\|")] if r["note"] else [])])
        done = f"{r.get('samples', 0)} of {r.get('of', 0)}"
        for k in ("refused", "untraced"):
            done += f", {r[k]} {k}" if r.get(k) else ""
        lines.append(f"| {r['name']} | {r['verdict']} | {done} | {why} |")
    lines += ["", "## Rules", "", "| operator | samples |", "| --- | ---: |"]
    lines += [
        f"| {r['name']} | {r['samples']} |"
        for r in rows
        if r["verdict"] in ("rule", "pointwise") and not r["note"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
