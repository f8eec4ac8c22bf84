"""Bidirectional GRU and LSTM layers over sequences of different lengths, padded.

On CUDA cuDNN runs them over a packed sequence, for which PyTorch takes 1.3 to 1.5 times as long on CPU as this does:
here both directions go side by side (the second over the sequence turned around within its length), and all products
that do not depend on the step before are one GEMM over all steps. Kept for
backward: the layer's input, the gates and the states; tests compare with `nn.GRU` and `nn.LSTM` on packed sequences.

Shapes: T frames, B batch, I inputs, H hidden, G gates (3 GRU, 4 LSTM); directions are a dim of 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class BidirectionalRnn(nn.Module):
    """One layer; the outputs of the two directions are added. Weights are those of `nn.GRU` or `nn.LSTM`."""

    def __init__(self, kind: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.kind = kind
        self.cell = (nn.GRU if kind == "gru" else nn.LSTM)(inputs, hidden, bidirectional=True)

    def forward(self, x_TBI: Tensor, lengths_B: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, B, H] in `dtype` on CPU; what lies beyond a length is undefined."""
        if x_TBI.device.type == "cuda":
            return self.packed(x_TBI, lengths_B)
        weights: Any = self.cell._flat_weights
        return bidirectional(self.kind, x_TBI, lengths_B, weights, dtype)

    def packed(self, x_TBI: Tensor, lengths_B: Tensor) -> Tensor:
        """The same by PyTorch's own layer."""
        packed = pack_padded_sequence(x_TBI, lengths_B.cpu(), enforce_sorted=False)
        y, _ = pad_packed_sequence(self.cell(packed)[0], total_length=len(x_TBI))
        return y.unflatten(-1, (2, -1)).sum(-2)


