"""The options of ``grapefx.compile``: one frozen record, checked once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from grapefx.capture import FRONT_ENDS
from grapefx.errors import OptionError, is_number, nearest
from grapefx.lowering import PARALLEL
from grapefx.map_choice import parse_kind
from grapefx.passes.differentiate.weight_noise import PERTURB
from grapefx.passes.pipeline import BACKENDS
from grapefx.passes.place.placement import GRANULARITIES
from grapefx.passes.place.points import check_choice

_CHOICES: dict[str, tuple[Any, ...]] = {
    "calib_unit": ("epoch", "step"),
    "calib_refit": ("weights", "feedback", "both"),
    "calib_update": ("grad", "sgd"),
    "noise": ("gaussian", "rademacher"),
    "perturb": PERTURB,
    "granularity": (*GRANULARITIES, "auto"),
    "residual": ("cut", "leak"),
    "capture": FRONT_ENDS,
    "backend": BACKENDS,
    "parallel": PARALLEL,
}


@dataclass(frozen=True)
class Options:
    """Options that are not a method's own; see ``grapefx.compile`` for each."""

    calib_every: int | str | None = 1
    calib_unit: str = "epoch"
    calib_init: bool | None = None
    calib_refit: str = "both"
    calib_update: str = "grad"
    calib_threshold: float = 0.6
    calib_budget: float = 0.02
    steps_per_epoch: int | None = None
    ridge: float = 1e-2
    tangent_fraction: float = 1.0
    align_every: int = 1
    align_warmup: int = 0
    streams: str | int = "shared"
    directions: int = 1
    noise: str = "rademacher"
    perturb: str = "activation"
    granularity: str = "layer"
    points: Any = None
    error_at: Any = None
    residual: str = "cut"
    feedback: str = "auto"
    feedback_budget: int | None = None
    batch_dim: int = 0
    seed: int = 0
    dynamic: bool | None = None
    capture: str = "dynamo"
    backend: str = "inductor"
    backend_options: dict[str, Any] | None = None
    parallel: str = "off"

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            value = getattr(self, name)
            if value not in valid:
                raise OptionError(
                    f"{name}={value!r}.{nearest(str(value), [v for v in valid if v])}"
                )
        for name in ("calib_every", "steps_per_epoch", "feedback_budget"):
            value = getattr(self, name)
            if name == "calib_every" and value == "auto":
                continue
            if value is not None and (not _whole(value) or value < 1):
                or_auto = ", 'auto'" if name == "calib_every" else ""
                raise OptionError(f"{name}={value!r} must be a positive integer{or_auto} or None")
        least_of = {"align_every": 1, "align_warmup": 0, "directions": 1, "batch_dim": 0, "seed": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if not _whole(value) or value < least:
                raise OptionError(f"{name}={value!r} must be an integer of at least {least}")
        if self.streams not in ("shared", "per_layer") and not (
            _whole(self.streams) and self.streams >= 1  # type: ignore[operator]
        ):
            raise OptionError(
                f"streams={self.streams!r} must be 'shared', 'per_layer' or a number of groups"
            )
        for name in ("dynamic", "calib_init"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} must be None, True or False")
        if self.backend_options is not None and not isinstance(self.backend_options, dict):
            raise OptionError(f"backend_options={self.backend_options!r} must be a dict")
        parse_kind(self.feedback)
        for name in ("points", "error_at"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name))
        if self.residual == "leak" and (self.points is not None or self.granularity != "layer"):
            raise OptionError(
                "residual='leak' chooses its own points: leave points and granularity out"
            )
        for name in ("tangent_fraction", "calib_threshold", "calib_budget", "ridge"):
            if not is_number(getattr(self, name)):
                raise OptionError(f"{name}={getattr(self, name)!r} must be a number")
        if not 0 < self.tangent_fraction <= 1:
            raise OptionError(f"tangent_fraction={self.tangent_fraction!r} must be in (0, 1]")
        if not -1 <= self.calib_threshold <= 1:
            raise OptionError(f"calib_threshold={self.calib_threshold!r} is a cosine: in [-1, 1]")
        if not 0 < self.calib_budget <= 1:
            raise OptionError(f"calib_budget={self.calib_budget!r} must be in (0, 1]")
        if not self.ridge > 0:
            raise OptionError(f"ridge={self.ridge!r} must be positive")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


OPTION_NAMES = frozenset(f.name for f in dataclasses.fields(Options))
