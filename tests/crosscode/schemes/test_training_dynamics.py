"""What a scheme must do over some steps of training: revive the dead, keep the tied tied.

Axes: B tokens · M models · P hookpoints · D width · L latents.
"""

from __future__ import annotations

import pytest
import torch
from constrained import constrained_step

from crosscode.models import (
    AnthropicSTEJumpReLUActivation,
    AnthropicTransposeInit,
    IdenticalLatentsInit,
    JanUpdateInit,
    ModelHookpointAcausalCrosscoder,
    TopkActivation,
)
from crosscode.objectives import LossContext
from crosscode.trainers.constraints import TieSharedDecoders, UnitNormDecoder, constraints_for
from crosscode.trainers.firing import FiringTracker

N_LATENTS, D = 48, 8


def sparse_batches(n_features=40, batch=256):
    """Batches of shape [B, 2, 1, D] from a fixed dictionary of directions."""
    generator = torch.Generator().manual_seed(0)
    directions_FMPD = torch.randn(n_features, 2, 1, D, generator=generator)
    while True:
        active_BF = (torch.rand(batch, n_features, generator=generator) < 0.08) * torch.rand(
            batch, n_features, generator=generator
        )
        yield torch.einsum("bf,fmpd->bmpd", active_BF, directions_FMPD)


def train(model, objective, n_steps, *, lr=3e-3, constraints=(), optimizer=None, after=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    firing = FiringTracker(model.n_latents)
    for step, x_BMPD in zip(range(n_steps), sparse_batches(), strict=False):
        result = model.forward_train(x_BMPD)
        firing.update(result.latents)
        context = LossContext(model, x_BMPD, x_BMPD, result, firing.tokens_since_fired_L)
        objective(context, step, n_steps).total.backward()
        constrained_step(model, optimizer, constraints)
        model.after_step(result.latents)
        if after is not None:
            after(model)
    return firing


def fired_share_of(model, latents, n_batches=8):
    with torch.no_grad():
        counts_L = sum(
            model.encode_latents(x).firing_counts_L() for _, x in zip(range(n_batches), sparse_batches(), strict=False)
        )
    return (counts_L[latents] > 0).double().mean().item()


DEAD = slice(0, N_LATENTS // 2)


@pytest.mark.parametrize("with_auxk", [True, False])
def test_dead_latents_come_back_under_auxk_and_not_without(with_auxk, objective):
    model = ModelHookpointAcausalCrosscoder(2, 1, D, N_LATENTS, TopkActivation(4, N_LATENTS))
    model.init_weights(AnthropicTransposeInit(dec_init_norm=0.5))
    with torch.no_grad():
        model.W_enc_LXiDi[DEAD] *= 0.02  # too small to be among the largest
    assert fired_share_of(model, DEAD) == 0.0
    config = {"recon": {}}
    if with_auxk:
        config["auxk"] = {"k_aux": 8, "dead_after_tokens": 1000}
    train(model, objective(config), 150, lr=1e-2)
    revived = fired_share_of(model, DEAD)
    assert revived > 0.8 if with_auxk else revived < 0.4


@pytest.mark.parametrize("with_pre_act", [True, False])
def test_dead_latents_come_back_under_the_pre_act_loss_and_not_without(with_pre_act, objective):
    model = ModelHookpointAcausalCrosscoder(2, 1, D, N_LATENTS, AnthropicSTEJumpReLUActivation(N_LATENTS))
    samples = lambda: ((x, x) for x in sparse_batches())  # noqa: E731
    model.init_weights(JanUpdateInit(0.1, n_calibration_tokens=1024), samples=samples)
    with torch.no_grad():
        model.b_enc_L[DEAD] = -1.0  # below any threshold
    assert fired_share_of(model, DEAD) == 0.0
    config = {"recon": {}, "tanh": {"weight": {"type": "linear_ramp", "value": 0.05}}}
    if with_pre_act:
        config["pre_act"] = {"weight": 1e-3}
    train(model, objective(config), 250, lr=1e-2)
    revived = fired_share_of(model, DEAD)
    assert revived > 0.8 if with_pre_act else revived == 0.0


def shared_model(**options):
    model = ModelHookpointAcausalCrosscoder(
        2, 1, D, N_LATENTS, TopkActivation(4, N_LATENTS), n_shared_latents=20, **options
    )
    return model.init_weights(IdenticalLatentsInit(AnthropicTransposeInit()))


@pytest.mark.parametrize("fused", [True, False])
def test_tied_decoders_stay_equal_to_the_bit_over_200_steps_of_adam(fused, objective):
    model = shared_model()
    start = model.W_dec_LXoDo.detach().clone()

    def tied(model):
        W = model.W_dec_LMPD[:20]
        assert torch.equal(W[:, 0], W[:, 1])

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=fused)
    constraints = constraints_for(model)
    assert [type(constraint) for constraint in constraints] == [TieSharedDecoders]
    train(model, objective({"recon": {}}), 200, constraints=constraints, optimizer=optimizer, after=tied)
    moved = (model.W_dec_LXoDo - start).abs().amax((1, 2, 3))
    assert (moved > 1e-3).all(), "shared latents were trained, not frozen"
    assert not torch.equal(model.W_dec_LMPD[20:, 0], model.W_dec_LMPD[20:, 1])


def test_decoders_drift_apart_without_the_constraint(objective):
    model = shared_model()
    train(model, objective({"recon": {}}), 20)
    assert not torch.equal(model.W_dec_LMPD[:20, 0], model.W_dec_LMPD[:20, 1])


@pytest.mark.parametrize("n_shared", [0, 20])
def test_decoder_rows_keep_unit_norm(n_shared, objective):
    model = (
        shared_model()
        if n_shared
        else ModelHookpointAcausalCrosscoder(2, 1, D, N_LATENTS, TopkActivation(4, N_LATENTS)).init_weights(
            AnthropicTransposeInit()
        )
    )
    constraints = constraints_for(model, [UnitNormDecoder()])
    for constraint in constraints:
        constraint.start(model)

    def unit(model):
        torch.testing.assert_close(model.W_dec_LO.norm(dim=1), torch.ones(N_LATENTS))
        assert torch.equal(model.W_dec_LMPD[:n_shared, 0], model.W_dec_LMPD[:n_shared, 1])

    train(model, objective({"recon": {}}), 30, constraints=constraints, after=unit)
