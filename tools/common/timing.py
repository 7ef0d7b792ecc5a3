"""Measurements that take turns, so that a slow moment of the machine is everyone's."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Name = TypeVar("Name")
Found = TypeVar("Found")
Clock = Callable[[], float]  # seconds from some start


def interleaved(
    measurements: Mapping[Name, Callable[[], Found]], rounds: int, warm_up: int = 0
) -> dict[Name, list[Found]]:
    """What each measurement returns, by round: in a round each runs once, in shuffled order.

    What the first ``warm_up`` rounds find is thrown away.
    """
    found: dict[Name, list[Found]] = {name: [] for name in measurements}
    for i in range(warm_up + rounds):
        for name in random.sample(list(measurements), len(measurements)):
            result = measurements[name]()
            if i >= warm_up:
                found[name].append(result)
    return found


def seconds(call: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """How long a call takes."""
    start = clock()
    call()
    return clock() - start


class Ratio(NamedTuple):
    """The median of paired ratios, between their quartiles."""

    low: float
    median: float
    high: float


def ratios(mine: Sequence[float], base: Sequence[float]) -> Ratio:
    """The ratios of ``mine`` to ``base``, each of the same round."""
    found = sorted(a / b for a, b in zip(mine, base, strict=True))
    n = len(found)
    return Ratio(found[n // 4], statistics.median(found), found[3 * n // 4])


def median_ms(values: Sequence[float]) -> float:
    """The median of seconds, in milliseconds."""
    return 1e3 * statistics.median(values)
