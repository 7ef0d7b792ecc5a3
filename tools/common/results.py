"""Results that survive a kill: files of JSON lines that only grow, and files replaced at once.

A results file has one JSON object on a line. A line is appended as soon as its result is known,
behind a whole line even where a kill tore the last one. Readers leave torn lines out, so that what
they held is done again; where two lines have one key, the later one counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


def read(path: Path) -> list[Row]:
    """The whole lines of a results file; none where there is no such file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        if line:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{path}: a damaged line is left out", file=sys.stderr)
    return rows


def latest(path: Path, key: Callable[[Row], Key]) -> dict[Key, Row]:
    """The last line of each key."""
    return {key(row): row for row in read(path)}


def append(path: Path, row: Row) -> None:
    """Add a line and have it on the disk; several processes may append to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of ``path`` at once: a kill leaves old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write(path: Path, text: str) -> None:
    """Replace a file's text at once."""
    with replaced(path) as file:
        file.write(text.encode())
