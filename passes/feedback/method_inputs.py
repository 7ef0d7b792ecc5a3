"""What methods read of a step: error, targets, outputs and tangents as rows, values, noise.

The taps carry the output error e; everything that a method sees of it is a matrix of rows, one a
sample or one a token, as the layer's feedback map has it. Each is emitted when it is first read,
and once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.fx import Node

from grapefx.errors import MethodError
from grapefx.ir import Phase, Slot
from grapefx.maps import ErrorRows, FeedbackMap
from grapefx.passes.differentiate.tangent import Stream, streams_of
from grapefx.passes.feedback.radial import bias_of, radial_error
from grapefx.passes.graph import markers
from grapefx.passes.graph.edit import Edit

aten = torch.ops.aten


class MethodInputs:
    """The nodes of what ``method`` (its name, for messages) may read at each feedback point."""

    def __init__(self, edit: Edit, error_rows: dict[str, ErrorRows], method: str) -> None:
        self.edit = edit
        self.error_rows = error_rows
        self.method = method
        self.streams = streams_of(edit.step)
        self._made: dict[tuple[str, str], Node] = {}

    def read(self, m: FeedbackMap, reads: frozenset[str]) -> dict[str, Node]:
        """The nodes of what is read at a point, noise and tangents aside, by field of ``Rows``."""
        found = {}
        if "error" in reads:
            found["error"] = self.error(m.rows)
        if "value" in reads:
            found["value"] = self.value(m)
        if "target" in reads:
            found["target"] = self._rows("target", m.rows, lambda: [self._targets], "error")
        if "output" in reads:
            found["output"] = self._rows("output", m.rows, self._taps, "error")
        return found

    def value(self, m: FeedbackMap) -> Node:
        """The value h_l at a feedback point."""
        return markers.find(self.edit.graph, markers.CUT)[m.layer.index]

    def error(self, kind: str) -> Node:
        """The output error e as rows."""
        return self._rows("error", kind, self._errors, "error")

    def pairs(self, m: FeedbackMap) -> list[tuple[Node, Node | None]]:
        """(noise, tangent rows) of each stream that holds the layer; no tangent in a quiet one."""
        return [
            (s.noise[m.layer.index], self._tangent(m.rows, s) if s.taps else None)
            for s in self.streams
            if m.layer.index in s.noise
        ]

    def of_all_points(self, maps: Sequence[FeedbackMap]) -> list[Node]:
        """The errors and tangents that all these maps read: what must be finite to learn from."""
        errors = [self.error(m.rows) for m in maps]
        tangents = [self._tangent(m.rows, s) for m in maps for s in self.streams if s.taps]
        return list(dict.fromkeys(errors + tangents))

    @functools.cached_property
    def radial(self) -> Node:
        """What the true gradient's inner product with its value is, for each sample."""
        taps = self._taps()
        folds = list(next(iter(self.error_rows.values())).folds)
        biases = [bias_of(tap) for tap in taps]
        made: Node = self.edit.emit(
            radial_error, self._errors(), taps, biases, folds, phase="error"
        )
        return made

    def _rows(self, what: str, kind: str, at_taps: Callable[[], list[Node]], phase: Phase) -> Node:
        """What there is at the taps, as rows of a kind ("dense" or "token")."""
        if (what, kind) not in self._made:
            rows = self.error_rows[kind]
            self._made[what, kind] = self.edit.emit(lambda ts: rows(ts), at_taps(), phase=phase)
        return self._made[what, kind]

    def _taps(self) -> list[Node]:
        """The value at each tap, in order."""
        forward = markers.find(self.edit.graph, markers.TAP)
        return [forward[i] for i in sorted(forward)]

    def _errors(self) -> list[Node]:
        """e at each tap; zeros at one whose output the loss does not use."""
        errors = markers.find(self.edit.graph, markers.TAP_BACKWARD)
        em = self.edit.emitter
        return self._at_taps(errors, lambda tap: em.call(aten.zeros_like.default, tap), "error")

    def _tangent(self, kind: str, stream: Stream) -> Node:
        """The output's tangent in one stream, as rows; zeros at a tap that no noise reaches."""
        em = self.edit.emitter
        like = next(iter(stream.taps.values()))

        def zeros(tap: Node) -> Node:
            samples = em.call(aten.sym_size.int, like, 0)
            sizes = [int(s) for s in tap.meta["val"].shape[1:]]
            return em.call(aten.new_zeros.default, like, [samples, *sizes])

        at_taps = functools.partial(self._at_taps, stream.taps, zeros, "tangent")
        return self._rows(f"tangent {id(stream)}", kind, at_taps, "tangent")

    def _at_taps(
        self, found: Mapping[int, Node], zeros: Callable[[Node], Node], phase: Phase
    ) -> list[Node]:
        """What there is at each tap, in order."""
        taps = markers.find(self.edit.graph, markers.TAP)
        with self.edit.emitter.before(self.edit.output, phase=phase):
            return [found[i] if i in found else zeros(taps[i]) for i in sorted(taps)]

    @functools.cached_property
    def _targets(self) -> Node:
        """Class targets, one-hot in the shape of the output: an input of the step."""
        taps = self._taps()
        if len(taps) != 1:
            raise MethodError(
                f"method {self.method!r} reads class targets, which belong to one output; "
                f"this model has {len(taps)} outputs with a gradient\n"
                "  remedy: return one tensor of logits, or use a method that reads the error (dfa)"
            )
        return self.edit.add_input("target", Slot("target", "0"), taps[0].meta["val"])
