"""Turns a request into a plan: options are resolved, a call captured, feedback points placed.

``request`` resolves what the user asked for, ``build`` makes a ``Plan`` of it and of one call, and
a ``Plan`` builds the graph of each kind of step when it is first asked for. ``stages`` divides a
plan's steps among processes.
"""

from __future__ import annotations

from grapefx.plan.build import build_forward, build_plan, plan_call
from grapefx.plan.plan import Plan, sizes_of
from grapefx.plan.request import resolve

__all__ = ["Plan", "build_forward", "build_plan", "plan_call", "resolve", "sizes_of"]
