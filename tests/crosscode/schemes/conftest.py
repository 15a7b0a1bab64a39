"""Objectives from what a config would say, contexts to call them in, and the formulas of the literature.

The formulas use plain tensor algebra and automatic differentiation on it, and nothing of the library but the values of
the parameters. Selections are made by sorting. A pseudo-derivative enters as `pseudo * (t - t.detach())`, which is 0
with the wanted slope.

Axes: B tokens · I/O flattened input/output · X output positions · D width · L latents · S source layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from crosscode.config.registry import Component
from crosscode.objectives import LossContext, Objective, objective_from
from crosscode.trainers.constraints import HoldPartition


def _objective(config: dict[str, dict[str, Any]]) -> Objective:
    return objective_from({name: Component(type=name, **fields) for name, fields in config.items()})


@pytest.fixture
def objective() -> Callable[..., Objective]:
    return _objective


@pytest.fixture
def context() -> Callable[..., LossContext]:
    """`context(case, tokens_since_fired_L)`: one training forward pass."""

    def make(case: Any, tokens_since_fired_L: torch.Tensor | None = None) -> LossContext:
        if tokens_since_fired_L is None:
            tokens_since_fired_L = torch.zeros(case.model.n_latents, dtype=torch.int64)
        result = case.model.forward_train(case.input_BXiDi)
        return LossContext(case.model, case.input_BXiDi, case.target_BXoDo, result, tokens_since_fired_L)

    return make


@pytest.fixture
def dictionary() -> type[Dictionary]:
    """`dictionary(case, activation, k=4)`: the model of a case from its formula."""
    return Dictionary


@pytest.fixture
def check() -> Callable[..., None]:
    """`check(case, formula, loss, expected)`: value and all gradients of a loss agree to 1e-10."""
    return _check


@dataclass
class Formula:
    """One source layer's parameters as leaves, by the names that the model gives them."""

    p: dict[str, Tensor]
    prefix: str

    def get(self, name: str) -> Tensor | None:
        return self.p.get(self.prefix + name)

    def preacts(self, x_BI: Tensor) -> Tensor:
        W_enc = self.p[self.prefix + "W_enc_LXiDi"].flatten(1)
        b_enc = self.get("b_enc_L")
        h_BL = torch.einsum("bi,li->bl", x_BI, W_enc)
        return h_BL if b_enc is None else h_BL + b_enc

    def decode(self, a_BL: Tensor) -> Tensor:
        return torch.einsum("bl,lo->bo", a_BL, self.p[self.prefix + "W_dec_LXoDo"].flatten(1))

    def norms(self, mode: str) -> Tensor:
        W_dec = self.p[self.prefix + "W_dec_LXoDo"]
        per_position_LX = root(W_dec.pow(2).sum(-1)).reshape(W_dec.shape[0], -1)
        return per_position_LX.sum(1) if mode == "sum" else root(W_dec.pow(2).flatten(1).sum(1))

    @property
    def t(self) -> Tensor:
        return self.p[self.prefix + "activation_fn.log_threshold_L"]

    @property
    def theta(self) -> Tensor:
        linear = self.get("activation_fn.threshold_L")
        return self.t.exp() if linear is None else linear


