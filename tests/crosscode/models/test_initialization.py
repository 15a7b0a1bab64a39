"""Each initialisation against its definition.

Axes: T tokens · Xi/Xo input/output crosscoding dims · Di/Do widths · L latents.
"""

from __future__ import annotations

import math

import pytest
import torch

from crosscode.errors import InputError
from crosscode.models import (
    INITIALIZATIONS,
    AnthropicSTEJumpReLUActivation,
    AnthropicTransposeInit,
    AnthropicTransposeInitCrossLayerTC,
    CompoundCrossLayerTranscoder,
    CompoundUniformInit,
    CrossLayerTranscoder,
    IdenticalLatentsInit,
    JanUpdateInit,
    JanUpdateNoEncoderBiasInit,
    ModelHookpointAcausalCrosscoder,
    OrthogonalSkipInit,
    SAEOrTranscoder,
    TopkActivation,
    ZeroDecSkipInit,
)
from crosscode.models.initialization import calibration

L = 96


def jumprelu(n_latents=L):
    return AnthropicSTEJumpReLUActivation(n_latents)


def samples_for(model, n_tokens=2000, batch=300):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn((n_tokens, *model.in_dims, model.d_in), generator=generator, dtype=model.dtype) * 2 + 0.3
    y = torch.randn((n_tokens, *model.out_dims, model.d_out), generator=generator, dtype=model.dtype) - 0.7
    return x, y, lambda: zip(x.split(batch), y.split(batch), strict=True)


def poisoned(model):
    """A strategy must fill every parameter: uninitialised memory shows as NaN."""
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(float("nan"))
        for activation in model.activation_fns:
            for param in activation.parameters():
                param.fill_(0.1)
    return model


def test_anthropic_transpose():
    model = poisoned(ModelHookpointAcausalCrosscoder(2, 3, 8, L, TopkActivation(4, L)))
    model.init_weights(AnthropicTransposeInit(dec_init_norm=0.08), seed=1)
    torch.testing.assert_close(model.norms_LMP(), torch.full((L, 2, 3), 0.08))
    assert torch.equal(model.W_enc_LXiDi, model.W_dec_LXoDo)
    assert not model.b_enc_L.any() and not model.b_dec_XoDo.any()
    directions = model.W_dec_LXoDo / 0.08
    assert (directions[0, 0, 0] @ directions[0, 1, 0]).abs() < 0.99, "each position has a direction of its own"


@pytest.mark.parametrize("linear_skip", [False, True])
def test_anthropic_transpose_for_cross_layer_transcoders(linear_skip):
    model = poisoned(CrossLayerTranscoder(3, 16, 16, L, TopkActivation(4, L), linear_skip=linear_skip))
    model.init_weights(AnthropicTransposeInitCrossLayerTC(dec_init_norm=0.1))
    # Normalised over D for each latent: over latents for each D would be the known mistake.
    torch.testing.assert_close(model.W_enc_LXiDi.norm(dim=1), torch.ones(L))
    for p in range(3):
        torch.testing.assert_close(model.W_dec_LXoDo[:, p], 0.1 * model.W_enc_LXiDi)
    for zero in (model.b_enc_L, model.b_dec_XoDo, model.W_skip_XiDiXoDo):
        assert zero is None or not zero.any()
    assert (model.W_skip_XiDiXoDo is not None) == linear_skip


