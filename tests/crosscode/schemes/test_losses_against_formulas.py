"""Every term's loss and all its gradients, against the formulas of the literature written out in float64 (conftest.py).

Axes: L latents · S source layers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

ALL_ARCHITECTURES = [
    "sae", "sae_pre_bias", "sae_without_biases", "skip_transcoder", "acausal_2x1", "acausal_3x2",
    "acausal_3x2_partition", "cross_layer", "cross_layer_skip", "compound", "compound_skip_later_only",
]  # fmt: skip
BACKENDS = ["torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_l1(architecture, backend, make_case, objective, context, dictionary, check):
    case = make_case(architecture, "relu", backend=backend)
    formula = dictionary(case, "relu")
    a_S = formula.latents()
    for step, weight in ((0, 0.0), (250, 0.5), (1000, 2.0), (5000, 2.0)):
        ramp = {"type": "linear_ramp", "value": 2.0, "ramp_steps": 1000}
        loss = objective({"recon": {}, "l1": {"weight": ramp}})(context(case), step, 10_000)
        assert loss.weights == {"recon": 1.0, "l1": pytest.approx(weight)}
        case.model.zero_grad()
        check(case, formula, loss, formula.recon(a_S) + weight * formula.l1(a_S))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["sum", "joint"])
@pytest.mark.parametrize("architecture", ["acausal_3x2", "cross_layer_skip", "compound_skip_later_only"])
def test_every_use_of_decoder_norms_with_either_norm(
    architecture, mode, backend, make_case, objective, context, dictionary, check
):
    case = make_case(architecture, "relu", backend=backend, decoder_norm=mode)
    formula = dictionary(case, "relu")
    loss = objective({"recon": {}, "l1": {"weight": 0.7}})(context(case), 0, 10)
    check(case, formula, loss, formula.recon(formula.latents()) + 0.7 * formula.l1(formula.latents()))
    case = make_case(architecture, "jumprelu", backend=backend, decoder_norm=mode)
    formula = dictionary(case, "jumprelu")
    a_S = formula.latents()
    loss = objective({"recon": {}, "tanh": {"weight": 0.7}, "pre_act": {"weight": 0.2}})(context(case), 0, 10)
    check(case, formula, loss, formula.recon(a_S) + 0.7 * formula.tanh(a_S) + 0.2 * formula.pre_act())
    case = make_case(architecture, "batch_topk_by_norm", backend=backend, decoder_norm=mode)
    formula = dictionary(case, "batch_topk_by_norm")
    check(case, formula, objective({"recon": {}})(context(case), 0, 10), formula.recon(formula.latents()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "groupmax", "jumprelu", "relu"])
@pytest.mark.parametrize(
    ("architecture", "reference"), [("acausal_2x1", 0), ("acausal_3x2", 1), ("acausal_partition", 1)]
)
def test_delta(architecture, reference, activation, backend, make_case, objective, context, dictionary, check):
    case = make_case(architecture, activation, backend=backend)
    formula = dictionary(case, activation)
    loss = objective({"recon": {}, "delta": {"weight": 3.0, "reference": reference}})(context(case), 0, 10)
    a_S = formula.latents()
    check(case, formula, loss, formula.recon(a_S) + 3 * formula.delta(a_S, reference))


def test_coefficients_follow_their_schedules(make_case, objective, context, dictionary, check):
    case = make_case("acausal_2x1", "jumprelu")
    config = {
        "recon": {"weight": {"type": "linear_ramp", "value": 1.0, "start": 0.5, "ramp_fraction": 0.5}},
        "tanh": {"weight": {"type": "warm_up", "value": 3.0, "wait_fraction": 0.1, "warmup_fraction": 0.4}, "c": 2.0},
        "pre_act": {"weight": {"type": "constant", "value": 0.01}},
    }
    formula = dictionary(case, "jumprelu")
    a_S = formula.latents()
    for step, recon, tanh in ((0, 0.5, 0.0), (10, 0.6, 0.0), (30, 0.8, 1.5), (50, 1.0, 3.0), (99, 1.0, 3.0)):
        loss = objective(config)(context(case), step, 100)
        assert loss.weights == {"recon": pytest.approx(recon), "tanh": pytest.approx(tanh), "pre_act": 0.01}
        case.model.zero_grad()
        expected = recon * formula.recon(a_S) + tanh * formula.tanh(a_S, c=2.0) + 0.01 * formula.pre_act()
        check(case, formula, loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "batch_topk_by_norm"])
def test_a_compound_model_that_selects_over_all_layers(
    activation, backend, make_case, objective, context, dictionary, check
):
    case = make_case("compound", activation, backend=backend, topk_scope="all_layers")
    formula = dictionary(case, activation)
    idle_L = torch.zeros(24, dtype=torch.int64)
    idle_L[[0, 9, 10, 20, 23]] = 1000
    config = {"recon": {}, "auxk": {"k_aux": 3, "dead_after_tokens": 1000}, "multi_topk": {"factor": 3}}
    loss = objective(config)(context(case, idle_L), 3, 10)
    few, many = formula.latents(), formula.latents(k=12)
    auxk = formula.auxk(few, idle_L >= 1000, 3) / 32
    check(case, formula, loss, formula.recon(few) + auxk + formula.recon(many) / 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "batch_topk_by_norm", "groupmax"])
def test_topk_styles_with_auxk(architecture, activation, backend, make_case, objective, context, dictionary, check):
    case = make_case(architecture, activation, backend=backend)
    formula = dictionary(case, activation)
    idle_L = torch.zeros(24, dtype=torch.int64)
    idle_L[[1, 5, 6, 9, 13, 17, 22]] = 1000
    idle_L[3] = 999
    loss = objective({"recon": {}, "auxk": {"k_aux": 5, "dead_after_tokens": 1000}})(context(case, idle_L), 3, 10)
    assert loss.weights["auxk"] == 1 / 32
    a_S = formula.latents()
    check(case, formula, loss, formula.recon(a_S) + formula.auxk(a_S, idle_L >= 1000, 5) / 32)


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_auxk_makes_no_pass_while_nothing_is_dead(architecture, make_case, objective, context, monkeypatch):
    """Whether or not that is known beforehand."""
    case = make_case(architecture, "topk", backend="torch")
    monkeypatch.setattr(case.model, "dead_recon_loss", None)
    of_step = context(case, torch.full((24,), 9))
    terms = objective({"auxk": {"k_aux": 5, "dead_after_tokens": 10}})
    for silence in (None, 9, 10):
        value = terms.values(replace(of_step, longest_silence=silence))["auxk"]
        assert value == 0 and not value.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_dead", [0, 1, 3])
def test_auxk_with_fewer_dead_latents_than_it_may_take(
    n_dead, backend, make_case, objective, context, dictionary, check
):
    case = make_case("acausal_2x1", "topk", backend=backend)
    formula = dictionary(case, "topk")
    idle_L = torch.zeros(24, dtype=torch.int64)
    idle_L[:n_dead] = 10
    loss = objective({"recon": {}, "auxk": {"k_aux": 4, "dead_after_tokens": 10}})(context(case, idle_L), 0, 10)
    a_S = formula.latents()
    check(case, formula, loss, formula.recon(a_S) + formula.auxk(a_S, idle_L >= 10, 4) / 32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "batch_topk_by_norm"])
@pytest.mark.parametrize("architecture", ["sae_pre_bias", "acausal_2x1", "cross_layer_skip", "compound"])
def test_multi_topk(architecture, activation, backend, make_case, objective, context, dictionary, check):
    rank = {"rank_by": "decoder_norm_weighted"} if activation.endswith("by_norm") else {}
    case = make_case(architecture, {"type": activation.removesuffix("_by_norm"), "k": 2, **rank}, backend=backend)
    formula = dictionary(case, activation)
    loss = objective({"recon": {}, "multi_topk": {}})(context(case), 0, 10)
    few, many = formula.latents(k=2), formula.latents(k=8)
    check(case, formula, loss, formula.recon(few) + formula.recon(many) / 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
@pytest.mark.parametrize("activation", ["jumprelu", "jumprelu_gdm"])
def test_jan_update(architecture, activation, backend, make_case, objective, context, dictionary, check):
    case = make_case(architecture, activation, backend=backend)
    formula = dictionary(case, activation)
    ramp = {"type": "linear_ramp", "value": 12.0}
    config = {"recon": {}, "tanh": {"weight": ramp, "c": 3.0}, "pre_act": {"weight": 0.05}}
    a_S = formula.latents()
    for step, weight in ((0, 0.0), (40, 4.8), (100, 12.0)):
        loss = objective(config)(context(case), step, 100)
        case.model.zero_grad()
        assert loss.weights == {"recon": 1.0, "tanh": pytest.approx(weight), "pre_act": 0.05}
        expected = formula.recon(a_S) + weight * formula.tanh(a_S, c=3.0) + 0.05 * formula.pre_act()
        check(case, formula, loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_feb_update_penalises_shared_and_exclusive_latents_differently(
    backend, make_case, objective, context, dictionary, check
):
    case = make_case("acausal_shared", "jumprelu", backend=backend)
    formula = dictionary(case, "jumprelu")
    assert case.model.n_shared_latents == 6
    config = {
        "recon": {},
        "tanh": {"weight": 2.0, "shared_ratio": 0.15},
        "pre_act": {"weight": 0.1, "shared_ratio": 0.15},
    }
    loss = objective(config)(context(case), 0, 10)
    a_S = formula.latents()
    expected = formula.recon(a_S) + 2.0 * formula.tanh(a_S, 0.15) + 0.1 * formula.pre_act(0.15)
    check(case, formula, loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_feb_update_with_l1(backend, make_case, objective, context, dictionary, check):
    case = make_case("acausal_shared", "relu", backend=backend)
    formula = dictionary(case, "relu")
    loss = objective({"recon": {}, "l1": {"weight": 2.0, "shared_ratio": 0.1}})(context(case), 0, 10)
    a_S = formula.latents()
    check(case, formula, loss, formula.recon(a_S) + 2.0 * formula.l1(a_S, 0.1))


def test_the_total_is_the_weighted_sum_of_the_logged_parts(make_case, objective, context):
    case = make_case("acausal_2x1", "jumprelu")
    config = {"recon": {"weight": 0.5}, "tanh": {"weight": 3.0}, "pre_act": {"weight": 0.1}}
    loss = objective(config)(context(case), 0, 10)
    assert set(loss.parts) == set(loss.weights) == {"recon", "tanh", "pre_act"}
    total = sum(loss.weights[name] * part for name, part in loss.parts.items())
    torch.testing.assert_close(loss.total.detach(), total)
    assert not any(part.requires_grad for part in loss.parts.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["sae_pre_bias", "acausal_2x1", "compound"])
def test_the_share_of_auxk_is_exact_where_no_float_is(
    architecture, backend, make_case, objective, context, dictionary, check
):
    """1 dead latent of 3 that may be taken: 1/3 rounded to float32 would be off by 1e-8."""
    case = make_case(architecture, "topk", backend=backend)
    formula = dictionary(case, "topk")
    idle_L = torch.zeros(24, dtype=torch.int64)
    idle_L[int(formula.latents()[0].detach().sum(0).argmin())] = 10
    loss = objective({"recon": {}, "auxk": {"k_aux": 3, "dead_after_tokens": 10, "weight": 7.0}})(
        context(case, idle_L), 0, 10
    )
    a_S = formula.latents()
    expected = formula.auxk(a_S, idle_L >= 10, 3)
    torch.testing.assert_close(loss.parts["auxk"], expected.detach(), rtol=1e-13, atol=0)
    check(case, formula, loss, formula.recon(a_S) + 7 * expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["sae_pre_bias", "acausal_3x2", "compound_skip_later_only"])
def test_both_terms_normalised_as_gao_et_al(architecture, backend, make_case, objective, context, dictionary, check):
    case = make_case(architecture, "topk", backend=backend)
    formula = dictionary(case, "topk")
    idle_L = torch.zeros(24, dtype=torch.int64)
    idle_L[[1, 5, 17]] = 10
    config = {
        "recon": {"normalise": True},
        "auxk": {"k_aux": 5, "dead_after_tokens": 10},
        "multi_topk": {"factor": 2, "normalise": True},
    }
    loss = objective(config)(context(case, idle_L), 0, 10)
    few, many = formula.latents(), formula.latents(k=8)
    auxk = formula.auxk(few, idle_L >= 10, 5) / 32
    check(case, formula, loss, formula.normalised_recon(few) + auxk + formula.normalised_recon(many) / 8)


def test_a_target_without_variance_gives_a_normalised_loss_of_0(make_case, objective, context):
    case = make_case("sae", "topk")
    case = replace(case, input_BXiDi=torch.ones_like(case.input_BXiDi), target_BXoDo=torch.ones_like(case.target_BXoDo))
    loss = objective({"recon": {"normalise": True}})(context(case), 0, 10)
    loss.total.backward()
    assert loss.total == 0 and all(bool(p.grad.isfinite().all()) for p in case.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("mode", ["sum", "joint"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_penalties_count_the_vector_of_a_shared_latent_once(activation, mode, make_case, objective, context):
    """A shared and an exclusive latent with the same activations and one vector each: `shared_ratio` is their ratio."""
    penalties = {"l1": {}} if activation == "relu" else {"tanh": {"c": 1e-4}, "pre_act": {}}
    for name, options in penalties.items():
        sizes = []
        for latent in (0, 23):
            case = make_case("acausal_shared", activation, decoder_norm=mode)
            with torch.no_grad():
                vector_D = case.model.W_dec_LXoDo[0, 0, 0].clone()
                case.model.W_dec_LXoDo.zero_()
                case.model.W_dec_LXoDo[latent, : 2 if latent == 0 else 1] = vector_D
                for param in (case.model.W_enc_LXiDi, case.model.b_enc_L, *case.model.activation_fn.parameters()):
                    param[:] = param[:1].clone()
            term = objective({name: {"weight": 1.0, "shared_ratio": 0.2} | options})
            sizes.append(term(context(case), 0, 10).total.item())
        assert sizes[0] / sizes[1] == pytest.approx(0.2, rel=1e-6)
