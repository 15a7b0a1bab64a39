"""What is not finite stays out of the weights; what runs out of memory says what to change."""

import logging

import pytest
import torch

from crosscode.errors import CrosscodeError
from crosscode.trainers import update as update_module
from crosscode.trainers.faults import FiniteGuard, NonFiniteLoss
from crosscode.trainers.phases import OutOfMemory, Phases
from crosscode.trainers.trainer import Trainer

OPTIMIZER_TYPES = [{"type": "adam", "lr": 0.01}, {"type": "sign_sgd_schedule_free", "lr": 0.01}]
AUXK = {"recon": {}, "auxk": {"k_aux": 4, "dead_after_tokens": 40}}


def weights(trainer):
    return [param.detach().clone() for param in trainer.model.parameters()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_stops_training_and_names_step_and_term(value, make_trainer, planted):
    trainer = make_trainer(data=planted(poison={3: value}), objective=AUXK, log_every=2, checkpoint_every=2)
    with pytest.raises(NonFiniteLoss, match=r"loss term 'recon' is (nan|inf) at step 3: .*last checkpoint is .*step_2"):
        trainer.train()
    assert trainer.run.steps() == [2]
    assert all(bool(param.isfinite().all()) for param in trainer.model.parameters())


def test_a_bad_gradient_of_a_finite_loss_is_found(make_trainer, monkeypatch):
    trainer = make_trainer(log_every=5)
    clip = update_module.clip_grad_norm_

    def poison(*args):
        if trainer.step == 2:
            next(trainer.model.parameters()).grad[0] = float("nan")
        return clip(*args)

    monkeypatch.setattr(update_module, "clip_grad_norm_", poison)
    with pytest.raises(NonFiniteLoss, match="the gradient norm is nan at step 2"):
        trainer.train()


@pytest.mark.parametrize("optimizer", OPTIMIZER_TYPES, ids=lambda options: options["type"])
def test_a_bad_step_leaves_the_weights_finite(optimizer, make_trainer, planted):
    trainer = make_trainer(data=planted(poison={2: float("nan")}), optimizer=optimizer, log_every=100, n_steps=6)
    trainer.start()
    for acts_BMPD in trainer.data:
        trainer.train_step(acts_BMPD)
        if trainer.step == 5:
            break
    assert all(bool(param.isfinite().all()) for param in trainer.model.parameters())


def test_with_adam_a_step_that_is_left_out_changes_nothing(make_trainer, planted):
    trainer = make_trainer(data=planted(poison={2: float("nan")}), log_every=100, max_skipped_steps=1)
    trainer.start()
    batches = iter(trainer.data)
    for _ in range(2):
        trainer.train_step(next(batches))
    before = weights(trainer)
    moments = [state["exp_avg"].clone() for state in trainer.optimizer.state.values()]
    trainer.train_step(next(batches))
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), before, strict=True))
    after = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}
    trainer.train_step(next(batches))
    assert not any(torch.equal(a, b) for a, b in zip(weights(trainer), before, strict=True))


def test_some_bad_steps_may_be_left_out(make_trainer, planted, rows_of, caplog):
    poison = {2: float("nan"), 5: float("inf"), 6: float("nan")}
    trainer = make_trainer(data=planted(poison=poison), log_every=3, max_skipped_steps=3, n_steps=9)
    with caplog.at_level(logging.WARNING, logger="crosscode"):
        trainer.train()
    assert "loss term 'recon' is nan at step 2: 1 step(s) left out, 1 of 3 allowed" in caplog.text
    assert [row["skipped_steps"] for row in rows_of(trainer)] == [1, 2, 3]
    assert rows_of(trainer)[0]["loss"] is None  # step 2 is the third step, and is logged
    too_few = make_trainer("two", data=planted(poison=poison), log_every=3, max_skipped_steps=2, n_steps=9)
    with pytest.raises(NonFiniteLoss, match=r"3 bad steps, train.max_skipped_steps = 2"):
        too_few.train()


def test_how_many_steps_were_left_out_survives_a_resume(make_trainer, planted):
    trainer = make_trainer(data=planted(poison={0: float("nan")}), max_skipped_steps=1, n_steps=2, checkpoint_every=1)
    trainer.train()
    again = make_trainer(max_skipped_steps=1, n_steps=2)
    again.restore(1)
    assert again.guard.n_skipped == 1


def test_the_first_bad_step_is_named_although_later_ones_are_bad_in_another_term():
    guard = FiniteGuard(torch.device("cpu"))
    model, good, bad = torch.nn.Linear(1, 1), torch.tensor(1.0), torch.tensor(float("inf"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.before_optimizer(7, {"a": good, "b": bad}, good, optimizer, model)
    guard.before_optimizer(8, {"a": bad, "b": bad}, bad, optimizer, model)
    with pytest.raises(NonFiniteLoss, match="loss term 'b' is inf at step 7"):
        guard.check("none")


# ---- memory


def out_of_memory(kind):
    if kind == "device":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")
    if kind == "host":
        raise MemoryError
    torch.empty(2**60)


@pytest.mark.parametrize("kind", ["device", "host", "allocator"])
@pytest.mark.parametrize(
    ("phase", "setting"),
    [
        ("harvest", "data.harvest_batch_size"),
        ("step", "train.grad_accumulation"),
        ("eval", "data.harvest_batch_size"),
    ],
)
def test_out_of_memory_says_which_setting_to_change(kind, phase, setting):
    phases = Phases(torch.device("cpu"))
    with pytest.raises(OutOfMemory) as caught, phases(phase):
        out_of_memory(kind)
    assert setting in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, CrosscodeError)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes differ"), Phases(torch.device("cpu"))("step"):
        raise RuntimeError("shapes differ")


# ---- nothing is read from the device in steps that do not log


SCHEMES = {
    "topk": ({"type": "topk", "k": 4}, AUXK),
    "batch_topk": ({"type": "batch_topk", "k": 4}, AUXK),
    "batch_topk_by_norm": ({"type": "batch_topk", "k": 4, "rank_by": "decoder_norm_weighted"}, {"recon": {}}),
    "groupmax": ({"type": "groupmax", "k": 4}, AUXK),
    "relu": ({"type": "relu"}, {"recon": {}, "l1": {}}),
    "jumprelu": ({"type": "jumprelu", "log_threshold_init": -1.0}, {"recon": {}, "tanh": {}, "pre_act": {}}),
}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_value_is_read_in_steps_that_do_not_log(scheme, clip, accumulation, make_trainer, reads):
    activation, objective = SCHEMES[scheme]
    trainer: Trainer = make_trainer(
        activation=activation,
        objective=objective,
        log_every=4,
        clip_grad_norm=clip,
        grad_accumulation=accumulation,
        n_steps=100,
    )
    trainer.start()
    batches = iter(trainer.data)
    for _ in range(4):
        trainer.train_step(next(batches))
    acts = [next(batches) for _ in range(4)]
    with reads:
        for acts_BMPD in acts[:3]:
            trainer.train_step(acts_BMPD)
    assert reads.n == 0
    with reads:
        trainer.train_step(acts[3])
    assert reads.n > 0
