"""What a user asks for: a method, a preset and options, resolved and checked together."""

from __future__ import annotations

from typing import Any

from torch import nn

from grapefx.errors import OptionError, nearest
from grapefx.methods import Method, get_method, option_names, preset_options
from grapefx.options import OPTION_NAMES, Options
from grapefx.plan.recommend import recommended


def resolve(
    method: str | Method,
    choices: dict[str, Any],
    preset: str = "recommended",
    model: nn.Module | None = None,
) -> tuple[Method, Options]:
    """The method and the options: the preset's first, then ``choices``, which win.

    ``model``: for what the preset "recommended" adds for its kind of network; nothing without it.

    Raises ``OptionError`` for an unknown method, preset or option, a value out of range, or two
    that do not go together.
    """
    chosen = {**preset_options(method, preset), **choices}
    own = {k: v for k, v in chosen.items() if k in OPTION_NAMES}
    rest = {k: v for k, v in chosen.items() if k not in OPTION_NAMES}
    valid = OPTION_NAMES | option_names(method) | {"preset"}
    for key in rest:
        if key not in valid and not (isinstance(method, Method) or not option_names(method)):
            raise OptionError(f"unknown option {key!r}.{nearest(key, valid)}")
    found = get_method(method, rest)
    if preset == "recommended" and model is not None:
        own |= recommended(model, found, choices)
    options = Options(**own)
    check_together(found, options)
    return found, options


def check_together(method: Method, options: Options) -> None:
    """Refuse options that are fine alone but not with this method."""
    if method.full_tangents and options.tangent_fraction < 1:
        raise OptionError(
            f"tangent_fraction={options.tangent_fraction!r}: method {method.name!r} needs the "
            "tangent of every sample for its gradient\n  remedy: tangent_fraction=1"
        )
    if method.mechanism == "parameters" and (options.directions, options.streams) != (1, "shared"):
        raise OptionError(
            f"method {method.name!r} takes one direction for all parameters\n"
            "  remedy: leave directions and streams out"
        )
    if options.calib_forget is not None and not (method.refits and options.calibrates):
        raise OptionError(
            f"calib_forget={options.calib_forget!r} is for calibrations that refit feedback maps, "
            f"and method {method.name!r} with calib_every={options.calib_every!r}, "
            f"calib_refit={options.calib_refit!r} has none\n  remedy: leave calib_forget out"
        )
    if options.mean_field is not None:
        learns = bool(method.learns_from) and options.mean_field != "start"
        if not method.feedback or not method.refits or method.mechanism != "points" or learns:
            raise OptionError(
                f"mean_field={options.mean_field!r} sets feedback maps, and method {method.name!r} "
                + (
                    "learns its own\n  remedy: mean_field='start'"
                    if learns
                    else "has none that can be set\n  remedy: leave mean_field out"
                )
            )
    if options.radial is True and method.mechanism != "points":
        raise OptionError(
            f"radial=True corrects cotangents at feedback points, and method {method.name!r} has "
            "none\n  remedy: leave radial out"
        )
    if options.exact_rows and (method.mechanism != "points" or method.exact):
        raise OptionError(
            f"exact_rows={options.exact_rows!r} corrects cotangents at feedback points, and method "
            f"{method.name!r} has none\n  remedy: leave exact_rows out"
        )
    if options.align_warmup and not method.aligns():
        raise OptionError(
            f"align_warmup={options.align_warmup!r}: method {method.name!r} learns no feedback "
            "from tangents, so there is nothing to align first\n  remedy: leave align_warmup out"
        )
    if options.perturb != "activation" and (
        not method.aligns() or {"tangent", "noise"} & method.reads
    ):
        raise OptionError(
            f"perturb={options.perturb!r} is for methods that estimate Jacobians (grape, fdfa, "
            f"grape-2024); {method.name!r} is none\n  remedy: leave perturb out"
        )
