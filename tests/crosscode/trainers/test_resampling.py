"""Dead latents begin anew: weights by the paper's rule, moments, constraints, and when.

Axes: B tokens · L latents · R dead ones.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from crosscode.config.experiment import ResampleConfig, TrainConfig
from crosscode.config.registry import Component
from crosscode.models import BaseCrosscoder
from crosscode.trainers.constraints import constraints_for
from crosscode.trainers.constraints.unit_norm_decoder import UnitNormDecoder
from crosscode.trainers.firing import FiringTracker
from crosscode.trainers.forward import ForwardPass
from crosscode.trainers.optimizers import OPTIMIZERS
from crosscode.trainers.resampling import dead_after_tokens, resample_if_due

DEAD = [1, 7, 13, 23]
EVERY_STEP = {"every": 1, "until": 1.0, "dead_after_tokens": 100}


def trainer_of(case, optimizer=None, constraints=(), step=1, **resample):
    """As far as resampling looks at it: one step of the optimizer behind it, `DEAD` silent."""
    model: BaseCrosscoder = case.model.train()
    config = TrainConfig(n_tokens=64_000, batch_size=16, resample=ResampleConfig(**{**EVERY_STEP, **resample}))
    plan = OPTIMIZERS.build(Component(**(optimizer or {"type": "adam", "lr": 0.01})))
    made, firing = plan.build(model), FiringTracker(model.n_latents)
    model(case.input_BXiDi).square().sum().backward()
    for param in model.parameters():  # as if every row had been used
        param.grad = torch.full_like(param, 0.1)
    made.step()
    made.zero_grad()
    firing.tokens_since_fired_L[DEAD] = 100
    forward = ForwardPass(model, None, firing, config)  # pyright: ignore[reportArgumentType]
    return SimpleNamespace(
        model=model, config=config, optimizer_plan=plan, optimizer=made, firing=firing, forward=forward, step=step,
        tokens=16 * step, n_steps=4000, constraints=constraints_for(model, constraints),
    )  # fmt: skip


def test_weights_are_those_of_the_paper(architecture, make_case):
    """Each new row reads and writes the direction of one token of the batch from the batch's mean; no two of the same."""
    case = make_case(architecture, "jumprelu")
    trainer = trainer_of(case, constraints=[], encoder_scale=0.3)
    trainer.constraints = []
    model, n_parts = case.model, len(case.model.parts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resample_if_due(trainer, case.input_BXiDi, case.target_BXoDo)
    assert (trainer.firing.tokens_since_fired_L == 0).all()
    per_part = 24 // n_parts
    for p, (part, outputs) in enumerate(zip(model.parts, model.outputs_of_parts, strict=True)):
        prefix = f"layers.{p}." if n_parts > 1 else ""
        rows = [latent - p * per_part for latent in DEAD if latent // per_part == p]
        live = [row for row in range(per_part) if row not in rows]
        x = case.input_BXiDi if n_parts == 1 else case.input_BXiDi[:, p]
        x = (x - model.b_dec_XoDo if model.use_pre_bias else x).flatten(1)
        y = case.target_BXoDo.reshape(16, -1, model.d_out)[:, outputs].flatten(1)
        chosen = []
        for name, v, scale in (("W_enc_LXiDi", x, 0.3), ("W_dec_LXoDo", y, 1.0)):
            old, new = before[prefix + name].flatten(1), getattr(part, name).detach().flatten(1)
            assert torch.equal(old[live], new[live])
            norm = scale * old[live].square().sum(1).sqrt().mean()
            directions = (v - v.mean(0)) / (v - v.mean(0)).square().sum(1, keepdim=True).sqrt()
            off = (new[rows][:, None] - norm * directions).abs().amax(2)
            assert (off.amin(1) < 1e-12).all()
            chosen.append(off.argmin(1).tolist())
        assert chosen[0] == chosen[1] and len(set(chosen[0])) == len(rows)
        if part.b_enc_L is not None:
            h = x @ part.W_enc_LI.T + part.b_enc_L
            torch.testing.assert_close(h[:, rows].mean(0), torch.zeros(len(rows), dtype=h.dtype))
            assert torch.equal(before[prefix + "b_enc_L"][live], part.b_enc_L[live])
        log_threshold = before[prefix + "activation_fn.log_threshold_L"]
        expected = log_threshold.clone()
        expected[rows] = log_threshold[live].mean()
        torch.testing.assert_close(part.activation_fn.log_threshold_L.detach(), expected)


def test_tokens_are_drawn_by_the_square_of_their_loss(make_case):
    case = make_case("sae", "topk")
    with torch.no_grad():
        case.model.W_dec_LXoDo.zero_()
        case.model.b_dec_XoDo.zero_()
    trainer = trainer_of(case)
    with torch.no_grad():  # what the optimizer moved: outputs are 0, so the loss of a token is the square of its target
        case.model.W_dec_LXoDo.zero_()
        case.model.b_dec_XoDo.zero_()
    target_BD = torch.zeros(16, 5, dtype=torch.float64)
    target_BD[:, 0] = torch.tensor([2.0, 1.0] + [0.0] * 14)
    firsts, n = 0, 400
    for seed in range(n):
        trainer.config = trainer.config.model_copy(update={"resample": ResampleConfig(**EVERY_STEP, seed=seed)})
        trainer.firing.tokens_since_fired_L.zero_()[3] = 100
        input_BD = torch.zeros(16, 5, dtype=torch.float64)
        input_BD[:2, :2] = torch.eye(2)
        resample_if_due(trainer, input_BD, target_BD)
        row_D = case.model.W_enc_LXiDi[3]
        firsts += bool(row_D[0] > row_D[1])
    assert firsts / n == pytest.approx(16 / 17, abs=0.04)  # (4 / 1)^2 to 1


OPTIMIZER_CONFIGS = {
    "adam": {"type": "adam", "lr": 0.01},
    "row-sparse adam": {"type": "adam", "lr": 0.01, "betas": (0.0, 0.999), "row_sparse": True},
    "schedule-free": {"type": "sign_sgd_schedule_free", "lr": 0.01},
}


@pytest.mark.parametrize("optimizer", OPTIMIZER_CONFIGS)
@pytest.mark.parametrize("architecture", ["sae", "compound"])
def test_the_optimizer_forgets_new_rows_alone(architecture, optimizer, make_case):
    from crosscode_kernels import Backend

    backend = Backend("torch", ("rows",)) if optimizer == "row-sparse adam" else "torch"
    case = make_case(architecture, "jumprelu", backend=backend)
    trainer = trainer_of(case, OPTIMIZER_CONFIGS[optimizer])
    kept = {
        (param, key): value.clone()
        for param, state in trainer.optimizer.state.items()
        for key, value in state.items()
        if torch.is_tensor(value)
    }
    resample_if_due(trainer, case.input_BXiDi, case.target_BXoDo)
    n_looked_at, per_part = 0, 24 // len(case.model.parts)
    for p, part in enumerate(case.model.parts):
        rows = [latent - p * per_part for latent in DEAD if latent // per_part == p]
        live = [row for row in range(per_part) if row not in rows]
        for param in (part.W_enc_LXiDi, part.W_dec_LXoDo, part.b_enc_L, part.activation_fn.log_threshold_L):
            for key, value in trainer.optimizer.state[param].items():
                if torch.is_tensor(value) and value.shape == param.shape:
                    anew = param if key == "z" else torch.zeros_like(param)
                    assert torch.equal(value[rows], anew[rows]) and torch.equal(value[live], kept[param, key][live])
                    n_looked_at += 1
    assert n_looked_at >= 4
    if optimizer == "schedule-free":  # the average that is evaluated is the new row, too
        before = case.model.parts[0].W_enc_LXiDi.detach().clone()
        trainer.optimizer_plan.start_evaluation(trainer.optimizer)
        torch.testing.assert_close(case.model.parts[0].W_enc_LXiDi[1].detach(), before[1])


@pytest.mark.parametrize("architecture", ["acausal_shared", "acausal_3x2_partition", "sae"])
def test_constraints_hold_of_new_rows(architecture, make_case):
    case = make_case(architecture, "topk")
    model = case.model
    trainer = trainer_of(case, constraints=[UnitNormDecoder()] if architecture == "sae" else [])
    resample_if_due(trainer, case.input_BXiDi, case.target_BXoDo)
    if architecture == "sae":
        torch.testing.assert_close(model.W_dec_LO.norm(dim=1), torch.ones(24, dtype=torch.float64))
    elif model.partition is not None:
        model.partition.check_clear({"W_enc": model.W_enc_LXiDi, "W_dec": model.W_dec_LXoDo})
    else:
        assert torch.equal(model.W_dec_LXoDo[1, 0], model.W_dec_LXoDo[1, 1])
    assert (model.W_dec_LXoDo[DEAD].flatten(1).norm(dim=1) > 0.1).all()
    h_BL = model.encoder_input(case.input_BXiDi) @ model.W_enc_LI.T + model.b_enc_L  # of the rows as they are now
    torch.testing.assert_close(h_BL.mean(0)[DEAD], torch.zeros(4, dtype=torch.float64))


def test_more_dead_latents_than_tokens_wait(make_case):
    case = make_case("sae", "topk", n_tokens=3)
    trainer = trainer_of(case)
    resample_if_due(trainer, case.input_BXiDi, case.target_BXoDo)
    assert (trainer.firing.tokens_since_fired_L == 100).nonzero().flatten().tolist() == [23]
    trainer.firing.tokens_since_fired_L.fill_(100)  # and where none is live
    resample_if_due(trainer, case.input_BXiDi, case.target_BXoDo)
    assert all(bool(param.isfinite().all()) for param in case.model.parameters())


def test_when_latents_begin_anew():
    def looks(n_steps=400, **fields):
        trainer = SimpleNamespace(
            n_steps=n_steps, config=TrainConfig(n_tokens=10**6, resample=ResampleConfig(**fields))
        )
        found = {}
        for step in range(1, n_steps + 1):
            trainer.step, trainer.tokens = step, 32 * step
            if (dead_after := dead_after_tokens(trainer)) is not None:
                found[step] = dead_after
        return found

    assert looks(every=100) == {100: 1_000_000, 200: 1_000_000}
    assert looks(every=150, until=1.0, dead_after_tokens=7) == {150: 7, 300: 7}
    assert looks(every=100, from_start=True, dead_after_tokens=7) == {
        10: 320, 20: 320, 40: 640, 80: 1280, 100: 7, 200: 7,
    }  # fmt: skip


def test_a_dead_latent_of_a_run_fires_again(make_trainer, rows_of):
    """An encoder bias of -100 is for ever without it."""
    dead = {}
    for resample in (None, {"every": 10, "from_start": True, "dead_after_tokens": 64, "encoder_scale": 1.0}):
        trainer = make_trainer(f"run {resample is None}", n_steps=40, dead_after_tokens=64, resample=resample)
        with torch.no_grad():
            trainer.model.b_enc_L[:12] = -100.0
        trainer.train()
        dead[resample is None] = rows_of(trainer)[-1]["dead_fraction"]
    assert dead[True] >= 0.5 and dead[False] < 0.2
