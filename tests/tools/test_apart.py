"""A job in its own process: limits, deaths, what it had reported; files with torn lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import apart

Send = Callable[[apart.Row], None]


def test_what_is_sent_is_merged() -> None:
    def job(send: Send) -> None:
        send({"stage": 1, "a": 1})
        send({"stage": 2})

    out = apart.run(job, timeout=60)
    assert out.row == {"stage": 2, "a": 1}
    assert (out.stop, out.death) == ("", "")
    assert out.rss_mib > 10 and out.seconds >= 0


def test_a_death_leaves_what_was_sent() -> None:
    def job(send: Send) -> None:
        send({"stage": 1})
        os._exit(3)

    out = apart.run(job, timeout=60)
    assert out.row == {"stage": 1}
    assert (out.stop, out.death) == ("", "the process died (exit code 3)")


def test_time_and_memory_end_a_job() -> None:
    def job(send: Send) -> None:
        send({"stage": 1})
        time.sleep(60)

    out = apart.run(job, timeout=0.4)
    assert out.row == {"stage": 1} and out.stop == "no result within 0 s" and out.seconds < 30
    out = apart.run(job, timeout=60, memory=2**20)
    assert out.stop == "more than 0 GiB of memory" and not out.death and out.rss_mib > 1


def test_a_torn_line_costs_itself_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder/rows.jsonl"

    def name(row: apart.Row) -> Any:
        return row["name"]

    assert apart.read(path, name) == {}
    for row in ({"name": "a", "x": 1}, {"name": "b"}, {"name": "a", "x": 2}):
        apart.append(path, row)
    assert apart.read(path, name) == {"a": {"name": "a", "x": 2}, "b": {"name": "b"}}
    assert not capsys.readouterr().err
    path.write_text(path.read_text()[:-5])
    apart.append(path, {"name": "c"})
    assert list(apart.read(path, name)) == ["a", "b", "c"]
    assert apart.read(path, name)["a"]["x"] == 1
    assert "damaged" in capsys.readouterr().err
    assert json.loads(path.read_text().splitlines()[-1]) == {"name": "c"}
