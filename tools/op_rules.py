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
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# the oracle is the tests' own
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from grapefx.passes.rules import rules_table

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
    known = read(args.jsonl)
    if unknown := sorted(set(args.only or ()) - set(oracle.OPS)):
        print(f"the database has no operator {', '.join(unknown)}", file=sys.stderr)
        return 2
    names = [n for n in sorted(oracle.OPS) if not args.only or n in args.only]
    names = [n for n in names if args.again or n not in known]
    for k, name in enumerate(names):
        known[name] = row = guarded(name, args.timeout)
        with args.jsonl.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(f"[{k + 1}/{len(names)}] {name}: {row['verdict']} {row['note']}", flush=True)
    args.out.write_text(document([known[n] for n in sorted(known)]))
    print(f"wrote {args.out}")
    return int(any(r["verdict"] == "wrong" for r in known.values()))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results so far, the last of each operator."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {r["name"]: r for r in rows}


def guarded(name: str, timeout: float) -> dict[str, Any]:
    """One operator in a process of its own: stopped between two samples, or killed."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, timeout, theirs), daemon=True)
    process.start()
    theirs.close()
    row: dict[str, Any] = {"name": name, "verdict": "crashed", "note": ""}
    try:
        if ours.poll(timeout * 2):
            row = ours.recv()
        else:
            row |= {"verdict": "stopped", "note": f"a sample takes over {timeout:.0f} s"}
    except EOFError:
        pass
    process.kill()
    process.join()
    return row | {"torch": torch.__version__.partition("+")[0]}


def _child(name: str, timeout: float, out: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out.send(examine(name, timeout))


def examine(name: str, timeout: float) -> dict[str, Any]:
    """Every sample of one operator; the verdict is that of the worst."""
    op = oracle.OPS[name]
    started = time.monotonic()
    row: dict[str, Any] = {
        "name": name,
        "samples": 0,
        "of": 0,
        "refused": 0,
        "kinds": {},
        "note": "",
    }
    if name in oracle.UNTRACED:
        return row | {"verdict": "untraced", "note": "torch cannot make a graph of it"}
    samples = oracle.samples(op, every=True)
    row["of"] = len(samples)
    for sample in samples:
        if time.monotonic() - started > timeout:
            row["note"] = f"stopped after {timeout:.0f} s"
            break
        try:
            row["kinds"] |= oracle.check(op, sample)
        except oracle.TangentError as e:
            row["refused"] += 1
            row["note"] = str(e).splitlines()[0]
            continue
        except AssertionError as e:
            text = next((s for s in str(e).splitlines() if s.strip()), "")
            return row | {"verdict": "wrong", "note": f"sample {row['samples']}: {text}"[:200]}
        except Exception as e:  # neither traced nor differentiated by torch: nothing to compare
            text = f"sample {row['samples']}: {type(e).__name__}: {e}"
            return row | {"verdict": "no oracle", "note": text.splitlines()[0][:200]}
        row["samples"] += 1
    if row["refused"] and not row["samples"]:
        return row | {"verdict": "unsupported"}
    kinds = set(row["kinds"].values())
    return row | {"verdict": next((k for k in reversed(ORDER) if k in kinds), "no tangent")}


def _missed(names: list[str]) -> list[str]:
    if not names:
        return []
    text = ", ".join(f"`{n}`" for n in names)
    head = [
        "Not reached: torch takes them apart while it traces, or another device has them (most of",
        "the former are called directly in `tests/passes/test_rules.py`):",
    ]
    return [*head, text, ""]


def document(rows: Iterable[dict[str, Any]]) -> str:
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
        done += f", {r['refused']} refused" if r.get("refused") else ""
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
