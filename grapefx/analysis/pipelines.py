"""Pipeline schedules as data: for each rank a list of actions; checked and timed before they run.

What a rank does with a microbatch: "forward"; "error" (the last rank: loss, cotangent and error);
"backward" (the gradient that goes on to earlier stages, in an exact step); "estimate" (what is
learned from, where a step learns before it updates); "update" (the stage's gradients). Once a step
it may "learn". Between them stand "send" and "recv": a send does not wait for its receiver, a
receive waits until the value is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from grapefx.errors import StageError
from grapefx.passes.divide.stages import Kind

Do = Literal[
    "forward", "error", "backward", "estimate", "update", "learn", "send", "recv"
]  # fmt: skip
ONCE = -1  # the microbatch of what is done once a step


@dataclass(frozen=True)
class Action:
    """One thing that a rank does. ``peer``: to or from whom; ``value``: the channel's name."""

    do: Do
    microbatch: int = ONCE
    peer: int = -1
    value: str = ""
    kind: Kind = "recv"

    def __str__(self) -> str:
        text = self.do if self.microbatch == ONCE else f"{self.do} of microbatch {self.microbatch}"
        if self.do in ("send", "recv"):
            text += f" ({self.value} {'to' if self.do == 'send' else 'from'} rank {self.peer})"
        return text


@dataclass(frozen=True)
class Link:
    """One value from one stage to another: computed in ``after``, read first in ``before``."""

    value: str
    kind: Kind
    source: int
    target: int
    after: Do
    before: Do
    bytes: int = 0