@pytest.mark.parametrize(("share", "encoder_scale"), [(0.02, None), (0.3, None), (0.02, 1.5)])
def test_jan_update(share, encoder_scale):
    model = poisoned(ModelHookpointAcausalCrosscoder(2, 1, 16, L, jumprelu()))
    x, _, samples = samples_for(model)
    init = JanUpdateInit(initial_approx_firing_pct=share, n_calibration_tokens=2000, encoder_scale=encoder_scale)
    model.init_weights(init, samples=samples)
    n = 2 * 16
    assert model.W_dec_LXoDo.abs().max() <= 1 / math.sqrt(n)
    assert model.W_dec_LXoDo.abs().max() > 0.9 / math.sqrt(n), "U(-1/n, 1/n) is the known mistake"
    assert model.W_dec_LXoDo.std().item() == pytest.approx(1 / math.sqrt(3 * n), rel=0.05)
    torch.testing.assert_close(model.W_enc_LXiDi, (encoder_scale or n / L) * model.W_dec_LXoDo)
    assert not model.b_dec_XoDo.any()
    fired_L = (model.encode(x) > 0).double().mean(0)
    torch.testing.assert_close(fired_L, torch.full((L,), share, dtype=torch.float64), rtol=0, atol=2 / 2000)


def test_jan_update_default_share_is_1e4_over_n_latents_clamped():
    assert calibration.firing_share(None, 100_000) == pytest.approx(0.1)
    assert calibration.firing_share(None, 64) == 0.99
    with pytest.raises(InputError, match="initial_approx_firing_pct = -1"):
        calibration.firing_share(-1, 64)


def test_calibration_in_chunks_equals_one_sort(monkeypatch):
    monkeypatch.setattr(calibration, "CHUNK_ELEMENTS", 500 * 7)
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(500, 8, generator=generator, dtype=torch.float64)
    W_enc_LI = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    quantile_L = calibration.upper_quantile_L(x_TI, W_enc_LI, 0.1)
    above_L = (x_TI @ W_enc_LI.T > quantile_L).sum(0)
    assert above_L.tolist() == [50] * 30


def test_calibration_never_holds_tokens_times_latents():
    x_TI, W_enc_LI = torch.randn(64, 4), torch.randn(1000, 4)
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                biggest = max(biggest, tensor.numel()) if isinstance(tensor, torch.Tensor) else biggest
            return out

    original, calibration.CHUNK_ELEMENTS = calibration.CHUNK_ELEMENTS, 64 * 100
    try:
        with Watch():
            calibration.upper_quantile_L(x_TI, W_enc_LI, 0.1)
    finally:
        calibration.CHUNK_ELEMENTS = original
    assert biggest <= 64 * 100


def test_jan_update_reads_no_more_of_the_sample_than_it_needs():
    model = SAEOrTranscoder(8, 8, L, jumprelu())
    x, y, _ = samples_for(model)
    taken = []

    def samples():
        for batch in range(100):
            taken.append(batch)
            yield x[:100], y[:100]

    model.init_weights(JanUpdateInit(0.1, n_calibration_tokens=250), samples=samples)
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("use_encoder_bias", [False, True])
def test_jan_update_without_encoder_bias_calibrates_thresholds(use_encoder_bias):
    model = poisoned(SAEOrTranscoder(16, 16, L, jumprelu(), use_encoder_bias=use_encoder_bias))
    x, _, samples = samples_for(model)
    model.init_weights(JanUpdateNoEncoderBiasInit(0.05, n_calibration_tokens=2000), samples=samples)
    fired_L = (model.encode(x) > 0).double().mean(0)
    torch.testing.assert_close(fired_L, torch.full((L,), 0.05, dtype=torch.float64), rtol=0, atol=2 / 2000)
    assert model.b_enc_L is None or not model.b_enc_L.any()


def test_jan_update_refuses_models_without_encoder_bias_and_without_jumprelu():
    model = SAEOrTranscoder(8, 8, L, jumprelu(), use_encoder_bias=False)
    _, _, samples = samples_for(model)
    with pytest.raises(InputError, match="use 'jan_update_no_encoder_bias'"):
        model.init_weights(JanUpdateInit(0.1), samples=samples)
    topk = SAEOrTranscoder(8, 8, L, TopkActivation(4, L))
    with pytest.raises(InputError, match=r"calibrates JumpReLU thresholds, got crosscoder.activation.type = 'topk'"):
        topk.init_weights(JanUpdateInit(0.1), samples=samples)


