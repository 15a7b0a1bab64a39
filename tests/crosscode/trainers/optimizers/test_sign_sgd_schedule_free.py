"""Schedule-free SignSGD."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from crosscode.errors import InputError
from crosscode.trainers.optimizers import OPTIMIZERS
from crosscode.weight_files import WEIGHTS_FILE


@pytest.fixture
def plan():
    return OPTIMIZERS["sign_sgd_schedule_free"](lr=0.1, momentum=0.9)


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
    return [param.grad.clone() for param in model.parameters()]


def test_three_steps_follow_the_written_recursion(plan, make_case):
    model = make_case("acausal_2x1").model
    optimizer = plan.build(model)
    z = [param.detach().clone() for param in model.parameters()]
    x = [param.clone() for param in z]
    for step in range(3):
        grads = set_gradients(model, step)
        optimizer.step()
        z = [value - 0.1 * grad.sign() for value, grad in zip(z, grads, strict=True)]
        x = [(1 - 1 / (step + 1)) * old + new / (step + 1) for old, new in zip(x, z, strict=True)]
        y = [0.1 * fast + 0.9 * average for fast, average in zip(z, x, strict=True)]
        for param, expected in zip(model.parameters(), y, strict=True):
            torch.testing.assert_close(param.detach(), expected)
    plan.start_evaluation(optimizer)
    for param, expected in zip(model.parameters(), x, strict=True):
        torch.testing.assert_close(param.detach(), expected)
    plan.start_training(optimizer)
    for param, expected in zip(model.parameters(), y, strict=True):
        torch.testing.assert_close(param.detach(), expected)


def test_thresholds_have_a_learning_rate_of_their_own(make_case):
    for name in ("adam", "sign_sgd_schedule_free"):
        plan = OPTIMIZERS[name](lr=0.01, threshold_lr_factor=0.1)
        for architecture in ("acausal_2x1", "compound"):
            model = make_case(architecture, "jumprelu").model
            groups = plan.build(model).param_groups
            rates = {id(param): group["lr"] for group in groups for param in group["params"]}
            assert {rates[id(p)] for p in model.parameter_groups()["thresholds"]} == {0.01 * 0.1}
            assert {rates[id(p)] for p in model.parameter_groups()["weights"]} == {0.01}


def test_the_learning_rate_warms_up_and_never_decays(plan):
    assert [plan.lr_factor(step, 100) for step in (0, 4, 50, 99)] == pytest.approx([0.2, 1.0, 1.0, 1.0])


def test_the_default_rate_falls_with_the_root_of_the_number_of_latents(make_case):
    optimizer = OPTIMIZERS["sign_sgd_schedule_free"]().build(make_case("sae").model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 / (24 / 2**14) ** 0.5)


def test_momentum_must_lie_between_0_and_1():
    with pytest.raises(InputError, match=r"optimizer.momentum = 1.0"):
        OPTIMIZERS["sign_sgd_schedule_free"](momentum=1.0)


def test_a_checkpoint_has_the_weights_that_are_evaluated(make_trainer, planted):
    options = {"optimizer": {"type": "sign_sgd_schedule_free", "lr": 0.01}, "checkpoint_every": 5, "keep_last": 9}
    trainer = make_trainer("run", data=planted(dims=(2, 1, 6)), **options)
    trainer.start()
    batches = iter(trainer.data)
    for _ in range(5):
        trainer.train_step(next(batches))
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    saved = load_file(trainer.run.checkpoint(5) / WEIGHTS_FILE)
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())
    trainer.optimizer_plan.start_evaluation(trainer.optimizer)
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(saved[name], weight) and not torch.equal(saved[name], before[name]), name


def test_a_state_of_before_goes_on_from_the_weights_of_its_model(plan, make_case):
    model = make_case("acausal_2x1").model
    optimizer = plan.build(model)
    set_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    for own in state["state"].values():
        own.pop("training_weight")
    again = plan.build(model)
    before = [param.detach().clone() for param in model.parameters()]
    again.load_state_dict(state)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(set(again.state[param]) == {"z"} for param in model.parameters())
