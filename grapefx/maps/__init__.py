"""Holds feedback maps: what one is, which kind a layer gets, and random ones made from a seed."""

from __future__ import annotations

from grapefx.maps.choice import choose_maps, parse_kind
from grapefx.maps.feedback_map import (
    ErrorRows,
    FeedbackMap,
    StateSpec,
    from_samples,
    plain_maps,
    to_samples,
)

__all__ = [
    "ErrorRows",
    "FeedbackMap",
    "StateSpec",
    "choose_maps",
    "from_samples",
    "parse_kind",
    "plain_maps",
    "to_samples",
]
