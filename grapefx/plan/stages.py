"""A plan's steps in stages: where stages end, what travels, and the order of work."""

from __future__ import annotations

from collections.abc import Sequence

from grapefx.analysis import pipelines as s
from grapefx.analysis.cost import graph_cost
from grapefx.analysis.device import DeviceModel, load_device
from grapefx.errors import MethodError, OptionError, PlacementError, nearest
from grapefx.methods import Method
from grapefx.passes.divide.commit import Commit, cut_commit
from grapefx.passes.divide.owners import Owners, legal_ends
from grapefx.passes.divide.stages import SEND, Stages, split_stages
from grapefx.passes.pipeline import LowerContext, prepare
from grapefx.plan.plan import Plan, sizes_of


def check_method(method: Method) -> None:
    """Raise ``MethodError`` for a method that stages cannot train."""
    odd = method.reads - {"error", "value", "output"}
    if not method.exact and (
        method.sequential or method.mechanism != "points" or odd or method.per_sample
    ):
        raise MethodError(
            f"method {method.name!r} cannot train in stages: its updates wait for each other, or "
            "read more than the error\n  remedy: bp, dfa, fdfa or grape"
        )


def usual_kind(plan: Plan) -> str:
    """The kind of step that a training run mostly takes."""
    kinds = plan.kinds()
    return "align" if "align" in kinds and plan.options.align_every == 1 else kinds[0]


def divide_plan(
    plan: Plan, kind: str, batch: int, ends: Sequence[int]
) -> tuple[Stages, Commit | None]:
    """A plan's step of one kind, for microbatches of ``batch`` samples, in stages."""
    names = [layer.name for layer in plan.layers]
    main, commit = cut_commit(plan.graph(kind), names, plan.method.name)
    sizes = sizes_of(main, batch, plan.rows(batch))
    context = LowerContext(sizes, plan.options.backend_options)
    fixed = prepare(main, kind, plan.options.backend, context)
    exact = kind == "calibration" or plan.method.exact
    found = split_stages(fixed, plan.layers, ends, exact=exact, readers=commit.readers())
    return found, commit if commit.outputs else None


def _links(stages: Stages, kind_exact: bool, first: bool) -> list[s.Link]:
    """Every value that travels, from one stage to one other."""
    early = {
        slot.name.removeprefix(SEND)
        for stage in stages.stages
        for slot in stage.step.outputs
        if slot.role == "output" and slot.name.startswith(SEND)
    }
    found = []
    for c in stages.channels:
        before: s.Do = "forward" if c.kind == "recv" else "estimate" if first else "update"
        if kind_exact and c.kind != "recv":
            before = "backward"
        after: s.Do = "forward" if c.name in early else "error"
        if c.kind == "chain":
            after = "backward"
        found += [s.Link(c.name, c.kind, c.source, t, after, before, c.bytes) for t in c.targets]
    return sorted(found, key=lambda link: link.after != "forward")  # received as they are sent


def schedule_of(
    stages: Stages, commit: Commit | None, microbatches: int, exact: bool
) -> s.Schedule:
    """What each rank computes and sends, and when; it was checked that it can run."""
    count, first = len(stages.stages), commit is not None and commit.first
    if exact:
        order = s.one_forward_one_backward(count, microbatches)
    elif first:
        order = s.learn_first(count, microbatches)
    else:
        order = s.feedback(count, microbatches)
    if commit is not None and (exact or not first):
        order = s.with_learning(order)
    return s.check(s.connect(order, _links(stages, exact, first)))


def layer_seconds(plan: Plan, batch: int, device: str | DeviceModel) -> list[float]:
    """Predicted seconds of a step, for what each layer owns and for what lies behind the last.

    ``batch``: samples of a microbatch. Roofline, each operator alone, on one worker of ``device``.
    Layers that cannot be parted count with the last of them.
    """
    model = load_device(device) if isinstance(device, str) else device
    kind = usual_kind(plan)
    step = plan.graph(kind)
    sizes = sizes_of(step, batch, plan.rows(batch))
    fixed = prepare(step, kind, "eager", LowerContext(sizes))
    ends = legal_ends(plan.layers)
    owners = Owners(fixed, plan.layers, ends, kind == "calibration" or plan.method.exact)
    found = [0.0] * (len(ends) + 1)
    for node, cost in graph_cost(fixed.gm).nodes.items():
        if node in owners.of:
            rates = (cost.matmul_flops, cost.vector_flops, cost.bytes, cost.dtype)
            found[owners.of[node]] += model.seconds(*rates)
    out = [0.0] * (len(plan.layers) + 1)
    for seconds, k in zip(found, (*ends, len(plan.layers)), strict=True):
        out[k] = seconds
    return out


def balanced_ends(seconds: Sequence[float], legal: Sequence[int], stages: int) -> tuple[int, ...]:
    """The ends, out of ``legal``, at which the slowest of ``stages`` is as fast as it can be.

    ``seconds``: of each layer, and of what lies behind the last one. A dynamic programme.

    Raises:
        PlacementError: there are fewer legal ends than stages need.
    """
    if len(legal) < stages - 1:
        raise PlacementError(
            f"{stages} stages need {stages - 1} ends, and this model has {len(legal)} places where "
            "a stage can end\n  remedy: fewer processes in the pipeline, or granularity='layer'"
        )
    sums = [0.0]
    for t in seconds:
        sums.append(sums[-1] + t)
    places = [*legal, len(seconds) - 1]
    # best[k]: the slowest stage and the ends, where a stage ends behind places[k]
    best: list[tuple[float, tuple[int, ...]]] = [(sums[p + 1], ()) for p in places]
    for count in range(1, stages):
        new: list[tuple[float, tuple[int, ...]]] = []
        for k, p in enumerate(places):
            options = [
                (max(best[j][0], sums[p + 1] - sums[q + 1]), (*best[j][1], q))
                for j, q in enumerate(places[:k])
                if j + 1 >= count
            ]
            new.append(min(options, default=(float("inf"), ())))
        best = new
    return best[-1][1]


def ends_of(plan: Plan, stages: object, count: int, batch: int, device: str) -> tuple[int, ...]:
    """The layers behind which stages end, as the option ``stages`` says: "auto", or names of
    layers or modules.

    Raises:
        OptionError: an unknown name, or another number of them than the pipeline has stages.
        PlacementError: there are not enough places to end a stage at.
    """
    if count == 1 and stages == "auto":
        return ()
    if stages == "auto":
        return balanced_ends(layer_seconds(plan, batch, device), legal_ends(plan.layers), count)
    if not isinstance(stages, (list, tuple)) or not all(isinstance(n, str) for n in stages):
        raise OptionError(
            f"stages={stages!r} must be 'auto' or a list of the names of the modules or feedback "
            "points behind which a stage ends"
        )
    names = [layer.name for layer in plan.layers]
    found = []
    for name in stages:
        inside = [k for k, n in enumerate(names) if n == name or n.startswith(name + ".")]
        if not inside:
            raise OptionError(f"stages: no feedback point {name!r}.{nearest(name, names)}")
        found.append(max(inside))
    if len(found) != count - 1:
        raise OptionError(
            f"stages names {len(found)} ends, which makes {len(found) + 1} stages, and the "
            f"pipeline has {count} processes"
        )
    return tuple(found)
