"""Adam with beta1 = 0 at the price of the touched rows, and a gradient clip that takes row-sparse gradients.

Axes: R rows of a parameter · Q touched rows · D width of a row.

With beta1 = 0 a row without gradient moves neither the parameter nor any momentum: only `v` decays, and that can be
caught up when the row is next touched, `v *= beta2 ** steps_missed`. So these are Adam's numbers (Kingma & Ba 2015), a
third less memory, and a step whose cost is in proportion to the touched rows. With beta1 > 0 untouched rows do move: then
it would not be the same optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.fused_adam import FusedAdam, deferred_norm, load_as_saved
from crosscode_kernels.segments.deferred import SegmentGrad, computed

_CPU_CHUNK_ELEMENTS, _DEVICE_CHUNK_ELEMENTS = 1 << 17, 1 << 26
"""How many numbers of a parameter are updated at a time: what stays in cache over the passes; and on a device, where each
pass is a launch, what its temporaries may take (a quarter GiB each in float32)."""


class RowSparseAdam(torch.optim.Optimizer):
    """Adam with `betas = (0, beta2)`. Gradients may be dense, or sparse COO over rows (`row_sparse_grads` of the torch op
    set): then only their rows are read and written.

    State of a parameter: `exp_avg_sq`, and for a parameter with rows `last_step_R`, the step at which each row of it was last
    brought up to date.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, beta2: float = 0.999, eps: float = 1e-8
    ) -> None:
        if not float(lr) >= 0:
            raise ValueError(f"RowSparseAdam: lr is {lr}; must not be negative")
        if not 0 <= beta2 < 1:
            raise ValueError(f"RowSparseAdam: beta2 is {beta2}; must lie in [0, 1)")
        if not eps >= 0:
            raise ValueError(f"RowSparseAdam: eps is {eps}; must not be negative")
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps})
        self.grad_scale: Tensor | None = None
        """What the next step divides gradients by (`clip_grad_norm_`)."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """As PyTorch's, which would make step counts numbers of the parameter's dtype."""
        load_as_saved(self, super().load_state_dict, state_dict)
        for state in self.state.values():
            state["step"] = int(state["step"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        self.grad_scale = None
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
            if param.dim() > 1:
                state["last_step_R"] = torch.zeros(param.shape[0], dtype=torch.int32, device=param.device)
        state["step"] += 1
        if not param.numel():
            return
        beta2, step = group["beta2"], state["step"]
        if grad.is_sparse:
            _update_rows(param, grad, state, group, self.grad_scale)
            return
        v = state["exp_avg_sq"]
        if "last_step_R" in state:
            last_step_R = state["last_step_R"]
            if not (grad.device.type == "cpu" and last_step_R.amin(0, keepdim=True).tolist()[0] == step - 1):
                v.mul_(_missed_decay(state, slice(None), beta2, step))
            last_step_R.fill_(step)
        _adam_(param, grad, v, group, step, self.grad_scale)


def coalesced(grad: Tensor) -> Tensor:
    """`grad.coalesce()`, sharing its values where the rows ascend already: autograd forgets that a gradient was coalesced
    when it hands it to a parameter, and sorting and copying it again would cost a third of the step."""
    rows_Q, values_QD = grad._indices()[0], grad._values()
    if grad.is_coalesced() or grad.sparse_dim() > 1 or grad.device.type != "cpu":
        return grad.coalesce()
    if not (rows_Q[1:] > rows_Q[:-1]).all().reshape(1).tolist()[0]:
        return grad.coalesce()
    return torch.sparse_coo_tensor(grad._indices(), values_QD, grad.shape, is_coalesced=True, check_invariants=False)


def _adam_(param: Tensor, grad: Tensor, v: Tensor, group: dict[str, Any], step: int, grad_scale: Tensor | None) -> None:
    """One Adam step with beta1 = 0 in PyTorch's fused kernel, one pass. The first moment is the gradient itself, which may
    stand for it: each number is read before it is written."""
    if grad.dtype in (torch.float32, torch.float64) and grad.is_contiguous() and param.is_contiguous():
        steps = [torch.full((), float(step), device=param.device)]
        torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
            [param], [grad], [grad], [v], [], steps, lr=float(group["lr"]), beta1=0.0, beta2=group["beta2"],
            weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False, grad_scale=grad_scale,
        )  # fmt: skip
        return
    beta2 = group["beta2"]
    grad = grad if grad_scale is None else grad / grad_scale
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    param.addcdiv_(grad, denominator, value=-float(group["lr"]))


def _missed_decay(state: dict[str, Any], rows: Tensor | slice, beta2: float, step: int) -> Tensor:
    """The decay of v over the steps between these rows' last updates and this one, `[Q, 1, ...]`."""
    v_rows, missed_Q = state["exp_avg_sq"], step - 1 - state["last_step_R"][rows]
    return torch.pow(beta2, missed_Q.to(v_rows.dtype)).view(-1, *[1] * (v_rows.dim() - 1))