def root(values: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is 0."""
    return torch.where(values > 0, values, 1.0).sqrt() * (values > 0)


def owned(model: Any) -> Tensor:
    """1 for weights `(L, M, ...)` of a latent at a model to which it belongs, else 0."""
    owned_LM = torch.ones(model.n_latents, model.n_models, dtype=torch.float64)
    first = model.n_shared_latents
    for block in model.partition.as_config():
        for latent in range(first, first + block["n_latents"]):
            owned_LM[latent] = torch.tensor([float(m in block["models"]) for m in range(model.n_models)])
        first += block["n_latents"]
    return owned_LM[:, :, None, None]


def largest(values: Tensor, k: int) -> Tensor:
    """Mask of the k largest of each row, the first of equals."""
    order = values.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(values).scatter(1, order, 1.0)


def relu_(f: Formula, h: Tensor, n: Tensor, k: int) -> Tensor:
    return torch.where(h > 0, h, 0.0)


def topk(f: Formula, h: Tensor, n: Tensor, k: int) -> Tensor:
    a = relu_(f, h, n, k)
    return a * largest(a, k)


def batch_topk(f: Formula, h: Tensor, n: Tensor, k: int) -> Tensor:
    a = relu_(f, h, n, k)
    return a * largest(a.reshape(1, -1), k * h.shape[0]).reshape(h.shape)


def batch_topk_by_norm(f: Formula, h: Tensor, n: Tensor, k: int) -> Tensor:
    a = relu_(f, h, n, k)
    return a * largest((a * n).reshape(1, -1), k * h.shape[0]).reshape(h.shape)


def groupmax(f: Formula, h: Tensor, n: Tensor, k: int) -> Tensor:
    a = relu_(f, h, n, k)
    groups = a.reshape(h.shape[0] * k, h.shape[1] // k)
    return (groups * largest(groups, 1)).reshape(h.shape)


def jumprelu(f: Formula, h: Tensor, n: Tensor, k: int, ste: str = "anthropic", eps: float = 2.0) -> Tensor:
    theta = f.t.exp().detach()
    pseudo = -(theta / eps) * ((h.detach() - theta).abs() < eps / 2)
    if ste == "gdm":
        pseudo = pseudo * theta
    return h * (h.detach() > theta) + pseudo * (f.t - f.t.detach())


def jumprelu_gdm(f: Formula, h: Tensor, n: Tensor, k: int) -> Tensor:
    return jumprelu(f, h, n, k, "gdm")


def jumprelu_linear(f: Formula, h: Tensor, n: Tensor, k: int, eps: float = 2.0) -> Tensor:
    theta, h_ = f.theta.detach(), h.detach()
    pseudo = -(theta / eps) * ((h_ - theta).abs() < eps / 2)
    return h * (h_ > theta) + pseudo * (f.theta - theta)


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": relu_,
    "topk": topk,
    "batch_topk": batch_topk,
    "batch_topk_by_norm": batch_topk_by_norm,
    "groupmax": groupmax,
    "jumprelu": jumprelu,
    "jumprelu_gdm": jumprelu_gdm,
    "jumprelu_linear": jumprelu_linear,
}


class Dictionary:
    """The whole model from its formula: one source layer, or the sum over several."""

    def __init__(self, case: Any, activation: str, k: int = 4):
        self.model, self.k = case.model, k
        self.p = {name: param.detach().clone().requires_grad_() for name, param in case.model.named_parameters()}
        self.leaves = list(self.p.values())
        if case.model.partition is not None:  # what is foreign is no weight of the model
            for name in ("W_enc_LXiDi", "W_dec_LXoDo"):
                self.p[name] = self.p[name] * owned(case.model)
        compound = any(name.startswith("layers.") for name in self.p)
        n_sources = len({name.split(".")[1] for name in self.p if name.startswith("layers.")}) if compound else 1
        self.sources = [Formula(self.p, f"layers.{s}." if compound else "") for s in range(n_sources)]
        self.x_BI = [case.input_BXiDi[:, s] if compound else case.input_BXiDi.flatten(1) for s in range(n_sources)]
        self.shape = case.target_BXoDo.shape
        self.target_BO = case.target_BXoDo.flatten(1)
        self.activation = ACTIVATIONS[activation]
        self.n_S = [f.norms(case.model.decoder_norm) for f in self.sources]
        self.penalty_n_S = self.n_S
        if case.model.n_shared_latents:
            # A shared latent has one vector: the norm of either model's.
            W_dec, S = self.p["W_dec_LXoDo"], case.model.n_shared_latents
            norms_SMP = W_dec[:S].pow(2).sum(-1).sqrt()
            once_S = (
                norms_SMP.sum(2).mean(1) if case.model.decoder_norm == "sum" else norms_SMP.pow(2).sum(2).mean(1).sqrt()
            )
            self.penalty_n_S = [torch.cat([once_S, self.n_S[0][S:]])]
        centre_I = self.p["b_dec_XoDo"].flatten() if case.model.use_pre_bias else 0.0
        self.h_S = [f.preacts(x - centre_I) for f, x in zip(self.sources, self.x_BI, strict=True)]

    def latents(self, k: int | None = None) -> list[Tensor]:
        k = k or self.k
        if self.model.selects_over_parts:
            a_BL = self.activation(self.sources[0], torch.cat(self.h_S, 1), torch.cat(self.n_S), k)
            return list(a_BL.split([h.shape[1] for h in self.h_S], 1))
        zipped = zip(self.sources, self.h_S, self.n_S, strict=True)
        return [self.activation(f, h, n, k) for f, h, n in zipped]

    def decode(self, a_S: list[Tensor], *, bias: bool = True) -> Tensor:
        y_BO = torch.zeros_like(self.target_BO)
        for f, a, x in zip(self.sources, a_S, self.x_BI, strict=True):
            from_source = f.decode(a)
            skip = f.get("W_skip_XiDiXoDo")
            if skip is not None and bias:
                from_source = from_source + x @ skip.reshape(x.shape[1], -1)
            # A source layer writes to the last outputs, or in a set of transcoders to its own.
            is_set = not getattr(self.model, "later_layers", True)
            after = (len(self.sources) - 1 - self.sources.index(f)) * from_source.shape[1] if is_set else 0
            before = self.target_BO.shape[1] - from_source.shape[1] - after
            y_BO = y_BO + torch.nn.functional.pad(from_source, (before, after))
        return y_BO + self.p["b_dec_XoDo"].flatten() if bias and "b_dec_XoDo" in self.p else y_BO

    def recon(self, a_S: list[Tensor]) -> Tensor:
        return (self.target_BO - self.decode(a_S)).pow(2).sum(1).mean()

    def normalised_recon(self, a_S: list[Tensor]) -> Tensor:
        spread = self.target_BO - self.target_BO.mean(0, keepdim=True)
        return self.recon(a_S) / spread.pow(2).sum(1).mean()

    def delta(self, a_S: list[Tensor], reference: int = 0) -> Tensor:
        y_BMF, yhat_BMF = self.target_BO.reshape(*self.shape[:2], -1), self.decode(a_S).reshape(*self.shape[:2], -1)
        total = torch.zeros((), dtype=torch.float64)
        for m in range(self.shape[1]):
            wanted_BF, found_BF = y_BMF[:, m] - y_BMF[:, reference], yhat_BMF[:, m] - yhat_BMF[:, reference]
            total = total + (wanted_BF - found_BF).pow(2).sum() / self.shape[0]
        return total

    def recon_of_prefix(self, a_S: list[Tensor], size: int) -> Tensor:
        """Of the first latents of every source layer, their share of `size`."""
        n_own = size // len(a_S)
        return self.recon([a_BL * (torch.arange(a_BL.shape[1]) < n_own) for a_BL in a_S])

    def weights_S(self, ratio: float) -> list[Tensor]:
        weights = torch.ones(sum(h.shape[1] for h in self.h_S), dtype=torch.float64)
        weights[: self.model.n_shared_latents] = ratio
        return list(weights.split([h.shape[1] for h in self.h_S]))

    def l1(self, a_S: list[Tensor], ratio: float = 1.0) -> Tensor:
        zipped = zip(self.weights_S(ratio), a_S, self.penalty_n_S, strict=True)
        return torch.stack([(w * a * n).sum(1).mean() for w, a, n in zipped]).sum()

    def tanh(self, a_S: list[Tensor], ratio: float = 1.0, c: float = 4.0) -> Tensor:
        zipped = zip(self.weights_S(ratio), a_S, self.penalty_n_S, strict=True)
        return torch.stack([(w * torch.tanh(c * a * n)).sum(1).mean() for w, a, n in zipped]).sum()

    def pre_act(self, ratio: float = 1.0) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for w, f, h, n in zip(self.weights_S(ratio), self.sources, self.h_S, self.penalty_n_S, strict=True):
            gap = f.theta - h
            total = total + (w * torch.where(gap > 0, gap, 0.0) * n).sum(1).mean()
        return total

    def step_BL(self, eps: float = 2.0) -> Tensor:
        """Which latents are active, of all source layers, with the rectangle as the slope to the threshold."""
        steps = []
        for f, h in zip(self.sources, self.h_S, strict=True):
            theta, h_ = f.theta.detach(), h.detach()
            slope = ((h_ - theta).abs() < eps / 2) / eps
            steps.append((h_ > theta).double() - slope * (f.theta - theta))
        return torch.cat(steps, 1)

    def l0(self, target: float, pull: str = "batch") -> Tensor:
        l0_B = self.step_BL().sum(1)
        pulled = l0_B.mean() if pull == "batch" else l0_B
        # (2 / L0*) (l0 - L0*)^2, with lambda = O / (2 L0*)
        loss = (2 / target) * (pulled - target).pow(2).mean()
        return self.target_BO.shape[1] / (2 * target) * loss

    def too_frequent(self, max_share: float) -> Tensor:
        share_L = self.step_BL().mean(0)
        return self.target_BO.shape[1] * torch.where(share_L > max_share, share_L / max_share - 1, 0.0).mean()

    def auxk(self, a_S: list[Tensor], dead_L: Tensor, k_aux: int) -> Tensor:
        error_BO = (self.target_BO - self.decode(a_S)).detach()
        h_BL = torch.cat(self.h_S, 1)
        candidates_BL = torch.where(dead_L & (h_BL > 0), h_BL, 0.0)
        a_BL = candidates_BL * largest(candidates_BL, k_aux)
        predicted_BO = self.decode(list(a_BL.split([h.shape[1] for h in self.h_S], 1)), bias=False)
        variance = (error_BO - error_BO.mean(0, keepdim=True)).pow(2).mean()
        share = min(int(dead_L.sum()), k_aux) / k_aux
        return (error_BO - predicted_BO).pow(2).mean() / variance * share


def _check(case: Any, formula: Dictionary, loss: Any, expected: Tensor) -> None:
    loss.total.backward()
    if case.model.partition is not None:
        HoldPartition().after_backward(case.model)
    torch.testing.assert_close(loss.total.detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(expected, formula.leaves, allow_unused=True, retain_graph=True)
    assert any(grad is not None and bool((grad != 0).any()) for grad in grads)
    for (name, param), grad in zip(case.model.named_parameters(), grads, strict=True):
        wanted = torch.zeros_like(param) if grad is None else grad
        found = torch.zeros_like(param) if param.grad is None else param.grad
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
