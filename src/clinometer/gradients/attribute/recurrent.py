"""Torch's fused recurrent layers and cells, written out step by step, so that each use of a weight is seen.

    LSTM  i, f, g, o = σ, σ, tanh, σ (W x + b + U h + c);  c' = f c + i g;  h' = o tanh(c')  (then W_hr h')
    GRU   r, z = σ(W x + b + U h + c);  n = tanh(W_n x + b_n + r (U_n h + c_n));  h' = (1 − z) n + z h
    RNN   h' = tanh or relu(W x + b + U h + c)

Source: torch.nn.LSTM, GRU, RNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
CELLS = frozenset(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"))
Gathering = Callable[[Sequence[Tensor | None], int, bool], Any]


def open_layer(name: str, args: tuple[Any, ...], gathering: Gathering) -> Any:
    """The same results as torch's layer; None for a packed sequence, which it takes with other arguments.

    `gathering(weights, axis, backwards)` is a context around the steps in which the weights are used.
    """
    if len(args) != 9 or not isinstance(args[3], bool):
        return None
    x, hx, weights, biases, layers, dropout, train, both, batch_first = args
    states = hx if isinstance(hx, tuple | list) else (hx,)
    time = 1 if batch_first else 0
    directions = 2 if both else 1
    each = len(weights) // (layers * directions)
    last: list[list[Tensor]] = [[] for _ in states]
    for layer in range(layers):
        outs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * each : (number + 1) * each]
            begin = tuple(state[number] for state in states)
            out, end = _run(
                name, x, begin, own, gathering, biases=biases, time=time, backwards=bool(direction)
            )
            outs.append(out)
            for kept, state in zip(last, end, strict=True):
                kept.append(state)
        x = torch.cat(outs, -1) if both else outs[0]
        if dropout and train and layer + 1 < layers:
            x = F.dropout(x, dropout, True)
    return (x, *(torch.stack(kept) for kept in last))


def open_cell(name: str, args: tuple[Any, ...]) -> Any:
    """The same result as torch's cell."""
    x, hx, w_ih, w_hh = args[:4]
    b_ih, b_hh = (*args[4:6], None, None)[:2]
    states = hx if isinstance(hx, tuple | list) else (hx,)
    end = _step(name.removesuffix("_cell"), F.linear(x, w_ih, b_ih), tuple(states), w_hh, b_hh, w_hr=None)
    return end[0] if len(end) == 1 else end


def _run(
    name: str,
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    gathering: Gathering,
    *,
    biases: bool,
    time: int,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if biases else (None, None)
    rest = weights[4 if biases else 2 :]
    w_hr = rest[0] if rest else None
    given = F.linear(x, w_ih, b_ih)
    time = time if x.dim() == 3 else 0  # one sequence, without a batch
    steps = range(x.shape[time])
    outs: list[Any] = [None] * len(steps)
    with gathering((w_hh, b_hh, w_hr), time, backwards):
        for t in reversed(steps) if backwards else steps:
            states = _step(name, given.select(time, t), states, w_hh, b_hh, w_hr=w_hr)
            outs[t] = states[0]
    return torch.stack(outs, time), states


def _step(
    name: str,
    given: Tensor,
    states: tuple[Tensor, ...],
    w_hh: Tensor,
    b_hh: Tensor | None,
    *,
    w_hr: Tensor | None,
) -> tuple[Tensor, ...]:
    h = states[0]
    kept = F.linear(h, w_hh, b_hh)
    if name == "lstm":
        i, f, g, o = (given + kept).chunk(4, -1)
        c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if w_hr is None else F.linear(h, w_hr)), c
    if name == "gru":
        r, z, n = given.chunk(3, -1)
        r_kept, z_kept, n_kept = kept.chunk(3, -1)
        z = torch.sigmoid(z + z_kept)
        n = torch.tanh(n + torch.sigmoid(r + r_kept) * n_kept)
        return ((1 - z) * n + z * h,)
    return (torch.tanh(given + kept) if name == "rnn_tanh" else torch.relu(given + kept),)
