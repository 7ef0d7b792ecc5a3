"""Recurrent layers written out over time, so that their dropout and derivatives are ordinary nodes.

torch's own decomposition loses the dropout between the layers of a two-layer LSTM or GRU; this one
keeps it (one mask a layer, as eager draws it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grapefx.errors import CaptureError

aten = torch.ops.aten

Cell = Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor | None], tuple[Tensor, ...]]


def _lstm_cell(gates_x: Tensor, state: tuple[Tensor, ...], w: Tensor, b: Tensor | None) -> Any:
    h, c = state
    i, f, g, o = (gates_x + F.linear(h, w, b)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(gates_x: Tensor, state: tuple[Tensor, ...], w: Tensor, b: Tensor | None) -> Any:
    (h,) = state
    rx, zx, nx = gates_x.chunk(3, -1)
    rh, zh, nh = F.linear(h, w, b).chunk(3, -1)
    r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
    n = torch.tanh(nx + r * nh)
    return ((h - n) * z + n,)


def _rnn_cell(act: Callable[[Tensor], Tensor]) -> Cell:
    def cell(gates_x: Tensor, state: tuple[Tensor, ...], w: Tensor, b: Tensor | None) -> Any:
        return (act(gates_x + F.linear(state[0], w, b)),)

    return cell


def _unroll(
    cell: Cell,
    x: Tensor,
    states: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, list[Tensor]]:
    directions = 2 if bidirectional else 1
    per_cell = 4 if has_biases else 2
    if batch_first:
        x = x.transpose(0, 1)
    finals: list[list[Tensor]] = [[] for _ in states]
    for layer in range(num_layers):
        outs = []
        for d in range(directions):
            k = layer * directions + d
            p = params[k * per_cell : (k + 1) * per_cell]
            b_ih, b_hh = (p[2], p[3]) if has_biases else (None, None)
            gates = F.linear(x, p[0], b_ih)  # all time steps in one product
            state = tuple(s[k] for s in states)
            steps = gates.unbind(0)
            seen = []
            for g in reversed(steps) if d else steps:
                state = cell(g, state, p[1], b_hh)
                seen.append(state[0])
            outs.append(torch.stack(seen[::-1] if d else seen))
            for s, final in zip(state, finals, strict=True):
                final.append(s)
        x = torch.cat(outs, -1) if directions == 2 else outs[0]
        if train and dropout > 0 and layer + 1 < num_layers:
            x = aten.native_dropout(x, dropout, True)[0]
    if batch_first:
        x = x.transpose(0, 1)
    return x, [torch.stack(f) for f in finals]


def _lstm(x: Tensor, hx: Any, params: Any, *rest: Any) -> tuple[Tensor, ...]:
    if params[1].shape[-1] * 4 != params[1].shape[0]:
        raise CaptureError("an LSTM with proj_size is not supported; apply a Linear to its output")
    out, finals = _unroll(_lstm_cell, x, list(hx), list(params), *rest)
    return out, finals[0], finals[1]


def _one_state(cell: Cell) -> Callable[..., tuple[Tensor, ...]]:
    def run(x: Tensor, hx: Tensor, params: Any, *rest: Any) -> tuple[Tensor, ...]:
        out, finals = _unroll(cell, x, [hx], list(params), *rest)
        return out, finals[0]

    return run


def _alone(cell: Cell) -> Callable[..., Any]:
    """A cell that the model calls itself. torch's own writes in place, which no tangent follows."""

    def run(
        x: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        made = cell(F.linear(x, w_ih, b_ih), states, w_hh, b_hh)
        return made if len(states) > 1 else made[0]

    return run


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.lstm.input: _lstm,
    aten.gru.input: _one_state(_gru_cell),
    aten.rnn_tanh.input: _one_state(_rnn_cell(torch.tanh)),
    aten.rnn_relu.input: _one_state(_rnn_cell(torch.relu)),
    aten.lstm_cell.default: _alone(_lstm_cell),
    aten.gru_cell.default: _alone(_gru_cell),
    aten.rnn_tanh_cell.default: _alone(_rnn_cell(torch.tanh)),
    aten.rnn_relu_cell.default: _alone(_rnn_cell(torch.relu)),
}
