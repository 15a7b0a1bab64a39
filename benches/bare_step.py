"""A training step without a trainer, at any size: forward, loss, backward, gradient clip and optimizer. And its memory.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from crosscode_kernels import OpSet, host_buffers
from crosscode_kernels.recon_loss import ReconLoss
from crosscode_kernels.row_sparse_adam import clip_grad_norm_
from crosscode_kernels.sparse import Latents
from torch import Tensor

from crosscode.objectives.base import LossContext
from crosscode.objectives.terms.auxk import AuxKTerm


@dataclass(frozen=True)
class Case:
    """One training step. `l0` is the aimed number of active latents a token where the activation does not fix it; `k_aux`: with
    AuxK, and `dead` the share of latents that are dead."""

    scheme: str
    B: int = 1024
    I: int = 1536  # noqa: E741
    O: int = 1536  # noqa: E741
    L: int = 16384
    k: int = 32
    l0: float = 0.0
    segments: int = 2
    beta1: float = 0.9
    k_aux: int = 0
    dead: float = 0.0


@dataclass
class Step:
    """A trainer without a trainer: parameters, optimizer and one step on a batch."""

    case: Case
    ops: OpSet
    params: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the last step, by its parts."""
    _last: float = 0.0

    def _mark(self, part: str) -> None:
        now = self.clock()
        self.seconds[part], self._last = self.seconds.get(part, 0.0) + now - self._last, now

    def forward(self, x_BI: Tensor, target_BO: Tensor) -> Tensor:
        case, ops, p = self.case, self.ops, self.params
        widths = [case.O // case.segments] * case.segments
        latents, penalty = self.encode(x_BI), 0.0
        if case.scheme in ("l1", "jumprelu"):
            n_L = ops.decoder_norms(p["W_dec_LO"], widths, "sum").n_L
            ones_L = torch.ones_like(n_L)
        if case.scheme == "l1":
            penalty = ops.weighted_l1(latents, n_L, 2.0 * ones_L)
        elif case.scheme == "jumprelu":
            penalty = ops.weighted_tanh(latents, n_L, 10.0 * ones_L, 4.0)
            penalty = penalty + ops.pre_act_penalty(latents, p["t_L"], n_L, 3e-6 * ones_L)
        recon = ops.decode_recon_loss(latents, p["W_dec_LO"], p["b_dec_O"], target_BO, widths)
        if case.k_aux:
            self._mark("decode and loss")
            penalty = penalty + self.auxk(x_BI, target_BO, recon)
            self._mark("AuxK forward")
        return recon.loss + penalty

    def auxk(self, x_BI: Tensor, target_BO: Tensor, recon: ReconLoss) -> Tensor:
        """The trainer's own term, of a model that is this step."""
        silence_L = (torch.arange(self.case.L, device=x_BI.device) < self.case.dead * self.case.L).long()
        term, model = AuxKTerm(k_aux=self.case.k_aux, dead_after_tokens=1), cast(Any, self)
        return term.weight * term(LossContext(model, x_BI, target_BO, cast(Any, None), silence_L, _recon=[recon]))

    @property
    def n_latents(self) -> int:
        return self.case.L

    def dead_recon_loss(self, x_BI: Tensor, dead_mask_L: Tensor, k: int, residual_BO: Tensor) -> Tensor:
        p = self.params
        encoder = (x_BI, p["W_enc_LI"], p["b_enc_L"])
        return self.ops.dead_recon_loss(*encoder, dead_mask_L, k, p["W_dec_LO"], residual_BO, sparse_grad=True)

    def encode(self, x_BI: Tensor) -> Latents:
        case, ops, p = self.case, self.ops, self.params
        encoder = (x_BI, p["W_enc_LI"], p["b_enc_L"])
        self.seconds, self._last = {}, self.clock()
        if case.scheme == "l1":
            latents = ops.encode_relu(*encoder)
        elif case.scheme == "jumprelu":
            latents = ops.encode_jumprelu(*encoder, p["t_L"], 2.0, "anthropic")
        else:
            latents = getattr(ops, f"encode_{case.scheme}")(*encoder, case.k)
        self._mark("encode")
        return latents

    def run(self, x_BI: Tensor, target_BO: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(x_BI, target_BO)
        self._mark("decode and loss")
        loss.backward()
        self._mark("backward")
        clip_grad_norm_(list(self.params.values()), 1.0, self.optimizer)
        self._mark("clip")
        self.optimizer.step()
        self._mark("optimizer")
        return loss.detach()


def make_params(case: Case, x_BI: Tensor) -> dict[str, Tensor]:
    """Random unit decoder directions, encoder their transpose where widths allow; biases that give few latents much of the
    activity, and for dense activations the aimed density."""
    generator = torch.Generator().manual_seed(0)
    W_dec_LO = torch.randn(case.L, case.O, generator=generator)
    W_dec_LO *= 0.1 / W_dec_LO.norm(dim=1, keepdim=True)
    W_enc_LI = torch.randn(case.L, case.I, generator=generator) * case.I**-0.5
    params = {"W_enc_LI": W_enc_LI, "W_dec_LO": W_dec_LO, "b_dec_O": torch.zeros(case.O)}
    popularity_L = 1 / (1 + torch.randperm(case.L, generator=generator).float() / 100)
    params["b_enc_L"] = 0.5 * popularity_L
    if case.l0:
        h_BL = x_BI[:256] @ W_enc_LI.T + params["b_enc_L"]
        edge = 1.1052 if case.scheme == "jumprelu" else 0.0
        cut = h_BL.flatten().topk(max(int(case.l0 * h_BL.shape[0]), 1)).values[-1]
        params["b_enc_L"] += edge - cut
    if case.scheme == "jumprelu":
        params["t_L"] = torch.full((case.L,), 0.1)
    return {name: tensor.requires_grad_() for name, tensor in params.items()}


def batch(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.B, case.I, generator=generator), torch.randn(case.B, case.O, generator=generator)


def saved_bytes(step: Step, x_BI: Tensor, target_BO: Tensor) -> int:
    """Bytes of unique storages that autograd keeps for backward, parameters excluded."""
    own = {tensor.untyped_storage().data_ptr() for tensor in step.params.values()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.forward(x_BI, target_BO)
    loss.backward()
    return sum(storages.values())


def peak_bytes(step: Step, x_BI: Tensor, target_BO: Tensor) -> int:
    """Largest sum of live allocations made during one step, those that end as gradients excluded."""
    from torch._C._profiler import _EventType

    step.optimizer.zero_grad(set_to_none=True)
    host_buffers.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step.run(x_BI, target_BO)
    grads = set()
    for tensor in step.params.values():
        if tensor.grad is None:
            continue
        parts = [tensor.grad._values(), tensor.grad._indices()] if tensor.grad.is_sparse else [tensor.grad]
        grads |= {part.untyped_storage().data_ptr() for part in parts}
    changes = []
    queue = list(profile.profiler.kineto_results.experimental_event_tree())
    while queue:
        event = queue.pop()
        queue.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    changes.sort(key=lambda change: change[0])
    last_alloc = {ptr: i for i, (_, ptr, size) in enumerate(changes) if size > 0}
    live: dict[int, int] = {}
    now = peak = 0
    for i, (_, ptr, size) in enumerate(changes):
        if size > 0 and not (ptr in grads and last_alloc[ptr] == i):
            live[ptr] = size
            now += size
            peak = max(peak, now)
        elif size < 0:
            now -= live.pop(ptr, 0)
    return peak
