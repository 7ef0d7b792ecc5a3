"""Finished cells beside the published values, as Markdown."""

import statistics
from typing import Any

from repro_config import Config, Row

# A published difference counts as met within this many points, or two published deviations.
TOLERANCE = 0.3


def _value(mean: float, sd: float | None) -> str:
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"


def _verdict(row: Row, mean: float) -> tuple[str, str]:
    """The difference to the published mean, and whether it is small enough."""
    if row.published is None:
        return "-", "-"
    published, sd = row.published
    allowed = max(TOLERANCE, 2 * (sd or 0.0))
    difference = mean - published
    return f"{difference:+.2f}", "pass" if abs(difference) <= allowed else "fail"


def _line(row: Row, cells: list[dict[str, Any]], metric: str) -> str:
    published = "not published" if row.published is None else _value(*row.published)
    mine = [c for c in cells if c["row"] == row.name]
    undefined = [c["undefined"] for c in mine if "undefined" in c]
    by_seed = {c["seed"]: c for c in mine if "undefined" not in c}
    if undefined:
        return f"| {row.name} | {published} | not defined here: {undefined[0]} | | | | | |"
    if not by_seed:
        return f"| {row.name} | {published} | not run | | | | | {row.note} |"
    shown, other = ("last", "best") if metric == "last" else ("best", "last")
    ours = [c[shown] for c in by_seed.values()]
    mean = statistics.fmean(ours)
    sd = statistics.stdev(ours) if len(ours) > 1 else None
    difference, verdict = _verdict(row, mean)
    second = statistics.fmean(c[other] for c in by_seed.values())
    speed = statistics.median(c["seconds_epoch"] for c in by_seed.values())
    return (
        f"| {row.name} | {published} | {_value(mean, sd)} (n = {len(ours)}) | {difference} "
        f"| {verdict} | {second:.2f} | {speed:.1f} | {row.note} |"
    )


def _alignment(config: Config, cells: list[dict[str, Any]]) -> list[str]:
    """Cosine between the method's gradient and the true one after the last epoch, by weight."""
    layers = list(dict.fromkeys(k for c in cells for k in c.get("alignment", {})))
    lines = []
    for name in config.rows:
        found = [c["alignment"] for c in cells if c["row"] == name and c.get("alignment")]
        if found:
            means = [
                f"{statistics.fmean(f[k] for f in found if k in f):.2f}"
                if any(k in f for f in found)
                else "-"
                for k in layers
            ]
            lines.append(f"| {name} | {' | '.join(means)} |")
    if not lines:
        return []
    head = [f"| row | {' | '.join(layers)} |", f"| --- |{' ---: |' * len(layers)}"]
    return ["", "Cosine between each weight's update and the true gradient, last epoch:", "",
            *head, *lines]  # fmt: skip


def render(config: Config, cells: list[dict[str, Any]], command: str) -> str:
    """The whole page of a config."""
    s, metric = config.setting, config.setting["metric"]
    unit = "perplexity, lower is better" if metric == "best_perplexity" else "test accuracy in %"
    shown, other = ("last epoch", "best") if metric == "last" else ("best epoch", "last")
    datasets = sorted({c["dataset"] for c in cells}) or [s["dataset"]]
    lines = [
        f"# {config.title}",
        "",
        f"{config.source}. Data: {', '.join(datasets)}. Mean ± sd over seeds, {unit}, "
        f"{shown}. Pass: within max({TOLERANCE}, 2 published sd) of the published mean.",
        "",
        f"Made by `{command}` (config {config.hash}, {s['epochs']} epochs).",
        "",
        f"| row | published | ours | difference | verdict | {other} | s/epoch | what differs |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
        *(_line(row, cells, metric) for row in config.rows.values()),
    ]
    if config.differs:
        lines += ["", "Differs from the paper in every row:", ""]
        lines += [f"- {d}" for d in config.differs]
    lines += _alignment(config, cells)
    where = sorted({c["machine"] for c in cells})
    lines += ["", *(f"Machine: {w}." for w in where), ""]
    return "\n".join(lines)
