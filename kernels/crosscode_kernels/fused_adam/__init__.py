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
from crosscode_kernels.segments.deferred import SegmentGrad, computed


class FusedAdam(torch.optim.Adam):
    """Takes gradients of the Triton backend's option "deferred", and ordinary ones. Nothing waits for the device or is copied
    to it, and no launch depends on data: with `lr` a tensor on the device a step can be captured as a graph.

    Args:
        row_sparse: with beta1 = 0: leave rows of a weight alone that have no gradient (`RowSparseAdam`, whose numbers and state
            these are).
        moments: dtype of weights' moments. bfloat16: rounded up or down by chance, so that the mean is right (a second moment
            changes by less than a unit in the last place a step: rounded to nearest it would stand still).

    `grad_scale` and `found_inf`, where they are set, are those of PyTorch's fused optimizers: the gradient is divided by the one,
    and nothing changes where the other is 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        row_sparse: bool = False,
        moments: torch.dtype = torch.float32,
    ) -> None:
        if row_sparse and betas[0] != 0:
            raise ValueError(f"FusedAdam: row_sparse needs betas[0] = 0, got {betas[0]}")
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"FusedAdam: moments is {moments}; must be torch.float32 or torch.bfloat16")
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self.row_sparse, self.moments = row_sparse, moments
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
        moved = [(param, group) for group in self.param_groups for param in group["params"] if param.grad is not None]
        if not moved:
            return loss
        for param, _ in moved:
            if param.grad.is_sparse:
                param.grad = param.grad.to_dense()
            self._begin(param)
        is_bad, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        done = torch.ones((), device=moved[0][0].device)
        done = done if is_bad is None else done - is_bad
        steps = [self.state[param]["step"] for param, _ in moved]
        torch._foreach_add_(steps, [done] * len(steps))  # pyright: ignore[reportPrivateImportUsage]
        for group in self.param_groups:
            params = [param for param, its in moved if its is group]
            self._step_rows([param for param in params if _is_taken(param)], group, scale, done)
            self._step_others([param for param in params if not _is_taken(param)], group, scale, is_bad)
        return loss

    def _begin(self, param: Tensor) -> None:
        state, is_taken = self.state[param], _is_taken(param)
        if state:
            return
        state["step"] = torch.zeros((), device=param.device)
        for name in ("exp_avg_sq",) if self.row_sparse else ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(param, dtype=self.moments if is_taken else None)
        if self.row_sparse and is_taken:
            state["last_step_R"] = torch.zeros(param.shape[0], dtype=torch.int32, device=param.device)

    def _step_rows(self, params: list[Tensor], group: dict[str, Any], scale: Tensor | None, done: Tensor) -> None:
        params = [param for param in params if param.numel()]
        if not params:
            return
        update = importlib.import_module("crosscode_kernels.fused_adam.triton_impl").update_rows
        number_P5 = _numbers(torch.stack([self.state[param]["step"] for param in params]), group, scale, done)
        for param, number_5 in zip(params, number_P5.unbind(), strict=True):
            state, copy = self.state[param], copies.valid_copy(param)
            kept = (state.get("exp_avg"), state["exp_avg_sq"], state.get("last_step_R"))
            update(param, param.grad, *kept, copy, number_5, group["betas"], group["eps"])
            torch.autograd.graph.increment_version([param, *(one for one in kept[:2] if one is not None)])
            if copy is not None:
                copies.written_with(param)

    def _step_others(
        self, params: list[Tensor], group: dict[str, Any], scale: Tensor | None, is_bad: Tensor | None
    ) -> None:
        """Biases, other dtypes, weights that are not contiguous."""
        grads = [computed(param.grad) for param in params if param.grad is not None]
        beta1, beta2 = group["betas"]
        for alike in _alike(params):
            own, states = [grads[i] for i in alike], [self.state[params[i]] for i in alike]
            means = [torch.zeros_like(grad) for grad in own] if self.row_sparse else [one["exp_avg"] for one in states]
            torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
                [params[i] for i in alike], own, means, [state["exp_avg_sq"] for state in states], [],
                [state["step"] for state in states], lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=0.0,
                eps=group["eps"], amsgrad=False, maximize=False, grad_scale=scale, found_inf=is_bad,
            )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        load_as_saved(self, super().load_state_dict, state_dict)
        for param, state in self.state.items():  # `RowSparseAdam` counts in Python
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)


def load_as_saved(optimizer: torch.optim.Optimizer, load: Callable[..., None], state_dict: dict[str, Any]) -> None:
    """`load`, PyTorch's, which would make of every number one of the parameter's dtype: moments and step counts keep the dtype
    in which they were saved. Hooks of the optimizer may change what is loaded (to rows of it, say)."""
    loaded = [state_dict]
    last = optimizer.register_load_state_dict_pre_hook(lambda _, given: loaded.append(given))
    try:
        load(state_dict)
    finally:
        last.remove()
    ids = [index for group in loaded[-1]["param_groups"] for index in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in zip(ids, params, strict=True):
        for name, saved in loaded[-1]["state"].get(index, {}).items():
            found = optimizer.state[param][name]
            if isinstance(saved, Tensor) and found.dtype != saved.dtype:
                optimizer.state[param][name] = saved.to(found.device, copy=True)


def _alike(params: list[Tensor]) -> list[list[int]]:
    """Places of parameters of one device and dtype."""
    found: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        found.setdefault((param.device, param.dtype), []).append(i)
    return list(found.values())


def _is_taken(param: Tensor) -> bool:
    return param.dim() > 1 and param.dtype == torch.float32 and param.is_contiguous()


def _numbers(step_P: Tensor, group: dict[str, Any], grad_scale: Tensor | None, done: Tensor) -> Tensor:
    """By parameter: the step size, the root of the second moment's bias correction, the gradient's factor, whether to move, and
    the step; float32. In float64 on the way: at step 1 a float32 power leaves four digits of `1 - beta2`. Made of tensors
    that are on the device, so that a captured step finds those of its replay."""
    correction_1, correction_2 = (1 - torch.pow(beta, step_P.double()) for beta in group["betas"])
    factor = torch.ones_like(done) if grad_scale is None else grad_scale.reciprocal()
    size_P = (group["lr"] / correction_1).float()
    same = (one.float().expand_as(step_P) for one in (factor, done))
    return torch.stack([size_P, correction_2.sqrt().float(), *same, step_P], 1)


def deferred_norm(grad: SegmentGrad, dtype: torch.dtype) -> Tensor:
    """The 2-norm of a gradient that is not computed, of which no row is written."""
    norm = importlib.import_module("crosscode_kernels.fused_adam.triton_impl").norm_of_rows
    return norm(grad).to(dtype)
