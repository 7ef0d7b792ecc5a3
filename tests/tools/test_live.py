"""Progress of long commands: replaced on a terminal, plain lines in a log."""

from __future__ import annotations

import io

from rich.console import Console

from tools.common.live import Progress, bar


def shown(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=40, highlight=False, soft_wrap=True)
    with Progress(console) as progress:
        progress.show("first " + "x" * 100, force=True)
        progress.show("too soon")
        progress.line("[stays] as it is")
    return out.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    out = shown(terminal=False)
    assert "\r" not in out and "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].startswith("  first xxx") and lines[-1] == "[stays] as it is"
    assert "too soon" not in out


def test_a_live_line_on_a_terminal() -> None:
    out = shown(terminal=True)
    assert "x" * 41 not in out and "too soon" not in out  # cut to the width
    assert "\x1b[" in out and "[stays] as it is" in out


def test_bar() -> None:
    assert bar(0, 4, 4) == "[....]" and bar(1, 4, 4) == "[#...]" and bar(4, 4, 4) == "[####]"