def _chunk_rows(device: torch.device, width: int) -> int:
    return max((_CPU_CHUNK_ELEMENTS if device.type == "cpu" else _DEVICE_CHUNK_ELEMENTS) // width, 1)


def _update_rows(
    param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], grad_scale: Tensor | None
) -> None:
    grad = coalesced(grad)
    rows_Q, step = grad.indices()[0], state["step"]
    width = max(param[0].numel(), 1)
    param_RD, v_RD = param.view(param.shape[0], -1), state["exp_avg_sq"].view(param.shape[0], -1)
    grad_QD = grad.values().view(rows_Q.shape[0], -1)
    chunk = _chunk_rows(param.device, width)
    decay_Q1 = _missed_decay(state, rows_Q, group["beta2"], step).view(-1, 1)
    for rows_q, grad_qD, decay_q1 in zip(*(one.split(chunk) for one in (rows_Q, grad_QD, decay_Q1)), strict=True):
        v_qD = v_RD.index_select(0, rows_q).mul_(decay_q1)
        param_qD = param_RD.index_select(0, rows_q)
        _adam_(param_qD, grad_qD, v_qD, group, step, grad_scale)
        v_RD.index_copy_(0, rows_q, v_qD)
        param_RD.index_copy_(0, rows_q, param_qD)
    state["last_step_R"].index_fill_(0, rows_Q, step)


TotalNorm = Callable[[Tensor, Sequence[Tensor]], Tensor]


def _two_norm(norms_P: Tensor, params: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(norms_P)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor],
    max_norm: float | None,
    optimizer: torch.optim.Optimizer | None = None,
    total_norm: TotalNorm = _two_norm,
) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_` (2-norm; returns the norm before clipping), for dense and row-sparse gradients.
    A `max_norm` of None clips nothing.

    On the CPU gradients that are already short enough are not written; elsewhere the scale stays on the device. A fused or
    row-sparse Adam given as `optimizer` scales the gradients itself in its next step, which saves a pass over them: until then
    `.grad` holds the unscaled ones. Call this before every step of such an optimizer, or not at all.

    `total_norm` makes one norm of those of the parameters that have a gradient (see `OpSet.total_norm`)."""
    parameters = list(parameters)
    if max_norm is None:
        return grad_norm(parameters, optimizer, total_norm)
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm_: max_norm is {max_norm}; must be positive")
    values = _grad_values(parameters, optimizer)
    if not values:
        return torch.zeros(())
    norm = _norm(values, parameters, total_norm)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    scales_itself = isinstance(optimizer, RowSparseAdam) or (optimizer is not None and optimizer.defaults.get("fused"))
    # The fused kernel reads its scale as float32, which is not enough for float64 gradients.
    if scales_itself and norm.dtype == torch.float32:
        optimizer.grad_scale = scale.reciprocal()  # type: ignore[attr-defined]
    elif norm.device.type != "cpu" or scale.reshape(1).tolist()[0] < 1:
        torch._foreach_mul_(values, scale)  # pyright: ignore[reportPrivateImportUsage]
    return norm


@torch.no_grad()
def grad_norm(
    parameters: Iterable[Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    total_norm: TotalNorm = _two_norm,
) -> Tensor:
    """The 2-norm of all gradients, dense and row-sparse. An `optimizer` that takes dense ones only will find none other."""
    parameters = list(parameters)
    return _norm(_grad_values(parameters, optimizer), parameters, total_norm)


def _grad_values(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    takes_sparse = optimizer is None or isinstance(optimizer, RowSparseAdam)
    takes_deferred = isinstance(optimizer, FusedAdam)
    values = []
    for param in parameters:
        if param.grad is None:
            continue
        if not takes_deferred:
            param.grad = computed(param.grad)
        if param.grad.is_sparse and not takes_sparse:  # of rows alone: nothing else moved this weight
            param.grad = param.grad.to_dense()
        if param.grad.is_sparse:
            param.grad = coalesced(param.grad)
            values.append(param.grad.values())
        else:
            values.append(param.grad)
    return values


def _norm(values: list[Tensor], parameters: Sequence[Tensor], total_norm: TotalNorm) -> Tensor:
    if not values:
        return torch.zeros(())
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    # On the CPU by rows first: one long sum has one vector of accumulators, which is slow and off by 1e-3 in float32.
    whole = [value for value in values if not isinstance(value, SegmentGrad)]
    parts = [
        torch.linalg.vector_norm(value.flatten(1), dim=1, dtype=dtype)
        if value.device.type == "cpu" and value.dim() > 1
        else value
        for value in whole
    ]
    of_whole = iter(torch._foreach_norm(parts, 2, dtype) if parts else [])  # pyright: ignore[reportPrivateImportUsage]
    norms = [deferred_norm(value, dtype) if isinstance(value, SegmentGrad) else next(of_whole) for value in values]
    norms_P = torch.stack([norm.to(values[0].device) for norm in norms])
    return total_norm(norms_P, [param for param in parameters if param.grad is not None])
