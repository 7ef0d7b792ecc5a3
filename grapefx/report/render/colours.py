"""Gives every phase of a step one colour, in HTML and graphviz alike, and a name for people."""

from __future__ import annotations

# light and dark theme; chosen to differ in lightness as well as in hue
PHASES: dict[str, tuple[str, str, str]] = {
    "forward": ("forward", "#4f7fd6", "#6d9bf0"),
    "tangent": ("tangent", "#12a3a8", "#35c4c9"),
    "error": ("output error", "#5c6875", "#9aa7b5"),
    "projection": ("projection", "#e3a51d", "#f0bd4a"),
    "alignment": ("alignment", "#8c5bd3", "#ad85ec"),
    "exact_rows": ("exact rows", "#b0413e", "#e07a76"),
    "late_rows": ("late rows", "#8f4a6b", "#c98aa8"),
    "mean_field": ("mean field", "#a3702f", "#cf9a55"),
    "weight_grad": ("weight gradient", "#3c9d51", "#5cc072"),
    "input_grad": ("input gradient", "#dd6b3f", "#f28a60"),
    "refit": ("refit", "#bf4f93", "#e079b6"),
    "buffer": ("buffers", "#8196b3", "#8fa5c4"),
    "metric": ("metrics", "#a3a07c", "#bdb98f"),
    "optimizer": ("optimizer", "#8a6d57", "#b3937a"),
    "other": ("other", "#a9b1ba", "#788391"),
}

CRITICAL = ("#d1225f", "#ff6f9f")


def label(phase: str) -> str:
    """A phase's name in words."""
    return PHASES[phase][0] if phase in PHASES else phase.replace("_", " ")


def css_class(phase: str) -> str:
    """The CSS class that carries a phase's colour."""
    return f"p-{phase}" if phase in PHASES else "p-other"


def colour(phase: str) -> str:
    """A phase's colour on white."""
    return PHASES.get(phase, PHASES["other"])[1]


def css_variables(theme: int) -> str:
    """The custom properties of one theme (0 light, 1 dark)."""
    rows = [f"--{css_class(p)}:{c[1 + theme]};" for p, c in PHASES.items()]
    return "".join([*rows, f"--crit:{CRITICAL[theme]};"])
