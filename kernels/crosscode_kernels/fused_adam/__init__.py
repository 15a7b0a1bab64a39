"""Adam on the GPU in one pass over a weight: its gradient is summed where it is used, and its 16-bit copy written with it.

Axes: L latents (rows) · F a row, flattened · S slices of the width · P parameters.

The numbers are those of `torch.optim.Adam(fused=True)` (Kingma & Ba 2015) to rounding, and its state dicts are the same. What
the kernels do not take (biases, other dtypes, weights that are not contiguous) it updates itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crosscode_kernels import copies
from crosscode_kernels.segments.deferred import SegmentGrad


class FusedAdam(torch.optim.Adam):
    """Takes gradients of the Triton backend's option "deferred", and ordinary ones. Nothing waits for the device.

    `grad_scale` and `found_inf`, where they are set, are those of PyTorch's fused optimizers: the gradient is divided by the one,
    and nothing changes where the other is 1.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        for param in self._matrices():
            copies.keep(param)

    def _matrices(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"] if _is_taken(param)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = [
            (param, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None and _is_taken(param) and not param.grad.is_sparse
        ]
        if taken:
            self._step_rows(taken)
        grads = [param.grad for param, _ in taken]
        for param, _ in taken:
            param.grad = None
        super().step()
        for (param, _), grad in zip(taken, grads, strict=True):
            param.grad = grad
        return loss

    def _step_rows(self, taken: list[tuple[Tensor, dict[str, Any]]]) -> None:
        update = importlib.import_module("crosscode_kernels.fused_adam.triton_impl").update_rows
        for param, _ in taken:
            if not self.state[param]:
                self.state[param]["step"] = torch.zeros((), device=param.device)
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[param][name] = torch.zeros_like(param)
        states = [self.state[param] for param, _ in taken]
        is_bad = getattr(self, "found_inf", None)
        done = torch.ones((), device=taken[0][0].device)
        done = done if is_bad is None else done - is_bad
        step_P = torch.stack([state["step"] for state in states]).add_(done)
        for state, step in zip(states, step_P.unbind(), strict=True):
            state["step"].copy_(step)
        number_P4 = _numbers(step_P, [group for _, group in taken], getattr(self, "grad_scale", None), done)
        for (param, group), state, number_4 in zip(taken, states, number_P4.unbind(), strict=True):
            copy = copies.valid_copy(param)
            moments = (state["exp_avg"], state["exp_avg_sq"])
            update(param, param.grad, *moments, copy, number_4, group["betas"], group["eps"])
            torch.autograd.graph.increment_version([param, *moments])
            if copy is not None:
                copies.written_with(param)


def _is_taken(param: Tensor) -> bool:
    return param.dim() > 1 and param.dtype == torch.float32 and param.is_contiguous() and param.numel() > 0


def _numbers(step_P: Tensor, groups: list[dict[str, Any]], grad_scale: Tensor | None, done: Tensor) -> Tensor:
    """By parameter: the step size, the root of the second moment's bias correction, the gradient's factor, and whether to move,
    float32. In float64 on the way: at step 1 a float32 power leaves four digits of `1 - beta2`."""
    beta_P2 = step_P.new_tensor([group["betas"] for group in groups], dtype=torch.float64)
    correction_P2 = 1 - beta_P2 ** step_P.double().unsqueeze(1)
    lr_P = torch.stack([torch.as_tensor(group["lr"], dtype=torch.float64).to(step_P.device) for group in groups])
    factor = torch.ones_like(done) if grad_scale is None else grad_scale.reciprocal()
    same_P2 = torch.stack([factor, done]).double().expand(len(groups), 2)
    own_P2 = torch.stack([lr_P / correction_P2[:, 0], correction_P2[:, 1].sqrt()], 1)
    return torch.cat([own_P2, same_P2], 1).float()


def deferred_norm(grad: SegmentGrad, dtype: torch.dtype) -> Tensor:
    """The 2-norm of a gradient that is not computed, of which no row is written."""
    norm = importlib.import_module("crosscode_kernels.fused_adam.triton_impl").norm_of_rows
    return norm(grad).to(dtype)
