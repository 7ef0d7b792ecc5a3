"""The records that passes hand to each other. All are frozen; a graph is changed by copying it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch.fx import Graph, GraphModule, Node

from grapefx.torch_compat import graph_module

# What a placeholder of a step graph is; "saved" comes from the part of the step in front.
Role = Literal[
    "parameter",
    "buffer",
    "constant",
    "input",
    "cotangent",
    "noise",
    "random",
    "feedback",
    "target",
    "saved",
]
# What an output of a step graph is; "saved" goes from one part of a step to the next one.
OutputRole = Literal[
    "output", "buffer", "gradient", "input_gradient", "feedback", "metric", "saved"
]
# What a node of a step graph is for (``passes/graph/meta.py``).
Phase = Literal[
    "forward",
    "buffer",
    "tangent",
    "error",
    "alignment",
    "exact_rows",
    "late_rows",
    "mean_field",
    "projection",
    "refit",
    "weight_grad",
    "input_grad",
    "metric",
]

INPUT_ROLES: tuple[Role, ...] = get_args(Role)
OUTPUT_ROLES: tuple[OutputRole, ...] = get_args(OutputRole)
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Slot:
    """One input or output of a graph: its role and what it is called there."""

    role: Role | OutputRole
    name: str


@dataclass(frozen=True)
class Layer:
    """One feedback point and the segment behind it.

    ``sample_shape`` is one sample's part of h_l; ``fold`` says where the batch is in h_l: the dim
    whose size is outer * N * inner, as (dim, outer, inner). ``channel``: the sample's dim that
    holds channels, None where that is not known.
    """

    index: int
    name: str
    node: str
    sample_shape: tuple[int, ...]
    fold: tuple[int, int, int]
    parameters: tuple[str, ...]
    source: str = ""
    channel: int | None = None


@dataclass(frozen=True)
class StepGraph:
    """A whole training step (or a part of one) as one flat functional ATen graph.

    ``derived``: the operators whose tangent rule was made from torch's own derivatives.
    """

    gm: GraphModule
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    derived: tuple[str, ...] = ()

    def placeholders(self) -> list[Node]:
        """The graph's placeholders, in the order of ``inputs``."""
        return [n for n in self.gm.graph.nodes if n.op == "placeholder"]

    def results(self) -> list[Any]:
        """The graph's outputs, in the order of ``outputs`` (None where there is no gradient)."""
        return list(self.output_node().args[0])  # type: ignore[arg-type]

    def output_node(self) -> Node:
        """The graph's output node."""
        node: Node = self.gm.graph.output_node()
        return node

    def copy(self) -> StepGraph:
        """A deep copy of the graph; fake values and source locations are shared."""
        return replace(self, gm=graph_module(self.gm, copied(self.gm.graph)))

    def select(self, role: Role) -> list[tuple[Slot, Node]]:
        """The placeholders of one role."""
        return [
            (s, n) for s, n in zip(self.inputs, self.placeholders(), strict=True) if s.role == role
        ]

    def produced(self, role: OutputRole) -> list[tuple[Slot, Any]]:
        """The outputs of one role."""
        return [(s, n) for s, n in zip(self.outputs, self.results(), strict=True) if s.role == role]


def copied(source: Graph) -> Graph:
    """A copy of a graph; fake values and source locations are shared."""
    graph = Graph()
    graph.output(graph.graph_copy(source, {}))
    return graph


@dataclass(frozen=True)
class Captured:
    """The forward graph of one captured call.

    ``inputs``: what each placeholder is. ``mutated``: the buffers whose new values are the first
    results of the graph. ``outputs``: the names of the other results. ``batch``: the batch size's
    symbol (a sympy expression), or None where the graph holds one batch size only. ``lead``: the
    input whose ``batch_dim`` is the batch. ``notes``: what the user should know about the capture.
    """

    gm: GraphModule
    inputs: tuple[Slot, ...]
    mutated: tuple[str, ...]
    outputs: tuple[str, ...]
    batch: Any = None
    lead: int = 0
    notes: tuple[str, ...] = field(default=())

    def placeholders(self) -> list[Node]:
        """The graph's placeholders, in the order of ``inputs``."""
        return [n for n in self.gm.graph.nodes if n.op == "placeholder"]

    def results(self) -> list[Any]:
        """The fake values of the model's outputs (None for what is no node's value)."""
        output = self.gm.graph.output_node()
        return [n.meta.get("val") for n in output.args[0][len(self.mutated) :]]  # type: ignore[index,union-attr]

    @property
    def dynamic(self) -> tuple[int, ...]:
        """The inputs (by number) that hold the batch's symbol."""
        if self.batch is None:
            return ()
        pairs = zip(self.inputs, self.placeholders(), strict=True)
        shapes = [n.meta["val"].shape for s, n in pairs if s.role == "input"]
        sizes = [[s.node.expr for s in shape if not isinstance(s, int)] for shape in shapes]
        return tuple(i for i, exprs in enumerate(sizes) if self.batch in exprs)
