"""Backends change speed and memory, never results: tiny runs of every recipe, on stand-in activations.

    TRITON_INTERPRET=1 pytest tests/crosscode/recipes/test_backends_agree.py       (`make tests` does so)

With the variable the backend under test is `triton` in its interpreter, without it `torch`; with a GPU, both there.

Axes: B tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_recipes import N_STEPS, make_trainer
from torch import Tensor

from crosscode.recipes import recipe_names

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    pytest.param(("triton", "cpu"), id="triton-interpreted")
    if INTERPRETED
    else pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("torch", "cuda"), id="torch-gpu", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
]


def curve(trainer, n_steps: int = N_STEPS) -> tuple[Tensor, list[Tensor]]:
    """Total and parts of each step's loss, in float64; and which latents were active, by step and part of the model."""
    losses, active = [], []
    forward_pass = trainer.update.forward

    def forward(input_BXiDi: Tensor, target_BXoDo: Tensor):
        result, terms = forward_pass(input_BXiDi, target_BXoDo)
        loss = trainer.objective.weigh(terms, trainer.objective.coefficients(trainer.step, trainer.n_steps))
        losses.append(torch.stack([loss.total.detach(), *loss.parts.values()]).double().cpu())
        active.extend(latents.to_dense().detach().cpu() > 0 for latents in result.latents_of_parts)
        return result, terms

    trainer.update.forward = forward
    trainer.start()
    for acts_BMPD in islice(trainer.data, n_steps):
        trainer.train_step(acts_BMPD)
    assert len(losses) == n_steps and all(bool(mask.any()) for mask in active)
    return torch.stack(losses), active


def reference_curves(name: str, folder: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses in float64, losses in float32, active latents in float32."""
    exact, _ = curve(make_trainer(name, folder / "exact", "reference", "cpu", torch.float64))
    reference, active = curve(make_trainer(name, folder / "reference", "reference", "cpu"))
    assert bool((exact[-1] != 0).all()), "every term takes part in the last step"
    return exact, reference, active


def assert_within_budget(losses: Tensor, reference: Tensor, exact: Tensor) -> None:
    """The kernels' budget, over the curve: an error of one step is carried to the next."""
    band = torch.finfo(torch.float32).eps * exact.abs().amax(0)
    error, reference_error = (losses - exact).abs().amax(0), (reference - exact).abs().amax(0)
    assert bool((error <= 2 * (reference_error + band)).all()), (error, reference_error, band)


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    torch.set_num_threads(1)
    if not INTERPRETED:
        yield
        return
    from triton_interpreter import repaired_interpreter

    with repaired_interpreter():
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", recipe_names())
def test_a_backend_reproduces_the_loss_curve_of_the_reference(name, backend, tmp_path):
    exact, reference, expected_active = reference_curves(name, tmp_path)
    losses, active = curve(make_trainer(name, tmp_path / "run", *backend))
    for number, (one, other) in enumerate(zip(active, expected_active, strict=True)):
        assert torch.equal(one, other), f"other latents are active in forward pass {number}"
    assert_within_budget(losses, reference, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["to the reference", "from the reference"])
@pytest.mark.parametrize("name", ["topk_crosscoder", "three_model_crosscoder", "compound_clt"])
def test_a_saved_run_goes_on_in_another_backend(name, order, backend, tmp_path):
    exact, reference, expected_active = reference_curves(name, tmp_path)
    backends = [backend, ("reference", "cpu")]
    first, second = backends if order == "to the reference" else backends[::-1]
    trainer = make_trainer(name, tmp_path / "run", *first)
    before, active = curve(trainer, N_STEPS // 2)
    trainer.save_checkpoint()
    resumed = make_trainer(name, tmp_path / "run", *second, resume=True)
    assert resumed.model.ops.name == second[0] and resumed.step == N_STEPS // 2
    after, active_after = curve(resumed, N_STEPS - N_STEPS // 2)
    assert all(torch.equal(*pair) for pair in zip(active + active_after, expected_active, strict=True))
    assert_within_budget(torch.cat([before, after]), reference, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["batch_topk_crosscoder", "jan_update_crosscoder"])
def test_two_runs_have_the_same_bits(name, backend, tmp_path):
    trainers = [make_trainer(name, tmp_path / str(number), *backend) for number in range(2)]
    (losses, _), (again, _) = map(curve, trainers)
    assert torch.equal(losses, again)
    for one, other in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(one, other)
