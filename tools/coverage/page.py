"""How results of ``tools.coverage`` are shown: on a line, summed up, as the page."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from tools.common.results import Row
from tools.common.table import Table
from tools.coverage.zoos import BATCH

HEAD = """# Coverage

Which published architectures train, measured by `python -m tools.coverage --zoo ZOO`
(`--table` writes this page). Weights are random, batch {batch}, float64, CPU, `backend="eager"`,
torch {torch}. A model works when

- it is captured as one graph,
- `bp` gives eager PyTorch's gradients and loss to a relative 1e-6,
- one step of `dfa` and one of `grape` give finite gradients,
- the tangents at the output equal forward AD of the same noise to a relative 1e-6 (to 1e-3 of
  differences where torch has no forward AD for an operator, and to the gradients transposed where
  the model calls custom autograd functions; the column says which).

Dropout and stochastic depth are switched off (p = 0); batch norm trains unless the column says
`eval`. Parameters that start at one value (zeros, layer scales) are perturbed: they would hide
errors. `points`: feedback points; `nodes`: the forward and backward graph; `block`: placed by
`granularity="block"`, because the maps would be too large on a small machine otherwise. `without n
repeated blocks`: measured with `--depth`, which drops repeats of equal blocks. A model of a zoo
that has no row has not been measured yet.
"""

CAPTURED = """
## Captured by Dynamo

Models with `--capture --depth 1` (torch {torch}): captured by Dynamo, and the gradients of `bp`
against eager PyTorch to a relative 1e-6. {ok} of {all} work. CPU seconds of capture, placement and
joint graph, summed over the {both} models that both ways can capture: {dynamo:.0f} with Dynamo,
{export:.0f} with `capture="export"`, {ratio:.2f} times.
"""
COMPILED = """
## Compiled by Inductor

A choice of the models with `--inductor --depth 1`: loss and gradients of compiled
steps against uncompiled ones, to a relative 1e-6: `bp` against eager PyTorch, `grape` against
`backend="eager"`, once with tangents on the whole batch and once on half of it. Each at two batch
sizes (fixed sizes first, then symbolic ones) unless the batch size is fixed in the model.
"""
COLUMNS = Table(
    "model", "works", "mode", "M params:", "points:", "nodes:", "bp error:", "tangent", "s:",
    "MiB:", "note",
)  # fmt: skip
COMPILED_COLUMNS = Table("zoo", "model", "works", "sizes:", "bp:", "grape:", "grape on half:", "s:")


def _compiled_row(r: Row) -> list[str]:
    errors = [
        f"{r[k]:.0e}" if k in r else "-" for k in ("bp error", "grape error", "grape on half error")
    ]
    works = "yes" if r["ok"] else f"no: {r['reason']}"
    cells = [r["zoo"], r["name"], works, r.get("sizes", "-"), *errors, f"{r['seconds']:.0f}"]
    return [_plain(str(c)) for c in cells]


def line(row: Row) -> str:
    """One result on one line."""
    state = "ok  " if row["ok"] else "FAIL"
    figures = f"{row.get('points', '-')} points, {row.get('nodes', '-')} nodes"
    figures += f", {row['seconds']:.0f} s, {row['rss_mib']} MiB"
    return f"{state} {row['name']}: {figures}{'' if row['ok'] else '  ' + row['reason']}"


def summary(rows: Sequence[Row]) -> str:
    """How many of each zoo work."""
    out = []
    for zoo, group in itertools.groupby(sorted(rows, key=_order), key=lambda r: r["zoo"]):
        members = list(group)
        ok = sum(r["ok"] for r in members)
        out.append(f"{zoo}: {ok} of {len(members)} ({100 * ok / len(members):.0f} %)")
        out += [f"  {r['name']}: {r['reason']}" for r in members if not r["ok"]]
    return "\n".join(out)


def _order(row: Row) -> tuple[str, str]:
    return row["zoo"], row["name"]


def document(
    rows: Iterable[Row], captured: Iterable[Row] = (), compiled: Iterable[Row] = ()
) -> str:
    """The page: a summary, the failures with their reasons, every model; captures, compilations."""
    ordered = sorted(rows, key=_order)
    out = [HEAD.format(batch=BATCH, torch=_versions(ordered))]
    groups = {z: [r for r in ordered if r["zoo"] == z] for z in sorted({r["zoo"] for r in ordered})}
    sums = []
    for zoo, members in [*groups.items(), ("all", ordered)]:
        ok = sum(r["ok"] for r in members)
        part = f"{100 * ok / len(members):.0f} %" if members else "-"
        sums.append((zoo, len(members), ok, part))
    out += ["## Summary\n", Table("zoo", "models:", "work:", "part:").markdown(sums)]
    failed = [r for r in ordered if not r["ok"]]
    out.append(f"\n## Failures\n\n{'' if failed else 'None.'}")
    out += [f"- {r['zoo']} `{r['name']}`: {_plain(r['reason'])}" for r in failed]
    for zoo, members in groups.items():
        out += [f"\n## {zoo}\n", COLUMNS.markdown(map(_row, members))]
    out += _captured(sorted(captured, key=_order))
    if chosen := sorted(compiled, key=_order):
        out += [COMPILED, COMPILED_COLUMNS.markdown(map(_compiled_row, chosen))]
    return "\n".join(out).rstrip() + "\n"


def _versions(rows: Iterable[Row]) -> str:
    """The versions of torch that the rows were measured with."""
    return ", ".join(sorted({r.get("torch", "unknown") for r in rows}))


def _captured(rows: Sequence[Row]) -> list[str]:
    """The two ways to capture: sums, and each model that either cannot take."""
    both = [r for r in rows if r["ok"] and "export_s" in r]
    if not both:
        return []
    sums = {k: sum(r[f"{k}_s"] for r in both) for k in ("dynamo", "export")}
    text = CAPTURED.format(
        torch=_versions(rows),
        ok=sum(r["ok"] for r in rows),
        all=len(rows),
        both=len(both),
        ratio=sums["dynamo"] / sums["export"],
        **sums,
    )
    out = [text]
    out += [f"- {r['zoo']} `{r['name']}`: {_plain(r['reason'])}" for r in rows if not r["ok"]]
    out += [
        f"- {r['zoo']} `{r['name']}`, by Dynamo alone: export says {_plain(r['export_fails'])}"
        for r in rows
        if r["ok"] and "export_fails" in r
    ]
    return out


def _row(r: Row) -> list[str]:
    tangent = str(r.get("tangent", "-"))
    if "tangent_error" in r:
        tangent += f" {r['tangent_error']:.0e}"
    notes = [r.get("note", ""), "block" if r.get("granularity") == "block" else ""]
    cells = [
        r["name"],
        "yes" if r["ok"] else f"no: {r['reason'].split(':')[0]}",
        r.get("mode", "-"),
        f"{r['parameters'] / 1e6:.2g}" if "parameters" in r else "-",
        r.get("points", "-"),
        r.get("nodes", "-"),
        f"{r['bp_error']:.0e}" if "bp_error" in r else "-",
        tangent,
        f"{r['seconds']:.0f}",
        r["rss_mib"],
        "; ".join(n for n in notes if n),
    ]
    return [_plain(str(c)) for c in cells]


def _plain(text: str) -> str:
    """Without what would break a table, and without anybody's folders."""
    text = re.sub(r"(/[^\s/:'\"]+){2,}/", "", text)
    return text.replace("|", "/").replace("<", "(").replace(">", ")")