def test_jan_update_for_different_spaces_draws_an_encoder_of_its_own():
    model = poisoned(CrossLayerTranscoder(2, 8, 6, L, jumprelu(), linear_skip=True))
    x, _, samples = samples_for(model)
    model.init_weights(JanUpdateInit(0.1, n_calibration_tokens=2000), samples=samples)
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    assert (model.encode(x) > 0).double().mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("own_scale", [1.0, 1.5])
@pytest.mark.parametrize("first", [{"type": "anthropic_transpose"}, {"type": "jan_update"}])
def test_identical_latents(first, own_scale):
    model = poisoned(ModelHookpointAcausalCrosscoder(2, 2, 8, L, jumprelu(), n_shared_latents=40))
    x, _, samples = samples_for(model)
    config = IdenticalLatentsInit.Config(
        first=INITIALIZATIONS.config_classes()[first["type"]].model_validate(first).model_dump(),
        own_scale=own_scale,
    )
    strategy = IdenticalLatentsInit(config.first, own_scale=config.own_scale)
    model.init_weights(strategy, samples=samples)
    W_dec_LMPD, W_enc_LMPD = model.W_dec_LMPD, model.W_enc_LXiDi
    assert torch.equal(W_dec_LMPD[:40, 0], W_dec_LMPD[:40, 1])
    assert not torch.equal(W_dec_LMPD[40:, 0], W_dec_LMPD[40:, 1])
    assert not torch.equal(W_dec_LMPD[0, 0, 0], W_dec_LMPD[0, 0, 1]), "hookpoints stay different"
    plain = ModelHookpointAcausalCrosscoder(2, 2, 8, L, jumprelu(), n_shared_latents=40)
    plain.init_weights(IdenticalLatentsInit(config.first), samples=samples)
    assert torch.equal(W_dec_LMPD[:40], plain.W_dec_LMPD[:40])
    torch.testing.assert_close(W_dec_LMPD[40:], own_scale * plain.W_dec_LMPD[40:], rtol=0, atol=0)
    factor = 32 / L if first["type"] == "jan_update" else 1.0
    torch.testing.assert_close(W_enc_LMPD, factor * W_dec_LMPD, msg="the encoder is derived after the copy")
    if first["type"] == "jan_update":
        assert (model.encode(x) > 0).double().mean().item() == pytest.approx(0.99, abs=0.01)
    assert strategy.config.first.type == first["type"]
    assert strategy.needs_data == (first["type"] == "jan_update")


def test_identical_latents_needs_shared_latents_and_a_decoder_first_strategy():
    model = ModelHookpointAcausalCrosscoder(2, 1, 8, L, TopkActivation(4, L))
    with pytest.raises(InputError, match="the model has no shared latents"):
        model.init_weights(IdenticalLatentsInit(AnthropicTransposeInit()))
    with pytest.raises(InputError, match=r"init.first.type = 'compound_uniform': does not derive the encoder"):
        IdenticalLatentsInit(CompoundUniformInit())


@pytest.mark.parametrize("centre", [False, True])
def test_zero_dec_skip_starts_from_the_mean_output(centre):
    model = poisoned(CrossLayerTranscoder(2, 8, 6, L, TopkActivation(4, L), linear_skip=True, dtype=torch.float64))
    x, y, samples = samples_for(model)
    model.init_weights(ZeroDecSkipInit(centre_encoder=centre, n_mean_tokens=1000), samples=samples)
    torch.testing.assert_close(model.b_dec_XoDo, y[:1000].mean(0))
    torch.testing.assert_close(model(x[:5]), y[:1000].mean(0).expand(5, 2, 6))
    assert not model.W_dec_LXoDo.any() and not model.W_skip_XiDiXoDo.any()
    torch.testing.assert_close(model.W_enc_LI.norm(dim=1), torch.ones(L, dtype=torch.float64))
    expected_b_enc_L = -(model.W_enc_LI @ x[:1000].mean(0)) if centre else torch.zeros(L, dtype=torch.float64)
    torch.testing.assert_close(model.b_enc_L, expected_b_enc_L)


