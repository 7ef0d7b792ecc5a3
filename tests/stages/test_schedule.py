"""Schedules: makespans against closed forms, deadlocks found before anything runs."""

from __future__ import annotations

import dataclasses

import pytest

from grapefx.analysis import pipelines as s
from grapefx.errors import StageError

SIZES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, p, 4 * p)]
UNIT = {"forward": 1.0, "backward": 1.0, "update": 1.0}


def links(stages: int, exact: bool, after: s.Do = "backward") -> list[s.Link]:
    """A chain of stages: an activation to the next one, an error to all, or a gradient back.

    ``after="update"``: the gradient leaves with the whole backward, as in torch's GPipe and 1F1B.
    """
    found = [s.Link(f"h{r}", "recv", r, r + 1, "forward", "forward") for r in range(stages - 1)]
    if exact:
        found += [s.Link(f"g{r}", "chain", r + 1, r, after, "backward") for r in range(stages - 1)]
    else:
        found += [s.Link("e", "late", stages - 1, r, "error", "update") for r in range(stages - 1)]
    return found


def spans(order: s.Order, exact: bool, after: s.Do = "backward") -> list[s.Span]:
    found = s.check(s.connect(order, links(len(order), exact, after)))
    return s.simulate(found, lambda r, a: UNIT.get(a.do, 0.0))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_makespans_are_the_closed_forms(p: int, m: int) -> None:
    """The table of the theory (F = I = W = 1; a feedback update is W alone)."""
    for order in (s.forward_first(p, m), s.one_forward_one_backward(p, m)):
        assert s.makespan(spans(order, True, "update")) == 3 * (m + p - 1)
        assert s.makespan(spans(order, True)) <= 3 * (m + p - 1)
    expected = 2 * m + p - 1 if m >= p else p - 1 + m + m
    assert s.makespan(spans(s.feedback(p, m), False)) == expected
    zero = s.makespan(spans(s.zero_bubble(p, m), True))
    assert 3 * m <= zero <= 3 * (m + p - 1)
    if m >= 2 * p:
        assert 3 * m + p - 1 <= zero <= 3 * m + p + 1  # ZB-H1 is the lower bound
        best = s.makespan(spans(s.zero_bubble(p, m, 2 * p - 1), True))
        assert best <= zero
    if m == 1:
        assert zero == 2 * p + 1  # the best that a split backward can do


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_microbatches_held(p: int, m: int) -> None:
    connect = lambda order: s.connect(order, [])  # noqa: E731
    assert max(s.held(connect(s.forward_first(p, m)))) == m
    assert s.held(connect(s.one_forward_one_backward(p, m))) == [min(m, p - r) for r in range(p)]
    assert max(s.held(connect(s.feedback(p, m)))) == min(m, p)


def test_everything_is_done_once() -> None:
    for order in (s.forward_first(3, 5), s.one_forward_one_backward(3, 5), s.zero_bubble(3, 5)):
        for own in order:
            assert sorted(own) == sorted(
                (d, m) for m in range(5) for d in {d for d, _ in own}
            )  # fmt: skip


def test_a_deadlock_is_found() -> None:
    order = list(s.one_forward_one_backward(2, 2))
    order[0] = tuple(sorted(order[0], key=lambda a: a[0] != "backward"))  # backward comes first
    found = s.connect(tuple(order), links(2, True))
    with pytest.raises(StageError, match=r"deadlocks: rank 0 waits in recv of microbatch 0 \(g0"):
        s.check(found)


def test_another_order_on_the_wire_is_found() -> None:
    order = list(s.feedback(2, 2))
    order[1] = (("forward", 1), ("error", 1), ("forward", 0), ("error", 0), *order[1][4:])
    with pytest.raises(StageError, match="in another order"):
        s.check(s.connect(tuple(order), links(2, False)))


def test_a_value_that_nobody_receives_is_found() -> None:
    found = s.connect(s.feedback(2, 2), links(2, False))
    cut = tuple(a for a in found.ranks[1] if not (a.do == "recv" and a.microbatch == 1))
    with pytest.raises(StageError, match="not all of it"):
        s.check(dataclasses.replace(found, ranks=(found.ranks[0], cut)))


def test_a_gantt_chart_has_a_line_a_rank() -> None:
    text = s.gantt(spans(s.one_forward_one_backward(2, 2), True), 9)
    assert text.splitlines() == ["  0 FF.bubu..", "  1 .FbuFbu.."] or len(text.splitlines()) == 2
