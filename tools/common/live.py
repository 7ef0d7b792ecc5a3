"""What a long command shows while it runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_EVERY = 5.0  # seconds between lines where there is no terminal


class Progress:
    """Used as a context: ``show`` replaces what is shown for the moment, ``line`` stays.

    Into a file or a pipe nothing can be replaced: there ``show`` writes a line, every few seconds.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self.console, transient=True, auto_refresh=False)
        self._last = -PLAIN_EVERY

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, text: str, force: bool = False) -> None:
        """What goes on; at most ten times a second, unless ``force``."""
        now = time.monotonic()
        live = self.console.is_terminal
        if not force and now - self._last < (0.1 if live else PLAIN_EVERY):
            return
        self._last = now
        if live:
            self._live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)
        else:
            self.line(f"  {text}")

    def line(self, text: str = "") -> None:
        """Lines that stay."""
        self.console.print(text, markup=False)
        self.console.file.flush()


def bar(done: int, total: int, width: int = 24) -> str:
    """A bar of characters that every log can hold."""
    filled = width * done // total
    return "[" + "#" * filled + "." * (width - filled) + "]"