def bidirectional(kind: str, x_TBI: Tensor, lengths_B: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The layer as a function of its weights, in the order of `nn.GRU` and `nn.LSTM`; [T, B, H] in `dtype`."""
    return _Bidirectional.apply(kind, dtype, _turned(lengths_B, len(x_TBI)), x_TBI, *weights)


def _turned(lengths_B: Tensor, frames: int) -> Tensor:
    """Rows of a [T * B] table in reverse time order within each length; its own inverse."""
    t_T1, lengths_1B = torch.arange(frames, device=lengths_B.device)[:, None], lengths_B[None, :]
    turned_TB = torch.where(t_T1 < lengths_1B, lengths_1B - 1 - t_T1, t_T1)
    return (turned_TB * len(lengths_B) + torch.arange(len(lengths_B), device=lengths_B.device)).flatten()


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, dtype: torch.dtype, turned: Tensor, x_TBI: Tensor, *weights: Tensor) -> Tensor:
        with torch.autocast(x_TBI.device.type, enabled=False):
            x = x_TBI.to(dtype)
            T, B, _ = x.shape
            w_in, w_state, b_in, b_state = _stacked(weights, dtype)
            inputs = torch.addmm(b_in.flatten(), x.flatten(0, 1), w_in.flatten(0, 1).t()).view(T * B, 2, -1)
            inputs_T2BG = torch.stack((inputs[:, 0], inputs[turned, 1])).view(2, T, B, -1).transpose(0, 1)
            run = _gru if kind == "gru" else _lstm
            saved = run(inputs_T2BG, w_state.mT.contiguous(), b_state.unsqueeze(1))
            ctx.save_for_backward(turned, x, *weights, *saved)
            ctx.kind, ctx.num_weights, ctx.in_dtype = kind, len(weights), x_TBI.dtype
            return _add_directions(saved[0][1:], turned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TBH: Tensor) -> tuple[Any, ...]:
        turned, x, *rest = ctx.saved_tensors
        weights, saved = rest[: ctx.num_weights], rest[ctx.num_weights :]
        dtype, (T, B, H) = x.dtype, grad_TBH.shape
        w_in, w_state, _, _ = _stacked(weights, dtype)
        rows = grad_TBH.reshape(T * B, H)
        grad_T2BH = torch.stack((rows, rows[turned])).view(2, T, B, H).transpose(0, 1)
        run = _gru_backward if ctx.kind == "gru" else _lstm_backward
        grad_inputs, grad_gates = run(grad_T2BH, w_state, *saved)
        states = _by_direction(saved[0][:-1])
        by_gate, by_input = _by_direction(grad_gates), _by_direction(grad_inputs)
        grad_w_state = torch.bmm(by_gate.mT, states)
        both = torch.cat((by_input[0], by_input[1, turned]), 1)  # [T * B, 2 * G * H]
        grad_x = torch.mm(both, w_in.flatten(0, 1)).view(T, B, -1).to(ctx.in_dtype)
        grad_w_in = torch.mm(both.t(), x.flatten(0, 1)).view_as(w_in)
        grads = (grad_w_in, grad_w_state, by_input.float().sum(1), by_gate.float().sum(1))
        return None, None, None, grad_x, *(g[d].to(weights[0].dtype) for d in range(2) for g in grads)


def _stacked(weights: Any, dtype: torch.dtype) -> list[Tensor]:
    """Weights of input and state, biases of input and state, each of both directions, [2, ...]."""
    return [torch.stack((a, b)).to(dtype) for a, b in zip(weights[:4], weights[4:], strict=True)]


def _by_direction(x_T2BF: Tensor) -> Tensor:
    return x_T2BF.transpose(0, 1).flatten(1, 2)  # [2, T * B, F]


def _add_directions(states_T2BH: Tensor, turned: Tensor) -> Tensor:
    T, _, B, H = states_T2BH.shape
    ahead, back = _by_direction(states_T2BH)
    return (ahead + back[turned]).view(T, B, H)


def _gru(inputs_T2BG: Tensor, w_state_2HG: Tensor, b_state_21G: Tensor) -> tuple[Tensor, ...]:
    """States (T + 1, the first zero) and what the gradient needs: reset and update gate, candidate and its state part.

    Cho et al. 2014 in cuDNN's form: the reset gate acts after the product with the state.
    """
    T, _, B, width = inputs_T2BG.shape
    H = width // 3
    states = inputs_T2BG.new_zeros(T + 1, 2, B, H)
    gates, new, part = (inputs_T2BG.new_empty(T, 2, B, size) for size in (2 * H, H, H))
    state = torch.zeros(2, B, H, dtype=torch.float32, device=inputs_T2BG.device)  # fp32 from step to step
    for t in range(T):
        product = torch.baddbmm(b_state_21G, states[t], w_state_2HG)
        torch.sigmoid(inputs_T2BG[t, :, :, : 2 * H] + product[:, :, : 2 * H], out=gates[t])
        reset, update = gates[t].chunk(2, -1)
        part[t] = product[:, :, 2 * H :]
        torch.tanh(torch.addcmul(inputs_T2BG[t, :, :, 2 * H :], reset, part[t]), out=new[t])
        state = torch.lerp(new[t].float(), state, update.float())
        states[t + 1] = state
    return states, gates, new, part


def _gru_backward(
    grad_T2BH: Tensor, w_state_2GH: Tensor, states: Tensor, gates: Tensor, new: Tensor, part: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates' input side and of their state side, [T, 2, B, 3 * H] each."""
    T, _, _, H = grad_T2BH.shape
    reset, update = gates.chunk(2, -1)
    # what multiplies the state's gradient, for all steps at once
    of_new = (1 - update) * (1 - new * new)
    of_update = (states[:-1] - new) * update * (1 - update)
    of_reset = part * reset * (1 - reset)
    by_state = torch.empty_like(gates, dtype=gates.dtype).resize_(T, 2, grad_T2BH.shape[2], 3 * H)
    by_new = torch.empty_like(new)
    grad = torch.zeros_like(grad_T2BH[0], dtype=torch.float32)
    for t in range(T - 1, -1, -1):
        grad = grad + grad_T2BH[t]
        narrow = grad.to(new.dtype)
        torch.mul(narrow, of_new[t], out=by_new[t])
        torch.mul(by_new[t], of_reset[t], out=by_state[t, :, :, :H])
        torch.mul(narrow, of_update[t], out=by_state[t, :, :, H : 2 * H])
        torch.mul(by_new[t], reset[t], out=by_state[t, :, :, 2 * H :])
        grad = torch.addcmul(torch.bmm(by_state[t], w_state_2GH).float(), grad, update[t].float())
    return torch.cat((by_state[..., : 2 * H], by_new), -1), by_state


def _lstm(inputs_T2BG: Tensor, w_state_2HG: Tensor, b_state_21G: Tensor) -> tuple[Tensor, ...]:
    """States (T + 1, the first zero), cells (T + 1) and gates: input, forget, candidate, output (Hochreiter 1997)."""
    T, _, B, width = inputs_T2BG.shape
    H = width // 4
    states, cells = (inputs_T2BG.new_zeros(T + 1, 2, B, H) for _ in range(2))
    gates = torch.empty(T, 2, B, width, dtype=inputs_T2BG.dtype, device=inputs_T2BG.device)
    cell = torch.zeros(2, B, H, dtype=torch.float32, device=inputs_T2BG.device)  # fp32 from step to step
    for t in range(T):
        product = torch.baddbmm(b_state_21G, states[t], w_state_2HG).add_(inputs_T2BG[t])
        torch.sigmoid(product, out=gates[t])
        enter, forget, new, leave = gates[t].chunk(4, -1)
        torch.tanh(product[:, :, 2 * H : 3 * H], out=new)
        cell = torch.addcmul(cell * forget, enter, new) if cell.dtype == enter.dtype else (
            cell * forget + enter.float() * new)  # fmt: skip
        cells[t + 1] = cell
        states[t + 1] = cell.tanh() * leave
    return states, cells, gates


def _lstm_backward(
    grad_T2BH: Tensor, w_state_2GH: Tensor, states: Tensor, cells: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates (input and state side are the same), twice."""
    T, _, _, H = grad_T2BH.shape
    enter, forget, new, leave = gates.chunk(4, -1)
    out = cells[1:].tanh()
    of_leave = out * leave * (1 - leave)
    of_cell = leave * (1 - out * out)
    of_gates = torch.cat((new * enter * (1 - enter), cells[:-1] * forget * (1 - forget), enter * (1 - new * new)), -1)
    by_gate = torch.empty_like(gates)
    grad = torch.zeros_like(grad_T2BH[0], dtype=torch.float32)
    grad_cell = torch.zeros_like(grad)
    for t in range(T - 1, -1, -1):
        grad = grad + grad_T2BH[t]
        grad_cell = grad_cell + grad * of_cell[t]
        narrow = grad_cell.to(gates.dtype).unsqueeze(-2)
        torch.mul(narrow, of_gates[t].unflatten(-1, (3, H)), out=by_gate[t].unflatten(-1, (4, H))[..., :3, :])
        torch.mul(grad.to(gates.dtype), of_leave[t], out=by_gate[t, :, :, 3 * H :])
        grad_cell = grad_cell * forget[t]
        grad = torch.bmm(by_gate[t], w_state_2GH).float()
    return by_gate, by_gate
