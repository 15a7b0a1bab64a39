"""What holds for every architecture with every activation.

Axes: B tokens · Xi/Xo input/output crosscoding dims · Di/Do widths · L latents.
"""

from __future__ import annotations

import pytest
import torch

from crosscode.errors import InputError
from crosscode.models import ARCHITECTURES, BaseCrosscoder
from crosscode.models.checkpoint import model_config


def train_a_little(case):
    """Two steps' worth of running statistics, so that eval mode is defined."""
    for _ in range(2):
        case.model.after_step(case.model.forward_train(case.input_BXiDi).latents)
    return case


def scalings(model: BaseCrosscoder):
    generator = torch.Generator().manual_seed(7)
    s_in = torch.rand(model.in_dims, generator=generator, dtype=torch.float64) * 3 + 0.2
    s_out = torch.rand(model.out_dims, generator=generator, dtype=torch.float64) * 3 + 0.2
    return s_in, (s_in if model.use_pre_bias else s_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_equals_the_saved_one_to_the_bit(architecture, activation, dtype, make_case, tmp_path):
    case = train_a_little(make_case(architecture, activation, dtype=dtype))
    model = case.model.eval()
    model.save(tmp_path / "model", {"hookpoints": ["blocks.0"]})
    loaded = BaseCrosscoder.load(tmp_path / "model", backend="torch")
    assert type(loaded) is type(model) and not loaded.training
    assert model_config(loaded) == model_config(model)
    saved_state, loaded_state = model.state_dict(), loaded.state_dict()
    assert saved_state.keys() == loaded_state.keys()
    for name, tensor in saved_state.items():
        assert tensor.dtype == loaded_state[name].dtype and torch.equal(tensor, loaded_state[name]), name
    assert torch.equal(model(case.input_BXiDi), loaded(case.input_BXiDi))


def test_folding_changes_neither_latents_nor_the_function(architecture, activation, make_case, tmp_path):
    case = train_a_little(make_case(architecture, activation))
    scaling_in_Xi, scaling_out_Xo = scalings(case.model)
    raw_BXiDi = case.input_BXiDi / scaling_in_Xi[..., None]
    folded = case.model.with_folded_scaling_factors(scaling_in_Xi, scaling_out_Xo)
    folded.save(tmp_path / "folded")
    reloaded = BaseCrosscoder.load(tmp_path / "folded", backend="torch")
    for training in (True, False):
        case.model.train(training)
        expected = case.model.forward_train(case.input_BXiDi)
        for candidate in (folded, reloaded):
            candidate.train(training)
            result = candidate.forward_train(raw_BXiDi)
            torch.testing.assert_close(result.latents.to_dense(), expected.latents.to_dense(), rtol=1e-10, atol=1e-10)
            unscaled_BXoDo = expected.output_BXoDo / scaling_out_Xo[..., None]
            torch.testing.assert_close(result.output_BXoDo, unscaled_BXoDo, rtol=1e-10, atol=1e-10)
    assert torch.equal(folded.eval()(raw_BXiDi), reloaded(raw_BXiDi))
    assert folded.is_folded and reloaded.is_folded and not case.model.is_folded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_eval_mode_one_token_does_not_depend_on_the_others(architecture, activation, dtype, make_case):
    """The batch is the one that set a BatchTopK's threshold, so that one of its values lies exactly there."""
    case = train_a_little(make_case(architecture, activation, dtype=dtype, n_tokens=13, seed=3))
    model = case.model.eval()
    together_BXoDo = model(case.input_BXiDi)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    alone_BXoDo = torch.cat([model(x_XiDi[None]) for x_XiDi in case.input_BXiDi])
    torch.testing.assert_close(alone_BXoDo, together_BXoDo, rtol=tolerance, atol=tolerance)
    among_large = torch.cat([case.input_BXiDi[:1], 100 * case.input_BXiDi])
    torch.testing.assert_close(model(among_large)[:1], together_BXoDo[:1], rtol=tolerance, atol=tolerance)


def test_backends_agree_in_outputs_and_all_gradients(architecture, activation, make_case):
    results = []
    for backend in ("reference", "torch"):
        case = make_case(architecture, activation, backend=backend)
        result = case.model.forward_train(case.input_BXiDi)
        loss = (result.output_BXoDo - case.target_BXoDo).square().sum() + result.latents.to_dense().sum()
        loss.backward()
        grads = {name: param.grad for name, param in case.model.named_parameters()}
        results.append((result, grads))
    (reference, reference_grads), (torch_, torch_grads) = results
    torch.testing.assert_close(torch_.output_BXoDo, reference.output_BXoDo, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch_.latents.to_dense(), reference.latents.to_dense(), rtol=1e-10, atol=1e-10)
    for name, grad in reference_grads.items():
        torch.testing.assert_close(torch_grads[name], grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_decode_of_given_latents_equals_the_forward_pass(architecture, activation, make_case):
    case = make_case(architecture, activation)
    result = case.model.forward_train(case.input_BXiDi)
    for latents in (result.latents, result.latents.to_dense()):
        torch.testing.assert_close(case.model.decode(latents, case.input_BXiDi), result.output_BXoDo)


def test_latents_are_never_negative(architecture, activation, make_case):
    case = make_case(architecture, activation)
    assert bool((case.model.encode(case.input_BXiDi) >= 0).all())


def test_a_clone_is_independent(architecture, make_case):
    case = make_case(architecture)
    clone = case.model.clone()
    before = {name: param.clone() for name, param in case.model.named_parameters()}
    with torch.no_grad():
        for param in clone.parameters():
            param.add_(1.0)
    assert all(torch.equal(param, before[name]) for name, param in case.model.named_parameters())


def test_decoder_norms_fold_into_the_encoder_where_the_activation_allows_it(architecture, activation, make_case):
    case = train_a_little(make_case(architecture, activation))
    rescalable = activation in ("relu", "jumprelu", "jumprelu_gdm", "jumprelu_linear", "batch_topk_by_norm")
    folded = case.model.clone()
    if not rescalable:
        with pytest.raises(InputError, match="cannot be folded into the encoder"):
            folded.fold_decoder_norms_into_encoder_()
        return
    folded.fold_decoder_norms_into_encoder_()
    torch.testing.assert_close(folded.decoder_norms().n_L, torch.ones(folded.n_latents, dtype=torch.float64))
    n_L = case.model.decoder_norms().n_L
    for training in (True, False):
        case.model.train(training)
        folded.train(training)
        expected, result = case.model.forward_train(case.input_BXiDi), folded.forward_train(case.input_BXiDi)
        torch.testing.assert_close(result.output_BXoDo, expected.output_BXoDo, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.latents.to_dense(), expected.latents.to_dense() * n_L, rtol=1e-9, atol=1e-9)


def test_folding_twice_is_an_error(architecture, make_case):
    model = make_case(architecture).model
    model.fold_activation_scaling_into_weights_(*scalings(model))
    with pytest.raises(InputError, match="folded in already"):
        model.fold_activation_scaling_into_weights_(*scalings(model))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scaling_factors_must_be_positive_and_finite(bad, architecture, make_case):
    model = make_case(architecture).model
    s_in, s_out = scalings(model)
    with pytest.raises(InputError, match="must be positive and finite"):
        model.fold_activation_scaling_into_weights_(torch.full_like(s_in, bad), s_out)
    assert not model.is_folded


def test_scaling_of_a_wrong_shape_is_refused(architecture, make_case):
    model = make_case(architecture).model
    s_in, s_out = scalings(model)
    with pytest.raises(InputError, match=r"scaling_in_Xi: expected shape"):
        model.fold_activation_scaling_into_weights_(torch.ones(*s_in.shape, 2), s_out)


def test_inputs_of_a_wrong_shape_are_refused_at_the_door(architecture, make_case):
    case = make_case(architecture)
    with pytest.raises(InputError, match=r"input: expected shape \(B, .*got"):
        case.model(case.input_BXiDi[..., :-1])
    with pytest.raises(InputError, match="expected 24 latents, got 3"):
        case.model.decode(torch.zeros(2, 3))


def test_an_empty_batch_is_legal(architecture, activation, make_case):
    case = train_a_little(make_case(architecture, activation))
    assert case.model(case.input_BXiDi[:0]).shape == (0, *case.model.out_dims, case.model.d_out)


def test_parameter_groups_hold_each_parameter_once(architecture, activation, make_case):
    model = make_case(architecture, activation).model
    groups = model.parameter_groups()
    ids = [id(param) for params in groups.values() for param in params]
    assert sorted(ids) == sorted(id(param) for param in model.parameters())
    assert bool(groups["thresholds"]) == activation.startswith("jumprelu")


def test_the_matrix_covers_every_registered_architecture():
    kinds = {
        "sae_or_transcoder",
        "model_hookpoint_acausal",
        "cross_layer_transcoder",
        "compound_cross_layer_transcoder",
    }
    assert {ARCHITECTURES[name].kind for name in ARCHITECTURES} == kinds


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_accelerator_gives_what_the_cpu_gives(architecture, activation, backend, make_case):
    case = train_a_little(make_case(architecture, activation, dtype=torch.float32, backend=backend))
    on_device = case.model.clone().to("cuda")
    for training in (True, False):
        case.model.train(training)
        on_device.train(training)
        expected = case.model.forward_train(case.input_BXiDi)
        result = on_device.forward_train(case.input_BXiDi.cuda())
        torch.testing.assert_close(result.output_BXoDo.cpu(), expected.output_BXoDo, rtol=1e-3, atol=1e-3)
