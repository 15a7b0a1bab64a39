"""The pull of a wanted L0 on linear thresholds is hundreds of times the gradient of the weights until L0 is there. The traps:
weights clipped to almost nothing until then, whose steps are far too large afterwards; thresholds that cannot turn back."""

import pytest
import torch

from crosscode.models.activations import AnthropicSTEJumpReLUActivation
from crosscode.trainers.faults import NonFiniteLoss
from crosscode.trainers.optimizers import Adam
from crosscode.trainers.optimizers.adam import THRESHOLD_BETA2

LINEAR = {"type": "jumprelu", "thresholds": "linear"}


def first_norm(make_trainer, rows_of, name, weight, activation=LINEAR, **settings):
    term = {"l0": {"target": 3.0, "weight": weight}}
    trainer = make_trainer(name, n_steps=1, activation=activation, objective={"recon": {}, **term}, **settings)
    trainer.train()
    (row,) = rows_of(trainer)
    return row["grad_norm"]


@pytest.mark.parametrize("optimizer", [{}, {"betas": (0.0, 0.999)}])
@pytest.mark.parametrize("n_parts", [1, 2])
def test_the_norm_that_is_clipped_is_that_of_the_weights(n_parts, optimizer, make_trainer, rows_of):
    settings = {"optimizer": {"type": "adam", "lr": 0.01, **optimizer}, "grad_accumulation": n_parts}
    norms = [first_norm(make_trainer, rows_of, str(weight), weight, **settings) for weight in (1e-3, 10.0, 1e5)]
    assert norms[0] == norms[1] == norms[2] > 0
    counted = {"type": "adam", "lr": 0.01, "threshold_lr_factor": 0.1, **optimizer}
    far = first_norm(make_trainer, rows_of, "counted", 1e5, **{**settings, "optimizer": counted})
    assert far > 10 * norms[0], "thresholds with a rate that the user gave count as ever"


def test_a_gradient_of_thresholds_that_is_not_finite_is_seen(make_trainer):
    trainer = make_trainer(n_steps=3, activation=LINEAR, objective={"recon": {}, "l0": {"target": 3.0}})
    threshold_L = trainer.model.activation_fns[0].threshold_L
    threshold_L.register_hook(lambda grad: torch.full_like(grad, float("nan")))
    with pytest.raises(NonFiniteLoss, match="the gradient norm is nan at step 0"):
        trainer.train()


def test_thresholds_that_travel_forget_soon(make_case):
    model = make_case("sae", "jumprelu_linear").model
    assert isinstance(model.activation_fns[0], AnthropicSTEJumpReLUActivation)
    weights, thresholds = Adam(lr=0.01).build(model).param_groups
    assert (weights["betas"], thresholds["betas"]) == ((0.9, 0.999), (0.9, THRESHOLD_BETA2))
    _, thresholds = Adam(lr=0.01, betas=(0.5, 0.5)).build(model).param_groups
    assert thresholds["betas"] == (0.5, 0.5)
    _, thresholds = Adam(lr=0.01, threshold_lr_factor=0.1).build(model).param_groups
    assert thresholds["betas"] == (0.9, 0.999)
