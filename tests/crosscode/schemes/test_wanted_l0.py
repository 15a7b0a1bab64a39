"""A wanted L0: the step penalty on linear thresholds, and the controller of other penalties.

Axes: B tokens · L latents.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch

from crosscode.config.registry import Component
from crosscode.errors import InputError
from crosscode.objectives import L0Term, L1Term, TanhTerm
from crosscode.trainers.optimizers import OPTIMIZERS


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("pull", ["batch", "token"])
def test_l0_is_its_formula(architecture, pull, backend, make_case, objective, context, dictionary, check):
    case = make_case(architecture, "jumprelu_linear", backend=backend)
    formula = dictionary(case, "jumprelu_linear")
    fields = {"target": 3.0, "weight": 0.2, "pull": pull, "max_firing_share": 0.4, "frequency_weight": 0.3}
    loss = objective({"recon": {}, "pre_act": {"weight": 0.1}, "l0": fields})(context(case), 0, 10)
    expected = formula.recon(formula.latents()) + 0.1 * formula.pre_act()
    check(case, formula, loss, expected + 0.2 * (formula.l0(3.0, pull) + 0.3 * formula.too_frequent(0.4)))


@pytest.mark.parametrize("architecture", ["sae_pre_bias", "compound"])
@pytest.mark.parametrize("activation", ["jumprelu_linear", "relu"])
def test_auxk_revives_latents_of_other_activations_too(
    architecture, activation, make_case, objective, context, dictionary, check
):
    case = make_case(architecture, activation)
    formula = dictionary(case, activation)
    idle_L = torch.zeros(24, dtype=torch.int64)
    idle_L[[1, 5, 9, 17, 22]] = 1000
    loss = objective({"recon": {}, "auxk": {"k_aux": 3, "dead_after_tokens": 1000}})(context(case, idle_L), 3, 10)
    a_S = formula.latents()
    check(case, formula, loss, formula.recon(a_S) + formula.auxk(a_S, idle_L >= 1000, 3) / 32)


@pytest.mark.parametrize("activation", ["jumprelu", "relu", "topk"])
def test_l0_needs_linear_thresholds(activation, make_case):
    with pytest.raises(InputError, match=r"use {type: jumprelu, thresholds: linear}"):
        L0Term(target=4).check_model(make_case("sae", activation).model)
    L0Term(target=4).check_model(make_case("compound", "jumprelu_linear").model)


def test_more_latents_than_there_are_are_refused(make_case):
    with pytest.raises(InputError, match=r"objective.l0.target = 25.0: must not exceed n_latents = 24"):
        L0Term(target=25).check_model(make_case("sae", "jumprelu_linear").model)
    with pytest.raises(InputError, match=r"objective.l1.target_l0 = 25.0: must not exceed n_latents = 24"):
        L1Term(target_l0=25).check_model(make_case("sae", "relu").model)


@pytest.mark.parametrize(
    "weight", [0, {"type": "linear_ramp", "value": 0, "start": 1}, {"type": "warm_up", "value": 0}]
)
@pytest.mark.parametrize(
    ("name", "target", "activation"),
    [("l0", "target", "jumprelu_linear"), ("l1", "target_l0", "relu"), ("tanh", "target_l0", "jumprelu")],
)
def test_a_target_without_a_coefficient_is_refused(name, target, activation, weight, make_case, objective):
    """The trap: it trains to the end, and then advises to train for more steps."""
    model = make_case("sae", activation).model
    with pytest.raises(InputError, match=rf"objective.{name}.weight: 0 at the end of a run"):
        objective({"recon": {}, name: {target: 4, "weight": weight}}).check_model(model)
    objective({"recon": {}, name: {target: 4}}).check_model(model)
    objective({"recon": {}, **({} if name == "l0" else {name: {"weight": weight}})}).check_model(model)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "groupmax"])
@pytest.mark.parametrize(("architecture", "options", "times"), [("sae", {}, 1), ("compound", {}, 3)])
def test_more_latents_than_an_activation_keeps_are_refused(activation, architecture, options, times, make_case):
    model = make_case(architecture, activation, **options).model
    most = model.activation_fns[0].k * times
    L1Term(target_l0=most).check_model(model)
    with pytest.raises(InputError, match=rf"'{activation}' keeps at most {most} latents of a token"):
        L1Term(target_l0=most + 0.5).check_model(model)


def test_all_layers_together_keep_k(make_case):
    model = make_case("compound", "topk", topk_scope="all_layers").model
    with pytest.raises(InputError, match=rf"keeps at most {model.activation_fns[0].k} latents of a token"):
        L1Term(target_l0=model.activation_fns[0].k + 1).check_model(model)


@pytest.mark.parametrize(("thresholds", "follows"), [("linear", False), ("log", True)])
def test_adam_moves_a_log_threshold_by_a_share_of_it_and_a_linear_one_freely(thresholds, follows, make_case):
    """The trap: with `exp t` a small threshold hardly rises, whatever the coefficient of the penalty."""
    moved = {}
    for theta in (0.01, 1.0):
        activation = {"type": "jumprelu", "thresholds": thresholds, "bandwidth": 10.0}
        model = make_case("sae", activation).model
        fn = model.activation_fn
        fn.set_thresholds_(torch.full((24,), theta, dtype=torch.float64))
        optimizer = torch.optim.Adam(fn.parameters(), lr=0.05)
        h_BL = torch.linspace(-1, 2, 24, dtype=torch.float64).expand(8, 24)
        counts = torch.relu(h_BL)  # a stand-in: only their pre-activations matter here
        from crosscode_kernels.sparse import DenseLatents

        l0 = model.ops.step_l0(DenseLatents(counts, h_BL), fn.log_thresholds_L(), 10.0).l0_B.mean()
        (1000 * l0).backward()
        optimizer.step()
        moved[theta] = float((fn.cutoffs_L() - theta).mean())
    assert moved[1.0] == pytest.approx(0.05, rel=0.05)
    assert moved[0.01] == pytest.approx(0.0005 if follows else 0.05, rel=0.05)


def test_linear_thresholds_stay_positive(make_case):
    model = make_case("sae", "jumprelu_linear").model
    fn = model.activation_fn
    with torch.no_grad():
        fn.threshold_L.fill_(-1.0)
    assert (fn.cutoffs_L() > 0).all()
    model.before_step(0, 10)
    (fn.log_thresholds_L().sum()).backward()
    assert (fn.threshold_L > 0).all() and (fn.threshold_L.grad > 0).all()


@pytest.mark.parametrize(
    ("factor", "n_steps", "step", "expected"),
    [
        (None, 100, 50, 0.03),
        (None, 100, 99, 0.03),
        (None, 10_000, 5000, 0.01),
        (0.5, 100, 50, 0.005),
        (0.5, 100, 99, 0.00025),
    ],
)
def test_linear_thresholds_can_travel_within_a_run_and_to_its_end(factor, n_steps, step, expected, make_case):
    """The trap: where their rate decays with the weights', L0 ends where the last steps of the weights leave it."""
    plan = OPTIMIZERS.build(Component(type="adam", lr=0.01, threshold_lr_factor=factor))
    optimizer = plan.build(make_case("sae", "jumprelu_linear").model)
    plan.set_learning_rate(optimizer, step, n_steps)
    of_weights = 0.01 if step < 0.8 * n_steps else 0.01 / 20
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(of_weights), pytest.approx(expected)]


