"""What every command line here has in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """``python -m command``, whose ``--help`` shows the module's docstring as it is written."""
    return argparse.ArgumentParser(
        f"python -m {command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def count(least: int = 1, why: str = "") -> Callable[[str], int]:
    """The type of an option that is a number of something, and its least value."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: {why}{least} or more")
        return int(text)

    return number
