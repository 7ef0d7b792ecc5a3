"""Where a method and the options of a user put feedback points, within the budget of their maps."""

from __future__ import annotations

from grapefx.errors import CaptureError, PlacementError
from grapefx.ir import Captured
from grapefx.maps import plain_maps
from grapefx.methods import Method
from grapefx.options import Options
from grapefx.passes.graph.folds import batch_folds
from grapefx.passes.graph.source import quoted
from grapefx.passes.place.leak import is_edge
from grapefx.passes.place.placement import GRANULARITIES, Placement, place
from grapefx.passes.place.sweep import UncuttableError, sample_shape


def refuse_sparse(captured: Captured) -> None:
    places = {"aten.embedding.default": 4, "aten.embedding_bag.padding_idx": 5}
    for node in captured.gm.graph.nodes:
        at = places.get(str(node.target))
        if at is not None and len(node.args) > at and node.args[at] is True:
            raise CaptureError(
                f"{node.target} (node {node.name!r}) asks for sparse gradients, which only "
                f"method='bp' gives{quoted(node)}\n  remedy: nn.Embedding(sparse=False)"
            )


def reads_classes(method: Method) -> bool:
    """Whether the error tap must be the output itself."""
    return bool({"target", "output"} & (method.reads | method.learns_from))


def place_for(
    captured: Captured, trainable: set[str], method: Method, options: Options, batch_size: int
) -> Placement:
    """Where the options ask for points; with granularity "auto" the finest that fits the budget."""
    error_at = options.error_at
    if error_at is None and reads_classes(method):
        error_at = "output"
    points = options.points
    if options.residual == "leak":
        points = is_edge if any(map(is_edge, captured.gm.graph.nodes)) else None
        if points is None and not method.exact:
            raise PlacementError(
                "residual='leak' puts feedback at the inputs of weight layers; in this model they "
                "all read the model's own inputs\n  remedy: use method='bp', or leave residual out"
            )

    def at(granularity: str) -> Placement:
        return place(
            captured,
            trainable=trainable,
            granularity=granularity,
            batch_size=batch_size,
            points=points,
            error_at=error_at,
        )

    try:
        finest = at(GRANULARITIES[0] if options.granularity == "auto" else options.granularity)
    except UncuttableError as e:
        if not method.exact:
            raise
        return Placement((), (), (), refusal=str(e))  # backpropagation needs no feedback point
    if options.granularity != "auto":
        return finest
    budget = default_budget(options, captured)
    for granularity in GRANULARITIES:
        placement = finest if granularity == GRANULARITIES[0] else at(granularity)
        if placement.cuts and _full_bytes(placement, captured, batch_size) <= budget:
            return placement
    return finest  # the kinds of its maps will fit the budget


def _full_bytes(placement: Placement, captured: Captured, batch_size: int) -> int:
    folds = batch_folds(captured.gm.graph, captured.batch, batch_size)
    shapes = [sample_shape(t, folds[t]) for t in placement.taps]
    taps = [(folds[t].dim, folds[t].outer, folds[t].inner) for t in placement.taps]
    maps, _ = plain_maps(tuple(c.layer for c in placement.cuts), shapes, taps)
    return sum(m.bytes for m in maps)


def default_budget(options: Options, captured: Captured) -> int:
    """Most bytes of feedback maps: as asked, or a quarter of the parameters', at least 256 MiB."""
    if options.feedback_budget is not None:
        return options.feedback_budget
    nodes = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
    own = [
        n.meta["val"] for n, s in zip(nodes, captured.inputs, strict=True) if s.role == "parameter"
    ]
    return max(256 * 2**20, sum(int(p.numel() * p.element_size()) for p in own) // 4)
