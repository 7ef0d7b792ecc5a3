"""Where a config's finished cells, checkpoints and locks are."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tools.common import results
from tools.reproduce.config import Config, Row

FORMAT = 1  # of a checkpoint


class RunError(Exception):
    """A run that must not go on; the message says why and what to do."""


def read_cells(path: Path, config: Config) -> list[results.Row]:
    """Finished cells, a line each.

    Raises:
        RunError: a line belongs to another config.
    """
    cells = results.read(path)
    for cell in cells:
        row = config.rows.get(cell["row"])
        if cell["config"] != config.hash or (row and cell["row_hash"] != row.hash):
            raise RunError(
                f"{path} holds row {cell['row']!r} of another config "
                f"({cell['config']}, {cell['row_hash']}; this one is {config.hash}, "
                f"{row and row.hash}): rename the config, or move the file away. "
                "Nothing was changed."
            )
    return cells


class Folder:
    """``runs/reproduce/NAME``: results, checkpoints, locks."""

    def __init__(self, config: Config, root: Path) -> None:
        self.config, self.path = config, root / config.name
        self.results = self.path / "results.jsonl"

    def stem(self, row: Row, seed: int) -> str:
        """What a cell's files are called."""
        clean = "".join(c if c.isalnum() or c in "-_" else "_" for c in row.name)
        return f"{clean}-{seed}"

    def read(self) -> list[results.Row]:
        """Finished cells."""
        return read_cells(self.results, self.config)

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
        """The file of a cell that is not finished."""
        return self.path / f"{self.stem(row, seed)}.pt"

    def save(self, row: Row, seed: int, state: dict[str, Any]) -> None:
        """Write the checkpoint at once: a kill leaves the old one or the new one."""
        with results.replaced(self.checkpoint(row, seed)) as file:
            torch.save(state | {"hash": [self.config.hash, row.hash]}, file)

    def load(self, row: Row, seed: int) -> dict[str, Any] | None:
        """The checkpoint, if there is one."""
        path = self.checkpoint(row, seed)
        if not path.exists():
            return None
        state = torch.load(path, weights_only=False)
        if state["hash"] != [self.config.hash, row.hash] or state["format"] != FORMAT:
            raise RunError(f"{path} belongs to another config: move it away. Nothing was changed.")
        return state
