"""Writes docs/options.md, the reference of every option of ``grapefx.compile``.

python -m tools.options_page            # writes the page
python -m tools.options_page --check    # fails if it is not current
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from grapefx.methods import BUILTIN
from grapefx.options import OPTIONS
from tools.common import cli

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
HEAD = """# Options

Keyword arguments of `grapefx.compile(model, method=..., preset=..., calib_every=..., inplace=...)`
beside these. A wrong name or value is refused at once, with the nearest valid one. This page is
made from the table that the checks read (`python -m tools.options_page`). For networks of linear
layers without normalisation `preset="recommended"`, which is the default, sets `calib_every`,
`calib_gap`, `calib_forget` and `radial` to other values than those below
([presets](methods.md#presets)). For several devices there are also `pipeline`, `microbatches`,
`stages`, `data_parallel` and `stage_timeout` ([stages](distributed.md#use)).

| option | values | default | what it does |
| --- | --- | --- | --- |
"""
METHODS = """
## Options of methods

They are given in the same call, or to an instance: `method=grapefx.methods.GrAPE(eta=0.03)`.
docs/methods.md says what each means.

| method | options and defaults |
| --- | --- |
"""


def page() -> str:
    """The page as Markdown."""
    rows = []
    for name, field in OPTIONS.items():
        values, meaning = field.metadata["values"], field.metadata["meaning"]
        said = str(values) if str(values) else "see there"
        cells = [f"`{name}`", _cell(said), f"`{field.default!r}`", _cell(meaning)]
        rows.append(f"| {' | '.join(cells)} |")
    own = []
    for name, cls in BUILTIN.items():
        fields = [f"`{f.name}={f.default!r}`" for f in dataclasses.fields(cls)]
        if fields:
            own.append(f"| `{name}` | {', '.join(fields)} |")
    return HEAD + "\n".join(rows) + "\n" + METHODS + "\n".join(own) + "\n"


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or say whether it is current."""
    p = cli.parser("tools.options_page", __doc__)
    p.add_argument("--check", action="store_true", help="fail if the page is not current")
    check = p.parse_args(argv).check
    if not check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        print("docs/options.md is not current: python -m tools.options_page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
