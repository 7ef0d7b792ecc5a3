"""A job in its own process: limits, deaths, what it had reported."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from tools.common import process
from tools.common.results import Row

Send = Callable[[Row], None]


def test_what_is_sent_is_merged() -> None:
    def job(send: Send) -> None:
        send({"stage": 1, "a": 1})
        send({"stage": 2})

    out = process.run(job, timeout=60)
    assert out.row == {"stage": 2, "a": 1}
    assert (out.stop, out.death) == ("", "")
    assert out.rss_mib > 10 and out.seconds >= 0


def test_a_death_leaves_what_was_sent() -> None:
    def job(send: Send) -> None:
        send({"stage": 1})
        os._exit(3)

    out = process.run(job, timeout=60)
    assert out.row == {"stage": 1}
    assert (out.stop, out.death) == ("", "the process died (exit code 3)")


def test_time_and_memory_end_a_job() -> None:
    def job(send: Send) -> None:
        send({"stage": 1})
        time.sleep(60)

    out = process.run(job, timeout=0.4)
    assert out.row == {"stage": 1} and out.stop == "no result within 0 s" and out.seconds < 30
    out = process.run(job, timeout=60, memory=2**20)
    assert out.stop == "more than 0 GiB of memory" and not out.death and out.rss_mib > 1
