"""Where a config's finished cells, checkpoints and locks are."""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from repro_config import Config, Row

FORMAT = 1  # of a checkpoint


class RunError(Exception):
    """A run that must not go on; the message says why and what to do."""


@contextlib.contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file written at once: a kill leaves the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def replace(path: Path, text: str) -> None:
    """A file's text, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as file:
        file.write(text.encode())


def read_cells(path: Path, config: Config) -> list[dict[str, Any]]:
    """Finished cells, a line each. A line torn by a kill is left out, and so done again.

    Raises:
        RunError: a line belongs to another config.
    """
    cells = []
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:
            print(f"{path}: a damaged line is left out", file=sys.stderr)
            continue
        row = config.rows.get(cell["row"])
        if cell["config"] != config.hash or (row and cell["row_hash"] != row.hash):
            raise RunError(
                f"{path} holds row {cell['row']!r} of another config "
                f"({cell['config']}, {cell['row_hash']}; this one is {config.hash}, "
                f"{row and row.hash}): rename the config, or move the file away. "
                "Nothing was changed."
            )
        cells.append(cell)
    return cells


class Folder:
    """``runs/reproduce/NAME``: results, checkpoints, locks."""

    def __init__(self, config: Config, root: Path) -> None:
        self.config, self.path = config, root / config.name
        self.results = self.path / "results.jsonl"

    def stem(self, row: Row, seed: int) -> str:
        clean = "".join(c if c.isalnum() or c in "-_" else "_" for c in row.name)
        return f"{clean}-{seed}"

    def read(self) -> list[dict[str, Any]]:
        """Finished cells."""
        return read_cells(self.results, self.config)

    def append(self, cell: dict[str, Any]) -> None:
        """One line in one write, behind a whole line."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.results.open("a+b") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            torn = log.tell() and self.results.read_bytes()[-1:] != b"\n"
            log.write((b"\n" if torn else b"") + json.dumps(cell).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())

    @contextlib.contextmanager
    def lock(self, row: Row, seed: int) -> Iterator[bool]:
        """Whether this process may train the cell."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / f"{self.stem(row, seed)}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def checkpoint(self, row: Row, seed: int) -> Path:
        return self.path / f"{self.stem(row, seed)}.pt"

    def save(self, row: Row, seed: int, state: dict[str, Any]) -> None:
        """Atomically: a kill leaves the old checkpoint or the new one."""
        path = self.checkpoint(row, seed)
        with written(path) as file:
            torch.save(state | {"hash": [self.config.hash, row.hash]}, file)

    def load(self, row: Row, seed: int) -> dict[str, Any] | None:
        path = self.checkpoint(row, seed)
        if not path.exists():
            return None
        state = torch.load(path, weights_only=False)
        if state["hash"] != [self.config.hash, row.hash] or state["format"] != FORMAT:
            raise RunError(f"{path} belongs to another config: move it away. Nothing was changed.")
        return state