Order = tuple[tuple[tuple[Do, int], ...], ...]  # what each rank computes, in order


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank, by rank."""

    ranks: tuple[tuple[Action, ...], ...]

    def arriving(self, rank: int) -> dict[tuple[int, bool], list[Action]]:
        """The receives of a rank in the order in which each peer sends, by (peer, is it late)."""
        found: dict[tuple[int, bool], list[Action]] = {}
        for peer, actions in enumerate(self.ranks):
            for a in actions:
                if a.do == "send" and a.peer == rank:
                    key = (peer, a.kind == "late")
                    found.setdefault(key, []).append(
                        Action("recv", a.microbatch, peer, a.value, a.kind)
                    )
        return found


# orders of computation


def forward_first(stages: int, microbatches: int) -> Order:
    """GPipe (Huang et al. 2019): all forwards, then all backwards."""
    return tuple(
        (
            *_forwards(range(microbatches), r == stages - 1),
            *(a for m in range(microbatches) for a in _exact(m)),
        )
        for r in range(stages)
    )


def one_forward_one_backward(stages: int, microbatches: int) -> Order:
    """1F1B (Narayanan et al. 2019): at most P - s microbatches are held by stage s."""
    return _alternating(stages, microbatches, lambda r: stages - r, _exact)


def feedback(stages: int, microbatches: int) -> Order:
    """No backward chain: P microbatches ahead, then an update and a forward in turn."""
    return _alternating(stages, microbatches, lambda r: stages, lambda m: (("update", m),))


def learn_first(stages: int, microbatches: int) -> Order:
    """Feedback that projects with what it learned in the same step: all forwards come first."""
    every = range(microbatches)
    return tuple(
        (
            *_forwards(every, r == stages - 1),
            *(("estimate", m) for m in every),
            ("learn", ONCE),
            *(("update", m) for m in every),
        )
        for r in range(stages)
    )


def zero_bubble(stages: int, microbatches: int, held: int | None = None) -> Order:
    """Backward before forward before weight gradients, at most ``held`` microbatches a stage.

    With P held this is ZB-H1, with 2P - 1 ZB-H2 (Qi et al. 2023), as a list schedule in units of
    one forward.
    """
    cap = held or stages
    done: dict[tuple[Do, int, int], int] = {}
    clock = [0] * stages
    load = [0] * stages
    left = [{(d, m) for m in range(microbatches) for d in _SPLIT} for _ in range(stages)]
    orders: list[list[tuple[Do, int]]] = [[] for _ in range(stages)]
    while any(left):
        found = []
        for r in range(stages):
            for d, m in left[r]:
                at = _ready(d, m, r, stages, done)
                if at is not None and not (d == "forward" and load[r] >= cap):
                    found.append((max(at, clock[r]), _SPLIT.index(d), m, r))
        at, k, m, r = min(found)
        d = _SPLIT[k]
        done[d, r, m] = clock[r] = at + 1
        left[r].discard((d, m))
        load[r] += {"forward": 1, "backward": 0, "update": -1}[d]
        orders[r].append((d, m))
        if d == "forward" and r == stages - 1:
            orders[r].append(("error", m))
    return tuple(tuple(o) for o in orders)


_SPLIT: tuple[Do, ...] = ("backward", "forward", "update")


def _ready(do: Do, m: int, r: int, stages: int, done: dict[tuple[Do, int, int], int]) -> int | None:
    if do == "forward":
        return 0 if r == 0 else done.get(("forward", r - 1, m))
    if do == "update":
        return done.get(("backward", r, m))
    own = done.get(("forward", r, m))
    if r == stages - 1 or own is None:
        return own
    above = done.get(("backward", r + 1, m))
    return None if above is None else max(own, above)


def _exact(m: int) -> tuple[tuple[Do, int], ...]:
    return (("backward", m), ("update", m))


def _forwards(microbatches: Iterable[int], last: bool) -> tuple[tuple[Do, int], ...]:
    found: list[tuple[Do, int]] = []
    for m in microbatches:
        found.append(("forward", m))
        if last:
            found.append(("error", m))
    return tuple(found)


def _alternating(
    stages: int,
    microbatches: int,
    ahead: Callable[[int], int],
    then: Callable[[int], tuple[tuple[Do, int], ...]],
) -> Order:
    ranks = []
    for r in range(stages):
        first = min(microbatches, ahead(r))
        order = [*_forwards(range(first), r == stages - 1)]
        for m in range(microbatches):
            order += then(m)
            if m + first < microbatches:
                order += _forwards([m + first], r == stages - 1)
        ranks.append(tuple(order))
    return tuple(ranks)


def with_learning(order: Order) -> Order:
    """The same, and every rank learns at the end."""
    return tuple((*own, ("learn", ONCE)) for own in order)


# actions


def connect(order: Order, links: Sequence[Link]) -> Schedule:
    """Put the sends behind what computes a value and the receives in front of what reads it."""
    ranks = []
    for r, own in enumerate(order):
        actions: list[Action] = []
        present = {do for do, _ in own}
        for do, m in own:
            for link in links:
                before = link.before if link.before in present else "update"
                if link.target == r and before == do:
                    actions.append(Action("recv", m, link.source, link.value, link.kind))
            actions.append(Action(do, m))
            for link in links:
                if link.source == r and link.after == do:
                    actions.append(Action("send", m, link.target, link.value, link.kind))
        ranks.append(tuple(actions))
    return Schedule(tuple(ranks))


@dataclass(frozen=True)
class Span:
    """When a rank does something, in seconds."""

    rank: int
    action: Action
    start: float
    end: float


def simulate(
    schedule: Schedule,
    seconds: Callable[[int, Action], float],
    transfer: Callable[[Action], float] = lambda action: 0.0,
) -> list[Span]:
    """When everything happens if a rank does one thing at a time and sending costs it nothing.

    ``seconds``: how long an action takes on a rank. ``transfer``: how long what it sends travels.

    Raises:
        StageError: a receive waits for what never comes; the message names rank and action.
    """
    ranks = schedule.ranks
    at = [0] * len(ranks)
    clock = [0.0] * len(ranks)
    there: dict[tuple[int, int, int, str, Kind], float] = {}
    spans: list[Span] = []
    moved = True
    while moved:
        moved = False
        for r, actions in enumerate(ranks):
            while at[r] < len(actions):
                a = actions[at[r]]
                if a.do == "recv":
                    arrival = there.get((a.peer, r, a.microbatch, a.value, a.kind))
                    if arrival is None:
                        break
                    clock[r] = max(clock[r], arrival)
                elif a.do == "send":
                    key = (r, a.peer, a.microbatch, a.value, a.kind)
                    there[key] = clock[r] + transfer(a)
                else:
                    start = clock[r]
                    clock[r] += seconds(r, a)
                    spans.append(Span(r, a, start, clock[r]))
                at[r] += 1
                moved = True
    for r, actions in enumerate(ranks):
        if at[r] < len(actions):
            raise StageError(
                f"the schedule deadlocks: rank {r} waits in {actions[at[r]]}, which is never sent "
                "before\n  remedy: please report this model, or use another stages="
            )
    return spans


def check(schedule: Schedule) -> Schedule:
    """The schedule itself if it can run.

    Raises:
        StageError: a receive waits for ever, a value is sent that nobody receives, or two ranks
            exchange values in different orders (a transport without names would mix them up).
    """
    simulate(schedule, lambda r, a: 1.0)
    for r, actions in enumerate(schedule.ranks):
        for (peer, late), sent in schedule.arriving(r).items():
            got = [
                a for a in actions if a.do == "recv" and (a.peer, a.kind == "late") == (peer, late)
            ]
            if got != sent:
                odd = next((a for a, b in zip(got, sent, strict=False) if a != b), None)
                raise StageError(
                    f"rank {r} receives from rank {peer} in another order than it sends, or not "
                    f"all of it: {odd or (got or sent)[-1]}"
                )
    return schedule


def makespan(spans: Sequence[Span]) -> float:
    """The end of the last action."""
    return max((s.end for s in spans), default=0.0)


def held(schedule: Schedule) -> list[int]:
    """The most microbatches that each rank keeps saved values of at a time."""
    peaks = []
    for actions in schedule.ranks:
        now = peak = 0
        for a in actions:
            now += {"forward": 1, "update": -1}.get(a.do, 0)
            peak = max(peak, now)
        peaks.append(peak)
    return peaks


_LETTERS = {"forward": "F", "error": "e", "backward": "b", "estimate": "j", "update": "u",
            "learn": "L"}  # fmt: skip


def gantt(spans: Sequence[Span], width: int = 72) -> str:
    """The spans as text: a line a rank, a column an equal part of the makespan."""
    end = makespan(spans) or 1.0
    ranks = max((s.rank for s in spans), default=-1) + 1
    rows = [["."] * width for _ in range(ranks)]
    for s in spans:
        first, last = round(s.start / end * width), round(s.end / end * width)
        for x in range(first, min(max(last, first), width)):
            rows[s.rank][x] = _LETTERS.get(s.action.do, "?")
    return "\n".join(f"{r:>3} {''.join(row)}" for r, row in enumerate(rows))