SCHEMES = {
    "l0": ({"type": "jumprelu", "thresholds": "linear"}, {"l0": {"target": 3.0}}, 400),
    "l1": ({"type": "relu"}, {"l1": {"target_l0": 3.0, "weight": 1.0}}, 500),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_reaches_the_l0_that_it_was_told(scheme, make_trainer, rows_of, caplog):
    activation, terms, n_steps = SCHEMES[scheme]
    trainer = make_trainer(
        n_steps=n_steps,
        activation=activation,
        objective={"recon": {}, **terms},
        optimizer={"type": "adam", "lr": 5e-3},
    )
    with caplog.at_level(logging.WARNING, logger="crosscode"):
        trainer.train()
    rows = rows_of(trainer)
    mean = sum(row["l0"] for row in rows[-50:]) / 50
    assert mean == pytest.approx(3.0, rel=0.1)
    assert abs(rows[0]["l0"] - 3.0) > 1 and "the run ended" not in caplog.text
    assert (f"factor/{scheme}" in rows[-1]) == (scheme != "l0")


@pytest.mark.parametrize(("name", "activation"), [("l1", "relu"), ("tanh", "jumprelu")])
def test_the_controller_is_its_formula(name, activation, make_case, objective, context):
    case = make_case("sae", activation)
    plain, steered = (objective({name: {"weight": 2.0, "target_l0": target}}) for target in (None, 4.0))
    assert plain.state_dict() == plain.figures() == {}
    steered.check_model(case.model)
    one_way, integral, recent = name == "tanh", 0.0, math.log(400.0)
    for step, l0 in enumerate((400.0, 8.0, 5.0, 3.0, 0.1, 3.9, 20.0, 4.1)):
        for terms in (plain, steered):
            terms.after_step(torch.tensor(l0), step, 10)
        error, pace = math.log(l0 / 4.0), (math.log(l0) - recent) / 30
        recent += pace
        side, most = math.copysign(1, error), min(abs(error), 1)
        least = -most if one_way and most > 0.3 else 0
        left = side * max(min(side * (error + pace * max(7.5 - step, 0)), most), least)
        integral += 0.9375 / 70.4 * left * (4 if one_way and integral < 0 < left else 1)
        factor = math.exp(integral + 0.9375 * min(max(error, -0.3), 0.3))
        assert steered.figures() == {f"factor/{name}": pytest.approx(factor, rel=1e-4)}
        expected = factor * plain(context(case), 0, 10).total.item()
        assert steered(context(case), 0, 10).total.item() == pytest.approx(expected, rel=1e-4)


def integrals(objective, l0_of_steps, n_steps=1000, first=0, weight=2.0, name="l1", model=None):
    terms = objective({name: {"weight": weight, "target_l0": 4.0}})
    if model is not None:
        terms.check_model(model)
    for step, l0 in enumerate(l0_of_steps, first):
        terms.after_step(torch.tensor(l0), step, n_steps)
        yield terms.state_dict()[name]["log_factors"][0].item()


def test_the_integral_waits_for_an_l0_that_is_on_its_way_and_has_a_limit(objective):
    """The trap: one that winds up meanwhile drives L0 far below its target."""
    falling = [40 * math.exp(-0.005 * step) for step in range(300)]  # there at step 460
    *_, at_half, at_end = integrals(objective, falling)
    assert at_end == at_half < 0.3 and falling[-1] > 2 * 4.0
    stuck = [*integrals(objective, [40.0] * 500)]
    assert stuck[9] == pytest.approx(10 * 0.9375 / 70.4, rel=1e-3) and stuck[-1] == 3.0
    assert [*integrals(objective, [0.0] * 500)][-1] == -3.0


def test_the_integral_hardly_grows_while_the_coefficient_rises_by_itself(objective):
    ramp = {"type": "linear_ramp", "value": 2.0, "ramp_steps": 5}
    first = [next(integrals(objective, [l0], first=step, weight=ramp)) for step in (4, 5) for l0 in (400.0, 0.1)]
    rate = 0.9375 / 70.4
    assert first == pytest.approx([0.1 * rate, -rate, rate, -rate], rel=1e-3)


def test_a_penalty_eases_early_where_thresholds_learn_and_comes_back(objective, make_case):
    model, rate = make_case("sae", "jumprelu").model, 0.9375 / 70.4
    falling = [40 * math.exp(-0.005 * step) for step in range(440)]  # there at step 460
    eased = [*integrals(objective, falling + [8.0] * 60, name="tanh", model=model)]
    near = next(step for step, l0 in enumerate(falling) if math.log(l0 / 4) < 0.3)
    assert eased[near - 1] < -2 and eased[439] == eased[near] < -2
    assert eased[-1] - eased[-2] == pytest.approx(4 * rate * math.log(2), rel=0.01)


def test_noise_does_not_ease_a_penalty_in_a_long_run(objective, make_case):
    """The trap: a pace over a fixed number of steps, times what is left of a long run, is noise."""
    noise, model = torch.randn(4000, generator=torch.Generator().manual_seed(0)), make_case("sae", "jumprelu").model
    stuck = (6 * (0.03 * noise).exp()).tolist()
    assert [*integrals(objective, stuck, n_steps=20_000, name="tanh", model=model)][-1] == 3.0


def test_what_hardly_comes_back_is_not_driven_too_far(objective, make_case):
    """On a course like that of the demo pair: without the penalty L0 ends at 25, and what the penalty takes away stays away."""
    terms = objective(
        {"tanh": {"weight": {"type": "linear_ramp", "value": 0.5, "ramp_fraction": 0.7}, "target_l0": 24.0}}
    )
    terms.check_model(make_case("sae", "jumprelu").model)

    def ended(factor):
        lost = 0.0
        for step in range(488):
            l0 = (18.9 + 3000 / (step + 8)) * math.exp(-lost)
            lost += 8e-4 * min(step / 342, 1) * factor(l0, step)
        return l0

    def steered(l0, step):
        terms.after_step(torch.tensor(l0), step, 488)
        return terms.figures()["factor/tanh"]

    assert ended(lambda l0, step: 0.0) == pytest.approx(25, rel=0.01) and ended(lambda l0, step: 1.0) < 20
    assert ended(steered) == pytest.approx(24, rel=0.05)


def test_the_loop_settles_where_one_of_a_gain_of_three_swings(objective):
    """On the plant that the gains are of: L0 falls in proportion to the coefficient's logarithm, behind Adam's memory of 10 steps
    and a delay, such that a proportional loop of gain 3 has a period of 32 steps and neither grows nor dies out."""
    n_steps, delay, turn = 1200, 2, 2 * math.pi / 32
    lag = math.tan(math.pi / 2 - turn * delay) / turn
    speed = turn * math.hypot(1, turn * lag) / 3

    def l0_with(control):
        log_l0, velocity, waiting, seen = math.log(8.0), 0.0, [0.0] * delay, []
        for step in range(n_steps):
            seen.append(math.exp(log_l0))
            waiting.append(control(seen[-1], step))
            velocity += (-speed * waiting.pop(0) - velocity) / lag
            log_l0 += velocity
        return seen

    terms = objective({"l1": {"weight": 2.0, "target_l0": 4.0}})

    def steered(l0, step):
        terms.after_step(torch.tensor(l0), step, n_steps)
        return math.log(terms.figures()["factor/l1"]) - 0.5  # what holds L0 is another coefficient

    swinging = l0_with(lambda l0, step: 3 * math.log(l0 / 4.0))
    assert max(swinging[-64:]) / min(swinging[-64:]) > 1.5
    assert l0_with(steered)[-200:] == pytest.approx([4.0] * 200, rel=0.02)


@pytest.mark.parametrize("term", [L0Term(target=10), L1Term(target_l0=10), TanhTerm(target_l0=10)])
def test_a_run_far_off_says_so(term):
    assert term.missed(12.9) is None and term.missed(7.1) is None
    assert "the run ended with L0 13.1, 31% above it" in term.missed(13.1)
    assert "L0 6.0, 40% below it" in term.missed(6.0)
    assert L1Term().missed(10_000) is None


@pytest.mark.parametrize(
    ("l0", "said"),
    [
        (30.0, "largest (20): give a larger weight"),
        (1e-3, "least (0.05): a smaller weight lowers L0 less, none raises it"),
    ],
)
def test_a_factor_at_its_limit_is_named_where_the_l0_is_missed(l0, said):
    term = L1Term(target_l0=10)
    for step in range(2000):
        term.after_step(torch.tensor(l0), step, 2000)
    assert f"the factor on its weight is at its {said}" in term.missed(l0)
    assert term.missed(10.5) is None
    assert "train for more steps" in term.missed(100 / l0)  # on the other side, where the limit is not to blame


def test_the_trainer_passes_it_on(make_trainer, caplog):
    activation, terms, _ = SCHEMES["l1"]
    trainer = make_trainer(n_steps=2, activation=activation, objective={"recon": {}, **terms})
    with caplog.at_level(logging.WARNING, logger="crosscode"):
        trainer.train()
    assert "objective.l1.target_l0 = 3: the run ended with L0" in caplog.text
