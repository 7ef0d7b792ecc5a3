"""The page of ``tools.gpu_check``: parity, targets, times by network."""

from __future__ import annotations

from tools.common.results import Row
from tools.common.table import Table

TABLE = Table(
    "variant", "step:", "update:", "/ eager:", "/ compiled + graphs:", "compile s:", "found"
)
METHODS = ("dfa", "grape", "grape 1/8")  # of tools.bench.models.VARIANTS
PLAIN = ("eager", "compiled", "compiled + CUDA graphs")


def page(rows: dict[str, Row], where: str) -> str:
    """The results as markdown."""
    out = [
        "# On a GPU", "", f"Made by `make gpu-check` on {where}.", "",
        "Times in ms: a step is gradients cleared, forward, loss, backward; update is backward "
        "alone. `found` is what `parallel=\"auto\"` measured for the update.", "",
    ]  # fmt: skip
    checks = {k: r for k, r in rows.items() if r.get("section") == "parity"}
    bad = {k: r for k, r in checks.items() if not r["ok"]}
    if checks:
        out += [f"Parity: {len(checks) - len(bad)} of {len(checks)} comparisons hold."]
        out += [f"- {k}: {r.get('error') or r.get('difference')}" for k, r in bad.items()] + [""]
    out += verdicts(rows)
    cases: dict[str, dict[str, Row]] = {}
    for key, row in rows.items():
        if row.get("section") != "parity":
            name, batch, variant = key.split("/", 2)
            cases.setdefault(f"{name}, batch {batch}", {})[variant] = row
    for title, found in cases.items():
        eager, compiled = (found.get(v, {}).get("step_ms") for v in (PLAIN[0], PLAIN[2]))
        out += ["", f"## {title}", "", TABLE.head()]
        for variant, r in found.items():
            if not r["ok"]:
                out.append(TABLE.line(variant, "", "", "", "", "", r["error"]))
                continue
            ratios = [f"{r['step_ms'] / b:.2f}" if b else "-" for b in (eager, compiled)]
            timings = ", ".join(f"{k} {v}" for k, v in r.get("found_ms", {}).items())
            text = f"{r['chose']} ({timings})" if timings else ""
            times = [f"{r[k]:.3f}" for k in ("step_ms", "update_ms")]
            out.append(TABLE.line(variant, *times, *ratios, r["compile_s"], text))
    return "\n".join(out) + "\n"


def best(rows: dict[str, Row], case: str, method: str, what: str) -> float | None:
    """The least time of a method's forms."""
    values = [
        r[what] for k, r in rows.items()
        if r.get("ok") and k.startswith(f"{case}/{method}, ") and what in r
    ]  # fmt: skip
    return min(values, default=None)


def verdicts(rows: dict[str, Row]) -> list[str]:
    """The targets, met or not."""
    out = []
    for kind in ("micro", "macro"):
        case = f"transformer8-{kind}/8"
        for method in METHODS:
            mine = best(rows, case, method, "step_ms")
            for base, goal in ((PLAIN[0], 1 / 3), (PLAIN[2], 0.75)):
                other = rows.get(f"{case}/{base}", {}).get("step_ms")
                if mine and other:
                    met = "met" if mine / other <= goal else "missed"
                    out.append(
                        f"- depth 8 {kind}, {method}: {mine / other:.2f} of {base} BP "
                        f"(target {goal:.2f}): {met}"
                    )
            short, long = (
                best(rows, f"transformer{d}-{kind}/8", method, "update_ms") for d in (2, 16)
            )
            if short and long:
                met = "met" if long / short < 1.5 else "missed"
                out.append(
                    f"- {kind}, {method}: the update grows by {long / short:.2f} from depth 2 to "
                    f"16 (target below 1.5): {met}"
                )
    return ["## Targets", "", *out] if out else []
