"""The page of a config: our numbers, beside the published ones where there are any."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from tools.common.results import Row as Cell
from tools.common.table import Table, fixed
from tools.reproduce.config import Config, Row

# A published difference counts as met within this many points, or two published deviations.
TOLERANCE = 0.3


class Ours(NamedTuple):
    """A row's result over its seeds."""

    mean: float
    sd: float | None
    seeds: int
    other: float | None  # of the best epoch where the last one counts, and the other way round
    seconds_epoch: float | None

    def __str__(self) -> str:
        return f"{_value(self.mean, self.sd)} (n = {self.seeds})"


def _ours(cells: list[Cell], metric: str) -> Ours | str | None:
    """The result of a row's cells, why there can be none, or None where nothing was run.

    A line without ``seed`` was taken off an older page, and holds its mean and deviation.
    """
    if undefined := [c["undefined"] for c in cells if "undefined" in c]:
        return str(undefined[0])
    by_seed = {c["seed"]: c for c in cells}
    older = by_seed.pop(None, None)
    if not by_seed:
        return Ours(older["last"], older["sd"], older["seeds"], None, None) if older else None
    shown, other = ("last", "best") if metric == "last" else ("best", "last")
    values = [c[shown] for c in by_seed.values()]
    return Ours(
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 else None,
        len(values),
        statistics.fmean(c[other] for c in by_seed.values()),
        statistics.median(c["seconds_epoch"] for c in by_seed.values()),
    )


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


def _table(config: Config, cells: dict[str, list[Cell]], other: str, published: bool) -> str:
    """Every row beside what is published, or else the rows that were run, with their options."""
    rows: list[tuple[object, ...]] = []
    for row in config.rows.values():
        how = " ".join([f"`{row.method}`", *(f"{k}={v!r}" for k, v in row.options.items())])
        if published:
            how = "not published" if row.published is None else _value(*row.published)
        ours = _ours(cells[row.name], config.setting["metric"])
        if isinstance(ours, Ours):
            verdict = _verdict(row, ours.mean) if published else ()
            end = fixed(ours.other, 2), fixed(ours.seconds_epoch, 1), row.note
            rows.append((row.name, how, ours, *verdict, *end))
        elif ours:
            rows.append((row.name, how, f"not defined here: {ours}"))
        elif published:
            rows.append((row.name, how, "not run", "", "", "", "", row.note))
    columns = ["row", "method, options", "accuracy:", f"{other}:", "s/epoch:", "remark"]
    if published:
        columns[1:3] = "published:", "ours:", "difference:", "verdict"
        columns[-1] = "what differs"
    missing = len(config.rows) - len(rows)
    rest = f"\n\nRows of the config that have not been run: {missing}." if missing else ""
    return Table(*columns).markdown(rows) + rest


def _alignment(config: Config, cells: dict[str, list[Cell]]) -> list[str]:
    """Cosine between the method's gradient and the true one after the last epoch, by weight."""
    every = [c for row in cells.values() for c in row]
    layers = list(dict.fromkeys(k for c in every for k in c.get("alignment", {})))
    rows = []
    for name in config.rows:
        found = [c["alignment"] for c in cells[name] if c.get("alignment")]
        columns = [[f[k] for f in found if k in f] for k in layers]
        if found:
            rows.append([name, *(fixed(statistics.fmean(c) if c else None, 2) for c in columns)])
    if not rows:
        return []
    table = Table("row", *(f"{k}:" for k in layers))
    title = "Cosine between each weight's update and the true gradient, last epoch:"
    return ["", title, "", table.markdown(rows)]


def render(config: Config, cells: list[dict[str, Any]], command: str) -> str:
    """The whole page of a config."""
    s, metric = config.setting, config.setting["metric"]
    unit = "perplexity, lower is better" if metric == "best_perplexity" else "test accuracy in %"
    shown, other = ("last epoch", "best") if metric == "last" else ("best epoch", "last")
    datasets = sorted({c["dataset"] for c in cells}) or [s["dataset"]]
    by_row: dict[str, list[Cell]] = {name: [] for name in config.rows}
    for cell in cells:
        by_row.setdefault(cell["row"], []).append(cell)
    published = any(row.published for row in config.rows.values())
    rule = f" Pass: within max({TOLERANCE}, 2 published sd) of the published mean."
    lines = [
        f"# {config.title}",
        "",
        f"{config.source}. Data: {', '.join(datasets)}. Mean ± sd over seeds, {unit}, "
        f"{shown}.{rule if published else ''}",
        "",
        f"Made by `{command}` (config {config.hash}, {s['epochs']} epochs).",
        "",
        _table(config, by_row, other, published),
    ]
    if config.differs:
        lines += ["", "In every row:" if not published else "Differs from the paper in every row:"]
        lines += ["", *(f"- {d}" for d in config.differs)]
    lines += _alignment(config, by_row)
    where = sorted({c["machine"] for c in cells})
    older = sorted({c["from"] for c in cells if c["seed"] is None})
    lines += ["", *(f"Machine: {w}." for w in where), *older, ""]
    return "\n".join(lines)
