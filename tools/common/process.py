"""A job in a process of its own, under a limit of time and one of memory."""

from __future__ import annotations

import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tools.common.results import Row

# gets a function that takes what is known so far; what it was given last counts
Job = Callable[[Callable[[Row], None]], None]


@dataclass
class Outcome:
    """What a job reported, and how it ended."""

    row: Row = field(default_factory=dict)
    stop: str = ""  # why it was ended: a limit
    death: str = ""  # the process ended by itself, before the job did
    seconds: float = 0.0
    rss_mib: int = 0  # its peak; of a process that was ended or died, the largest that was seen


def run(job: Job, *, timeout: float, memory: float = float("inf")) -> Outcome:
    """Run ``job`` in a forked process, for at most so many seconds and bytes.

    Rows that it sends are merged, so a job that is killed leaves what it had reported.
    """
    context = multiprocessing.get_context("fork")  # what is imported stays imported
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, theirs), daemon=True)
    out = Outcome()
    last = time.monotonic()
    waited = 0.0
    process.start()
    theirs.close()
    peak, reported = 0.0, None
    while True:
        if ours.poll(0.25):
            try:
                row, reported = ours.recv()
            except EOFError:
                break
            out.row |= row
            if reported is not None:
                break
            continue
        peak = max(peak, used := _resident(process.pid))
        # a machine that sleeps, or processes that were stopped, use up none of the time
        waited += min(time.monotonic() - last, 1.0)
        last = time.monotonic()
        if waited > timeout:
            out.stop = f"no result within {timeout:.0f} s"
        elif used > memory:
            out.stop = f"more than {memory / 2**30:.0f} GiB of memory"
        if out.stop:
            process.kill()
            break
    process.join(10)
    if reported is None and not out.stop:
        out.death = f"the process died (exit code {process.exitcode})"
    process.kill()  # one that has ended its job, but does not leave
    waited += min(time.monotonic() - last, 1.0)
    out.seconds = round(waited, 1)
    out.rss_mib = round(peak / 2**20) if reported is None else reported
    return out


def _child(job: Job, out: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    job(lambda row: out.send((row, None)))
    out.send(({}, round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)))
    out.close()


def _resident(pid: int | None) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0.0


def one_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank."""
    return next((s for s in str(error).splitlines() if s.strip()), "").strip()


def error_text(error: BaseException) -> str:
    """An error on one line, with its type."""
    return f"{type(error).__name__}: {one_line(error)}"
