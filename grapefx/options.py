"""The options of ``grapefx.compile``: one table of values, defaults and meanings.

``compile`` checks against it, ``inspect`` and the command line read it, and ``docs/options.md`` is
made from it (``python -m tools.options_page``). ``CompileOptions`` repeats the names and types in
the form that editors and type checkers read; a test holds the two together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from grapefx.capture import FRONT_ENDS
from grapefx.errors import OptionError, is_number, nearest
from grapefx.lowering import PARALLEL
from grapefx.maps import parse_kind
from grapefx.passes.differentiate.weight_noise import PERTURB
from grapefx.passes.pipeline import BACKENDS
from grapefx.passes.place.placement import GRANULARITIES
from grapefx.passes.place.points import check_choice


@dataclass(frozen=True)
class Values:
    """The values that an option takes: ``words``, and beside them numbers or what is checked.

    ``least``: whole numbers from this one on. ``between``: numbers in an interval, whose lower end
    does not belong to it with ``above``. ``check``: raises ``OptionError`` for any other value.
    """

    words: tuple[Any, ...] = ()
    least: int | None = None
    between: tuple[float, float] | None = None
    above: bool = False
    check: Callable[[Any], object] | None = None

    def refuse(self, name: str, value: Any) -> None:
        """Raise ``OptionError`` for a value that the option ``name`` does not take."""
        if any(type(value) is type(word) and value == word for word in self.words):
            return
        if self.check is not None:
            self.check(value)
            return
        if self.least is not None and _whole(value) and value >= self.least:
            return
        if self.between is not None:
            if not is_number(value):
                raise OptionError(f"{name}={value!r} must be a number")
            low, high = self.between
            if (low < value if self.above else low <= value) and value <= high:
                return
        if self.least is None and self.between is None:
            words = [word for word in self.words if isinstance(word, str)]
            if words:
                raise OptionError(f"{name}={value!r}.{nearest(str(value), words)}")
        raise OptionError(f"{name}={value!r} must be {self}")

    def __str__(self) -> str:
        parts = []
        if self.least is not None:
            parts.append(
                "a positive integer" if self.least == 1 else f"an integer of at least {self.least}"
            )
        if self.between is not None:
            low, high = self.between
            if high == math.inf:
                parts.append("positive" if self.above else f"at least {low}")
            else:
                parts.append(f"in {'(' if self.above else '['}{low}, {high}]")
        parts += [str(word) if word is None or word is True else repr(word) for word in self.words]
        return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _dict(value: Any) -> None:
    if not isinstance(value, dict):
        raise OptionError(f"backend_options={value!r} must be a dict")


def _option(default: Any, values: Values, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"values": values, "meaning": meaning})


# option -> the other one that it belongs to, and the value with which it is read (None: any)
_READ_WITH: dict[str, tuple[str, Any]] = {
    "calib_growth": ("calib_every", "geometric"),
    "calib_gap": ("calib_every", "geometric"),
    "calib_threshold": ("calib_every", "auto"),
    "calib_budget": ("calib_every", "auto"),
    "exact_weight": ("exact_rows", None),
    "exact_pick": ("exact_rows", None),
    "exact_late": ("exact_rows", None),
}


@dataclass(frozen=True)
class Options:
    """What ``grapefx.compile`` takes beside the method and its own options."""

    calib_every: int | Literal["auto", "geometric"] | None = _option(
        1,
        Values(("auto", "geometric", None), least=1),
        "T, calibrate once every T epochs (GrAPE 2026 section 3.4; default 1); None for "
        'never; "auto": when the gradients\' alignment asks for it. A calibration that finds '
        "their mean cosine with the true ones under ``calib_threshold`` halves the gap to the "
        "next, another doubles it; at most a part ``calib_budget`` of the steps calibrates. "
        '"geometric": in steps, often at first and then at gaps that grow by ``calib_growth`` up '
        "to ``calib_gap``; epochs need not be announced.",
    )
    calib_growth: float = _option(
        1.1,
        Values(between=(1, math.inf)),
        'With calib_every="geometric": calibrations are at the steps floor(1 + g + ... + g^(k-1)) '
        "and step 0.",
    )
    calib_gap: int | None = _option(
        None,
        Values((None,), least=1),
        'With calib_every="geometric": the most steps between two calibrations.',
    )
    calib_forget: float | None = _option(
        None,
        Values((None,), between=(0, 1)),
        "The part of the earlier calibrations' normal equations that each new one keeps when it "
        "refits the maps; None (default) fits to the one batch alone. Takes one more matrix of a "
        "map's size. Among several processes the fit is that of all their samples.",
    )
    calib_unit: Literal["epoch", "step"] = _option(
        "epoch",
        Values(("epoch", "step")),
        '"epoch", or "step" to count training steps.',
    )
    calib_init: bool | None = _option(
        None,
        Values((None, True, False)),
        "Calibrate at step 0 as well (default: whenever calib_every is not None).",
    )
    calib_refit: Literal["weights", "feedback", "both"] = _option(
        "both",
        Values(("weights", "feedback", "both")),
        'What a calibration batch does: "weights" (exact gradients only, GrAPE 2026), '
        '"feedback" (only refits the maps by ridge regression), "both" (default).',
    )
    calib_update: Literal["grad", "sgd"] = _option(
        "grad",
        Values(("grad", "sgd")),
        '"grad" leaves exact gradients for your optimizer; "sgd" steps by an SGD(0.01, '
        "momentum 0.9) of its own and leaves grad None (GrAPE 2026 appendix E); not with a "
        "GradScaler, whose scale it does not know.",
    )
    calib_threshold: float = _option(
        0.6,
        Values(between=(-1, 1)),
        'With calib_every="auto": the mean cosine between feedback gradients and true ones '
        "under which calibrations come more often.",
    )
    calib_budget: float = _option(
        0.02,
        Values(between=(0, 1), above=True),
        'With calib_every="auto": the largest part of the steps that calibrates.',
    )
    steps_per_epoch: int | None = _option(
        None,
        Values((None,), least=1),
        "Counts epochs without ``net.set_epoch``.",
    )
    ridge: float = _option(
        1e-2,
        Values(between=(0, math.inf), above=True),
        "Ridge of the refit, relative to the mean eigenvalue of e^T e.",
    )
    tangent_fraction: float = _option(
        1.0,
        Values(between=(0, 1), above=True),
        "The part of each batch that carries tangents (1: all, as in GrAPE 2026 algorithm 1).",
    )
    align_every: int = _option(
        1,
        Values(least=1),
        "Learn from tangents every k-th step.",
    )
    align_warmup: int = _option(
        0,
        Values(least=0),
        "In the first steps only the feedback maps learn: weight gradients are zeros (but for "
        "the exact ones of a calibration).",
    )
    streams: int | Literal["shared", "per_layer"] = _option(
        "shared",
        Values(("shared", "per_layer"), least=1),
        'Whose noise shares one tangent pass: "shared" (default; all layers, algorithm 1 of '
        'GrAPE 2024 and of FDFA 2024), "per_layer" (GrAPE 2026 algorithm 1 read literally: '
        "one pass each), or a number of groups of consecutive layers.",
    )
    directions: int = _option(
        1,
        Values(least=1),
        "K tangent passes with noise of their own for each stream; estimates average.",
    )
    noise: Literal["gaussian", "rademacher"] = _option(
        "rademacher",
        Values(("rademacher", "gaussian")),
        '"rademacher" (default; random signs: the same expectation at a fraction of the cost) '
        'or "gaussian" (GrAPE 2026, FDFA 2024).',
    )
    perturb: Literal["activation", "weight", "auto"] = _option(
        "activation",
        Values(PERTURB),
        'Where noise is added for a Jacobian estimate: "activation" (default), "weight", or '
        '"auto", whichever has fewer entries in a sample (GrAPE 2026 section 3.2). See '
        "docs/method.md.",
    )
    radial: bool | Literal["auto"] = _option(
        False,
        Values(("auto", True, False)),
        "Correct each cotangent along its value, so that <h, c> is what Euler's theorem says of "
        "the true gradient: at feedback points behind which everything is linear, ReLU, pooling or "
        'addition, as the graph shows. True needs at least one such point, "auto" none. See '
        "docs/method.md.",
    )
    exact_rows: float = _option(
        0.0,
        Values(between=(0, 1)),
        "The part of each batch that is backpropagated through the true chain (0: none; "
        "docs/methods.md has what measured well); ``exact_pick`` says which samples. On them the "
        "true gradient corrects each cotangent, so that each update waits for this chain, at that "
        "part of its cost. See docs/method.md.",
    )
    exact_weight: float = _option(
        2.0,
        Values(between=(0, math.inf), above=True),
        "With exact_rows: w of c += w (delta - c), the correction of those samples' cotangents. "
        "1 makes them exact; 1 / exact_rows makes the mean gradient unbiased where samples are "
        "drawn at random, and noisier; in between a part of the bias stays.",
    )
    exact_pick: Literal["first", "largest"] = _option(
        "first",
        Values(("first", "largest")),
        'With exact_rows: the "first" samples, which shuffled loaders draw at random, or those of '
        'the "largest" error.',
    )
    exact_late: bool = _option(
        False,
        Values((True, False)),
        "With exact_rows: what they correct of each parameter's gradient is added in the next "
        "backward, so that no update waits for the chain. It is kept in the learning state: one "
        "tensor of each parameter's size. The loss must keep its scale from step to step: not with "
        "a GradScaler, whose scale is not known here. See docs/method.md.",
    )
    mean_field: int | Literal["start"] | None = _option(
        None,
        Values(("start", None), least=1),
        "Feedback maps that need no true gradient: the Jacobian at the mean of its derivatives, "
        "from the weights and from running means, computed in every k-th step (a number; 1 is "
        "every step), for a method whose maps are fixed between calibrations (dfa), which then "
        'refit none; or only once, as the "start" of maps that learn or are refitted. None: '
        "never. See docs/method.md.",
    )
    granularity: Literal["layer", "sublayer", "block", "auto"] = _option(
        "layer",
        Values((*GRANULARITIES, "auto")),
        'A feedback point behind each weight "layer" (default), "sublayer" (micro: each value '
        'that every path crosses) or "block" (macro); "auto": the finest of these whose full '
        "maps fit ``feedback_budget``. See docs/feedback.md for this and the next five.",
    )
    points: Any = _option(
        None,
        Values((None,), check=functools.partial(check_choice, "points")),
        "Feedback points of your own: module names or globs, module classes, a function of "
        "the captured graph's node, or a list of these.",
    )
    error_at: Any = _option(
        None,
        Values((None,), check=functools.partial(check_choice, "error_at")),
        'Likewise, where the error is taken; "output" for the output whatever its width '
        "(default: in front of an output layer of 1,024 entries or more).",
    )
    residual: Literal["cut", "leak"] = _option(
        "cut",
        Values(("cut", "leak")),
        '"cut", or "leak": feedback at the inputs of weight layers, past which shortcuts '
        "carry the true gradient (as libraries that replace each layer's input gradient).",
    )
    feedback: str = _option(
        "auto",
        Values(check=parse_kind),
        'Kind of the maps: "dense", "pooled:G", "low-rank:R", "sparse:G", "seeded", or "auto" '
        "(default): dense while they fit ``feedback_budget``.",
    )
    feedback_budget: int | None = _option(
        None,
        Values((None,), least=1),
        "Most bytes of feedback maps (default: a quarter of the parameters' bytes, at least "
        "256 MiB).",
    )
    batch_dim: int = _option(
        0,
        Values(least=0),
        "The dim of the inputs that holds the batch.",
    )
    seed: int = _option(
        0,
        Values(least=0),
        "Of feedback maps and noise; the global random stream is not touched.",
    )
    dynamic: bool | None = _option(
        None,
        Values((None, True, False)),
        "None compiles the first batch size on its own and one graph for all others, True one "
        "graph for all from the start, False one for each size.",
    )
    capture: Literal["dynamo", "export"] = _option(
        "dynamo",
        Values(FRONT_ENDS),
        '"dynamo" traces with torch\'s own tracer of Python and its guards; "export" is for '
        "models that it refuses, and watches less (docs/integrations.md).",
    )
    backend: Literal["inductor", "eager"] = _option(
        "inductor",
        Values(BACKENDS),
        '"inductor", or "eager" to run the graphs uncompiled.',
    )
    backend_options: dict[str, Any] | None = _option(
        None,
        Values((None,), check=_dict),
        "Inductor options.",
    )
    parallel: Literal["off", "graphs", "horizontal", "streams", "auto"] = _option(
        "off",
        Values(PARALLEL),
        'How updates run at a fixed batch size: "off", one kernel after the other; "graphs", '
        'captured in CUDA graphs; "horizontal", what layers have in common batched (and '
        'captured); "streams", each layer\'s part on one of four CUDA streams (and captured); '
        '"auto", the fastest of these, measured at the first step. Default: "off". On a CPU '
        '"graphs" and "streams" are "off". See docs/performance.md.',
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            field.metadata["values"].refuse(field.name, getattr(self, field.name))
        for name, (other, needed) in _READ_WITH.items():
            have, asked = getattr(self, other), getattr(self, name)
            useless = not have if needed is None else have != needed
            if useless and asked != OPTIONS[name].default:
                remedy = f"set {other}" if needed is None else f"{other}={needed!r}"
                raise OptionError(
                    f"{name}={asked!r} is not read with {other}={have!r}\n"
                    f"  remedy: {remedy}, or leave {name} out"
                )
        if self.residual == "leak" and (self.points is not None or self.granularity != "layer"):
            raise OptionError(
                "residual='leak' chooses its own points: leave points and granularity out"
            )
        if isinstance(self.mean_field, int) and self.calib_refit == "feedback":
            raise OptionError(
                f"calib_refit='feedback' refits maps that mean_field={self.mean_field} computes\n"
                "  remedy: leave one of the two out"
            )
        if self.mean_field == "start" and self.calibrates and self.starts:
            raise OptionError(
                "mean_field='start' sets the maps of step 0, which a calibration at step 0 refits\n"
                "  remedy: calib_init=False, or leave mean_field out"
            )

    def without(self, name: str) -> Options:
        """These options with one at its default, and with it what is read beside it alone."""
        names = [name, *(k for k, (other, _) in _READ_WITH.items() if other == name)]
        defaults: dict[str, Any] = {k: OPTIONS[k].default for k in names}
        return dataclasses.replace(self, **defaults)

    @property
    def calibrates(self) -> bool:
        """Whether calibrations refit the maps."""
        refits = self.calib_refit != "weights" and not isinstance(self.mean_field, int)
        return self.calib_every is not None and refits

    @property
    def starts(self) -> bool:
        """Whether step 0 is a calibration."""
        return self.calib_every is not None if self.calib_init is None else self.calib_init


OPTIONS = {field.name: field for field in dataclasses.fields(Options)}
OPTION_NAMES = frozenset(OPTIONS)


def described() -> str:
    """Every option in the form of a docstring's ``Args``, indented by eight spaces."""
    lines = []
    for name, field in OPTIONS.items():
        text = f"{name}: {field.metadata['meaning']}"
        lines += textwrap.wrap(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 12)
    return "\n".join(lines)


