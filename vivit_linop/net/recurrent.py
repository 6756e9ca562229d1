"""Recurrent layers step by step: the same numbers, of linear layers that are seen.

Torch's recurrent layers are one call each. What they compute is a linear layer of all
inputs, and one of the state at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# From what inputs and state contribute and the state, [n, …] each, to the next state.
Step = Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]
# As ``torch.nn.functional.linear``.
Linear = Callable[..., Tensor]


def _lstm(x: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
    i, f, g, o = (x + h).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return [o.sigmoid() * cell.tanh(), cell]


def _gru(x: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
    (*gates, new), (*others, old) = x.chunk(3, -1), h.chunk(3, -1)
    reset, update = ((a + b).sigmoid() for a, b in zip(gates, others, strict=True))
    new = (new + reset * old).tanh()
    return [new + update * (state[0] - new)]


def _tanh(x: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
    return [(x + h).tanh()]


def _relu(x: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
    return [(x + h).relu()]


_STEPS: dict[str, Step] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _tanh,
    "rnn_relu": _relu,
}
LAYERS = {getattr(torch, name): step for name, step in _STEPS.items()}
CELLS = {getattr(torch, f"{name}_cell"): step for name, step in _STEPS.items()}


def unrolled(
    func: Callable[..., Any], args: Sequence[Any], linear: Linear
) -> tuple[Tensor, ...] | None:
    """Return what a call of a recurrent layer or cell gives; None where it is not read.

    Packed sequences have no axis of samples, and dropout draws.

    Args:
        func: One of ``LAYERS`` or ``CELLS``.
        args: Its arguments.
        linear: What multiplies by the weights.
    """
    if step := CELLS.get(func):
        x, states, w_ih, w_hh, *biases = args
        b_ih, b_hh = biases or (None, None)
        state = [*states] if func is torch.lstm_cell else [states]
        of_input = linear(x, w_ih, b_ih)
        return tuple(next(_steps(step, [of_input], state, linear, w_hh, b_hh)))
    x, states, weights, has_biases, layers, dropout, training, both, batch_first = args
    if not isinstance(has_biases, bool) or (dropout and training):
        return None
    states = states if func is torch.lstm else [states]
    each, time = len(weights) // (layers * (1 + both)), int(batch_first)
    last = list[list[Tensor]]()
    for _ in range(layers):
        outputs = list[Tensor]()
        for backwards in (False, True)[: 1 + both]:
            w_ih, w_hh, *others = weights[len(last) * each :][:each]
            b_ih, b_hh = others[:2] if has_biases else (None, None)
            steps = linear(x, w_ih, b_ih).unbind(time)
            starts = [start[len(last)] for start in states]
            steps = steps[::-1] if backwards else steps
            hidden = list[Tensor]()
            rest = w_hh, b_hh, *others[2 * has_biases :]
            for state in _steps(LAYERS[func], steps, starts, linear, *rest):
                hidden.append(state[0])
            last.append(state)
            outputs.append(torch.stack(hidden[::-1] if backwards else hidden, time))
        x = torch.cat(outputs, -1)
    return x, *(torch.stack(ends) for ends in zip(*last, strict=True))


def _steps(
    step: Step,
    inputs: Iterable[Tensor],
    state: list[Tensor],
    linear: Linear,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None = None,
) -> Iterator[list[Tensor]]:
    """Yield the state after each step."""
    for x in inputs:
        state = step(x, linear(state[0], w_hh, b_hh), state)
        if w_hr is not None:
            state[0] = linear(state[0], w_hr)
        yield state
