"""Backends, oracle, error budget and problems for the kernels' tests.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · X crosscoding positions.

The oracle is float64 and written from the formulas of the schemes, not from the library. A backend passes where its error
against the oracle is at most twice the error of plain PyTorch in the same dtype plus one rounding band, so that the
tolerance follows dtype and shape by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from crosscode_kernels import OpSet, resolve_backend
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("torch", "cuda"), id="torch-gpu", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
]
if INTERPRETED:
    _BACKENDS.append(pytest.param(("triton", "cpu"), id="triton-interpreted"))


@dataclass(frozen=True)
class Backend:
    ops: OpSet
    device: str


@dataclass(frozen=True)
class Problem:
    """Parameters and a batch, leaves that require grad where a gradient is tested."""

    x_BI: Tensor
    W_enc_LI: Tensor
    b_enc_L: Tensor
    W_dec_LO: Tensor
    b_dec_O: Tensor
    target_BO: Tensor
    t_L: Tensor
    lambda_L: Tensor
    segments: tuple[int, ...]

    def leaves(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and value.requires_grad}

    def double(self) -> Problem:
        """The same numbers in float64 on the CPU, as fresh leaves."""
        return Problem(
            **{
                name: value.detach().cpu().double().requires_grad_(value.requires_grad)
                if isinstance(value, Tensor)
                else value
                for name, value in vars(self).items()
            }
        )

    def clone(self) -> Problem:
        """The same numbers as fresh leaves."""
        return Problem(
            **{
                name: value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
                for name, value in vars(self).items()
            }
        )


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _repaired_interpreter() -> Iterator[None]:
    """The Triton kernels in an interpreter that rounds as GPUs do and looks at every address."""
    if not INTERPRETED:
        yield
        return
    from triton_interpreter import checked_bounds, repaired_interpreter

    with repaired_interpreter(), checked_bounds():
        yield


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend that can run here."""
    name, device = request.param
    return Backend(resolve_backend(name, device), device)


@pytest.fixture(params=_BACKENDS[1:])
def fast_backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend but the reference."""
    name, device = request.param
    return Backend(resolve_backend(name, device), device)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    """`make_problem(B, I, L, O, dtype, device, zipf=..., segments=...)`; `zipf` gives few latents most of the activity,
    as in a trained model."""

    def make(
        B: int,
        I: int,  # noqa: E741
        L: int,
        O: int,  # noqa: E741
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        zipf: bool = False,
        segments: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

        popularity_L = 1 / (1 + torch.arange(L)[torch.randperm(L, generator=generator)].float()) if L else torch.ones(0)
        b_enc_L = (3 * popularity_L if zipf else torch.zeros(L)).to(device, dtype) + normal(L, scale=0.1)
        tensors = {
            "x_BI": normal(B, I),
            "W_enc_LI": normal(L, I, scale=max(I, 1) ** -0.5),
            "b_enc_L": b_enc_L,
            "W_dec_LO": normal(L, O, scale=max(O, 1) ** -0.5),
            "b_dec_O": normal(O, scale=0.1),
            "t_L": normal(L, scale=0.3) - 0.5,
        }
        for tensor in tensors.values():
            tensor.requires_grad_()
        target_BO = normal(B, O)
        lambda_L = torch.rand(L, generator=generator).to(device, torch.float32)
        return Problem(**tensors, target_BO=target_BO, lambda_L=lambda_L, segments=segments or (O,))

    return make


@pytest.fixture
def within_budget() -> Callable[[Tensor, Tensor, Tensor, torch.dtype], None]:
    """Asserts `error(actual) <= 2 * (error(same-dtype eager) + one rounding band)`, errors against the oracle."""

    def check(actual: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype, name: str = "") -> None:
        assert actual.shape == oracle.shape, (name, actual.shape, oracle.shape)
        if oracle.numel() == 0:
            return
        band = torch.finfo(dtype).eps * oracle.abs().max().item()
        error = (actual.detach().cpu().double() - oracle.detach()).abs().max().item()
        eager_error = (eager.detach().cpu().double() - oracle.detach()).abs().max().item()
        assert error <= 2 * (eager_error + band), f"{name}: error {error:.3g}, eager {eager_error:.3g}, band {band:.3g}"

    return check


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle


class Oracle:
    """The formulas, dense, in whatever dtype they are given: float64 for the oracle, the tested one for "eager"."""

    @staticmethod
    def preacts(p: Problem) -> Tensor:
        return p.x_BI.matmul(p.W_enc_LI.transpose(0, 1)) + p.b_enc_L

    @staticmethod
    def latents(p: Problem, kept_BL: Tensor) -> Tensor:
        """relu(h) on a given support: gradients are compared given the indices."""
        return torch.clamp(Oracle.preacts(p), min=0) * kept_BL.to(p.x_BI.dtype)

    @staticmethod
    def decode(a_BL: Tensor, p: Problem) -> Tensor:
        return a_BL.matmul(p.W_dec_LO) + p.b_dec_O

    @staticmethod
    def recon(y_BO: Tensor, p: Problem) -> Tensor:
        wide = torch.float64 if y_BO.dtype == torch.float64 else torch.float32
        return (y_BO.to(wide) - p.target_BO.to(wide)).pow(2).sum(dim=1).mean()

    @staticmethod
    def norms(W_dec_LO: Tensor, segments: tuple[int, ...], mode: str) -> Tensor:
        wide = torch.float64 if W_dec_LO.dtype == torch.float64 else torch.float32
        squares = [part.to(wide).pow(2).sum(1) for part in torch.split(W_dec_LO, list(segments), dim=1)]
        return sum(squares).sqrt() if mode == "joint" else sum(square.sqrt() for square in squares)  # type: ignore

    @staticmethod
    def topk_kept(h_BL: Tensor, k: int) -> Tensor:
        """Rank of each entry among its row's relu(h), equal values by index; kept where the rank is below k."""
        a_BL = torch.clamp(h_BL, min=0)
        n_latents = a_BL.shape[1]
        greater_BL = (a_BL.unsqueeze(1) > a_BL.unsqueeze(2)).sum(2)
        earlier_LL = torch.arange(n_latents).unsqueeze(0) < torch.arange(n_latents).unsqueeze(1)
        equal_before_BL = ((a_BL.unsqueeze(1) == a_BL.unsqueeze(2)) & earlier_LL).sum(2)
        return ((greater_BL + equal_before_BL) < k) & (a_BL > 0)