class CompileOptions(TypedDict, total=False):
    """The keyword arguments of ``grapefx.compile`` that the signature does not name."""

    calib_growth: float
    calib_gap: int | None
    calib_forget: float | None
    calib_unit: Literal["epoch", "step"]
    calib_init: bool | None
    calib_refit: Literal["weights", "feedback", "both"]
    calib_update: Literal["grad", "sgd"]
    calib_threshold: float
    calib_budget: float
    steps_per_epoch: int | None
    ridge: float
    tangent_fraction: float
    align_every: int
    align_warmup: int
    streams: int | Literal["shared", "per_layer"]
    directions: int
    noise: Literal["gaussian", "rademacher"]
    perturb: Literal["activation", "weight", "auto"]
    radial: bool | Literal["auto"]
    exact_rows: float
    exact_weight: float
    exact_pick: Literal["first", "largest"]
    exact_late: bool
    mean_field: int | Literal["start"] | None
    granularity: Literal["layer", "sublayer", "block", "auto"]
    points: Any
    error_at: Any
    residual: Literal["cut", "leak"]
    feedback: str
    feedback_budget: int | None
    batch_dim: int
    seed: int
    dynamic: bool | None
    capture: Literal["dynamo", "export"]
    backend: Literal["inductor", "eager"]
    backend_options: dict[str, Any] | None
    parallel: Literal["off", "graphs", "horizontal", "streams", "auto"]
    # the options of the built-in methods; those of others go into a ``Method`` instance
    alpha: float
    average: str
    cosine: str
    decay: float
    derivative: str
    eta: float
    init_b: str
    jitter: float
    lr: float
    mean: bool
    momentum: float
    norm: str
    optimizer: str
    order: str
    rate: float
    rule: str
    scale: float
    sign_error: bool
    step: str
