"""Writes numbers for people, with three significant digits and a unit, and shortens names."""

from __future__ import annotations


def flops(value: float) -> str:
    """FLOPs with a decimal prefix: "1.23 GFLOP"."""
    return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def size(value: float) -> str:
    """Bytes with a binary prefix: "4.0 MiB"."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def seconds(value: float) -> str:
    """Seconds with a prefix: "1.23 ms"."""
    if value <= 0:
        return "0"
    return _scaled(value * 1e9, 1000, ("ns", "µs", "ms", "s", "ks"))


def count(value: float) -> str:
    """A plain number with a decimal prefix: "25.6 M"."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T")).strip()


def ratio(value: float | None) -> str:
    """A ratio: "1.41x"; "-" for none."""
    return "-" if value is None else f"{value:.3g}\u00d7"


def percent(value: float) -> str:
    """A fraction as percent."""
    return f"{100 * value:.3g} %"


def workers(value: int | None) -> str:
    """A number of workers; "∞" for unlimited."""
    return "∞" if value is None else str(value)


def shape(sizes: tuple[int, ...]) -> str:
    """A shape with multiplication signs; "-" for none."""
    return "\u00d7".join(map(str, sizes)) if sizes else "-"


def elide(name: str, most: int) -> str:
    """The end of a long name: that is where layers differ."""
    return name if len(name) <= most else "\u2026" + name[1 - most :]


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    i = 0
    # 999.6 would print as 1000
    while i < len(units) - 1 and value >= base - 0.5:
        value /= base
        i += 1
    if value == int(value):
        return f"{int(value)} {units[i]}"
    return f"{value:.3g} {units[i]}" if value < 999.5 else f"{value:.0f} {units[i]}"