@pytest.mark.parametrize(("d_in", "d_out"), [(8, 6), (6, 8), (8, 8)])
def test_orthogonal_skip(d_in, d_out):
    model = poisoned(SAEOrTranscoder(d_in, d_out, L, TopkActivation(4, L), linear_skip=True, dtype=torch.float64))
    x, y, samples = samples_for(model)
    model.init_weights(OrthogonalSkipInit(skip_gain=0.5, n_mean_tokens=2000), samples=samples)
    W = model.W_skip_XiDiXoDo
    gram = W.T @ W if d_in >= d_out else W @ W.T
    torch.testing.assert_close(gram, 0.25 * torch.eye(min(d_in, d_out), dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(x).mean(0), y.mean(0))
    with pytest.raises(InputError, match="no linear skip"):
        SAEOrTranscoder(d_in, d_out, L, TopkActivation(4, L)).init_weights(OrthogonalSkipInit(), samples=samples)


@pytest.mark.parametrize("own_layer", [True, False])
def test_compound_uniform(own_layer):
    n_latents = 3 * 50 if own_layer else 2 * 50
    activation = TopkActivation(4, n_latents)
    model = poisoned(CompoundCrossLayerTranscoder(3, 8, 8, n_latents, activation, own_layer=own_layer))
    model.init_weights(CompoundUniformInit())
    for part in model.parts:
        assert 0.95 / math.sqrt(50) < part.W_enc_LXiDi.abs().max() <= 1 / math.sqrt(50)
        assert 0.95 / math.sqrt(24) < part.W_dec_LXoDo.abs().max() <= 1 / math.sqrt(24)
        assert not part.b_enc_L.any()
    assert not model.b_dec_XoDo.any()
    assert not torch.equal(model.parts[0].W_enc_LXiDi, model.parts[1].W_enc_LXiDi)


def test_compound_models_take_every_other_strategy_layer_by_layer():
    model = poisoned(CompoundCrossLayerTranscoder(3, 8, 8, 150, jumprelu(150), linear_skip=True))
    x, y, samples = samples_for(model)
    model.init_weights(JanUpdateInit(0.2, n_calibration_tokens=2000), samples=samples)
    fired_L = (model.encode(x) > 0).double().mean(0)
    torch.testing.assert_close(fired_L, torch.full((150,), 0.2, dtype=torch.float64), rtol=0, atol=2 / 2000)
    poisoned(model).init_weights(ZeroDecSkipInit(n_mean_tokens=2000), samples=samples)
    torch.testing.assert_close(model.b_dec_XoDo, y.mean(0))
    poisoned(model).init_weights(OrthogonalSkipInit(n_mean_tokens=2000), samples=samples)
    torch.testing.assert_close(model(x).mean(0), y.mean(0), atol=1e-5, rtol=0)


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    def weights(seed):
        return SAEOrTranscoder(8, 8, L, TopkActivation(4, L)).init_weights(AnthropicTransposeInit(), seed).W_enc_LXiDi

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_strategies_that_read_data_say_so():
    with pytest.raises(InputError, match="JanUpdateInit looks at activations: pass `samples`"):
        SAEOrTranscoder(8, 8, L, jumprelu()).init_weights(JanUpdateInit())


def test_spaces_that_do_not_match_are_refused():
    model = SAEOrTranscoder(8, 6, L, TopkActivation(4, L))
    with pytest.raises(InputError, match=r"needs equal input and output spaces, got \(8,\) and \(6,\)"):
        model.init_weights(AnthropicTransposeInit())
    with pytest.raises(InputError, match=r"got input \(8,\) and output \(6,\)"):
        model.init_weights(AnthropicTransposeInitCrossLayerTC())


def test_every_strategy_builds_again_from_its_config():
    for name in INITIALIZATIONS:
        built = INITIALIZATIONS[name]()
        again = INITIALIZATIONS.build(built.config.model_dump())
        assert type(again) is type(built) and again.config == built.config
