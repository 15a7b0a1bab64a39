"""Constraints on given gradients.

Axes: M models · P hookpoints · D width · L latents.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels.row_sparse_adam import clip_grad_norm_, grad_norm

from crosscode.errors import InputError
from crosscode.models import AnthropicTransposeInit
from crosscode.trainers.constraints import (
    CONSTRAINTS,
    HoldPartition,
    TieSharedDecoders,
    TieTargets,
    UnitNormDecoder,
    constraints_for,
)


def with_gradients(model):
    generator = torch.Generator().manual_seed(2)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
    return model


def test_gradients_of_shared_latents_are_summed_over_models(make_case):
    model = with_gradients(make_case("acausal_shared").model)
    before = model.W_dec_LXoDo.grad.clone()
    TieSharedDecoders().after_backward(model)
    after = model.W_dec_LXoDo.grad
    assert not after[:6, 1].any(), "one vector: its gradient is there once while norms are taken"
    TieSharedDecoders().before_step(model)
    for m in range(2):
        torch.testing.assert_close(after[:6, m], before[:6].sum(1), rtol=0, atol=0)
    assert torch.equal(after[6:], before[6:]), "exclusive latents keep their own gradients"


def test_the_tied_gradient_is_that_of_one_common_vector(make_case):
    """Differentiating the loss with respect to one vector that both models use gives the summed gradient."""
    case = make_case("acausal_shared", "relu")
    model = case.model
    (model(case.input_BXiDi) - case.target_BXoDo).square().sum().backward()
    tie = TieSharedDecoders()
    tie.after_backward(model)

    common_SPD = model.W_dec_LXoDo[:6, 0].detach().clone().requires_grad_()
    own_LMPD = model.W_dec_LXoDo[6:].detach().clone().requires_grad_()
    others = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    h_BL = case.input_BXiDi.flatten(1) @ others["W_enc_LXiDi"].flatten(1).T + others["b_enc_L"]
    W_dec = torch.cat([common_SPD[:, None].expand(6, 2, 1, 5), own_LMPD])
    y = torch.einsum("bl,lmpd->bmpd", h_BL.relu(), W_dec) + others["b_dec_XoDo"]
    (y - case.target_BXoDo).square().sum().backward()
    grads = [common_SPD.grad, own_LMPD.grad] + [param.grad for param in others.values() if param.grad is not None]
    expected = torch.cat([grad.flatten() for grad in grads]).norm()
    torch.testing.assert_close(grad_norm(model.parameters()), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(clip_grad_norm_(model.parameters(), 1.0), expected, rtol=1e-12, atol=0)
    tie.before_step(model)
    for m in range(2):
        torch.testing.assert_close(model.W_dec_LXoDo.grad[:6, m], common_SPD.grad / expected, rtol=1e-5, atol=1e-12)


def test_tying_and_unit_norm_together_project_the_gradient_of_the_one_vector(make_case):
    """The unit vector of a shared latent is `w / |(w, w)|`: its gradient, by automatic differentiation."""
    model = with_gradients(make_case("acausal_shared").model)
    constraints = constraints_for(model, [UnitNormDecoder()])
    for constraint in constraints:
        constraint.after_step(model)
    common_SPD = model.W_dec_LXoDo[:6, 0].detach().clone().requires_grad_()
    both = torch.stack([common_SPD, common_SPD], 1)
    unit = both / both.flatten(1).norm(dim=1)[:, None, None, None]
    (unit * model.W_dec_LXoDo.grad[:6]).sum().backward()
    for constraint in reversed(constraints):
        constraint.after_backward(model)
    torch.testing.assert_close(model.W_dec_LXoDo.grad[:6, 0], common_SPD.grad, rtol=1e-10, atol=1e-12)


def test_shared_latents_that_differ_at_the_start_are_refused(make_case):
    model = make_case("acausal_shared", dtype=torch.float32).model
    TieSharedDecoders().start(model)
    model.init_weights(AnthropicTransposeInit())
    with pytest.raises(InputError, match=r"use crosscoder.init.type = 'identical_latents'"):
        TieSharedDecoders().start(model)


def test_tying_needs_shared_latents(make_case):
    with pytest.raises(InputError, match="the model has no shared latents"):
        constraints_for(make_case("acausal_2x1").model, [TieSharedDecoders()])


def test_tying_is_implied_by_shared_latents_and_acts_first(make_case):
    kinds = [type(constraint) for constraint in constraints_for(make_case("acausal_shared").model, [UnitNormDecoder()])]
    assert kinds == [TieSharedDecoders, UnitNormDecoder]
    named = constraints_for(make_case("acausal_shared").model, [UnitNormDecoder(), TieSharedDecoders()])
    assert [type(constraint) for constraint in named] == kinds
    assert constraints_for(make_case("acausal_2x1").model) == []


def test_unit_norm_projects_the_parallel_gradient_out(architecture, make_case):
    model = with_gradients(make_case(architecture).model)
    constraint = UnitNormDecoder()
    constraint.start(model)
    before = [part.W_dec_LXoDo.grad.clone() for part in model.parts]
    constraint.after_backward(model)
    for part, old in zip(model.parts, before, strict=True):
        unit_LO, new_LO, old_LO = part.W_dec_LO, part.W_dec_LXoDo.grad.flatten(1), old.flatten(1)
        torch.testing.assert_close(unit_LO.norm(dim=1), torch.ones(part.n_latents, dtype=torch.float64))
        torch.testing.assert_close((unit_LO * new_LO).sum(1), torch.zeros(part.n_latents, dtype=torch.float64))
        removed_LO = old_LO - new_LO
        torch.testing.assert_close(removed_LO, (removed_LO * unit_LO).sum(1, keepdim=True) * unit_LO)


def test_a_decoder_row_of_zeros_stays_zero(make_case):
    model = make_case("acausal_2x1").model
    with torch.no_grad():
        model.W_dec_LXoDo[3] = 0
    UnitNormDecoder().after_step(model)
    assert not model.W_dec_LXoDo[3].any() and bool(model.W_dec_LXoDo.isfinite().all())


def test_constraints_build_from_their_configs():
    assert {type(CONSTRAINTS[name]()) for name in CONSTRAINTS} == {
        HoldPartition,
        TieSharedDecoders,
        TieTargets,
        UnitNormDecoder,
    }


def rank_one(model):
    """Weights as `TieTargets` leaves them: one direction, several scales, by a singular value decomposition."""
    with torch.no_grad():
        for part in model.parts:
            W_LXD = part.W_dec_LXoDo.flatten(1, -2)
            U, S, V = torch.linalg.svd(W_LXD, full_matrices=False)
            part.W_dec_LXoDo.copy_((S[:, :1, None] * U[:, :, :1] * V[:, :1]).reshape(part.W_dec_LXoDo.shape))
    return model


@pytest.mark.parametrize("architecture", ["cross_layer", "compound", "acausal_3x2"])
def test_the_gradient_of_tied_targets_is_what_scales_and_a_direction_can_follow(architecture, make_case):
    """The nearest to it among all `d(scale) direction + scale d(direction)`, by least squares."""
    model = with_gradients(rank_one(make_case(architecture).model))
    before = [part.W_dec_LXoDo.grad.clone() for part in model.parts]
    TieTargets().after_backward(model)
    for part, grad in zip(model.parts, before, strict=True):
        W_LXD = part.W_dec_LXoDo.detach().flatten(1, -2)
        for latent in (0, 5):
            U, S, V = torch.linalg.svd(W_LXD[latent], full_matrices=False)
            scale_X, direction_D = S[0] * U[:, 0], V[0]
            jacobian = torch.cat([
                torch.einsum("xy,d->yxd", torch.eye(len(scale_X)).double(), direction_D).flatten(1),
                torch.einsum("x,de->exd", scale_X, torch.eye(len(direction_D)).double()).flatten(1),
            ]).T  # fmt: skip
            wanted = jacobian @ torch.linalg.pinv(jacobian) @ grad[latent].flatten()
            torch.testing.assert_close(part.W_dec_LXoDo.grad[latent].flatten(), wanted)


@pytest.mark.parametrize("architecture", ["cross_layer", "compound"])
def test_tied_targets_have_one_direction(architecture, make_case):
    case = make_case(architecture)
    model, nearest = case.model, rank_one(make_case(architecture).model)
    with torch.no_grad():
        for part, near in zip(model.parts, nearest.parts, strict=True):
            noise = torch.randn(near.W_dec_LXoDo.shape, generator=torch.Generator().manual_seed(3)).double()
            part.W_dec_LXoDo.copy_(near.W_dec_LXoDo + 0.01 * noise)
    wanted = [part.W_dec_LXoDo.clone() for part in rank_one(model.clone()).parts]
    TieTargets().start(model)
    for part, want in zip(model.parts, wanted, strict=True):
        torch.testing.assert_close(part.W_dec_LXoDo.detach(), want.detach(), rtol=1e-6, atol=1e-6)
    kept = model.state_dict()
    TieTargets().after_step(model)  # and stay so
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, kept[name])


def test_tied_targets_that_begin_at_0_find_a_direction(make_case):
    model = with_gradients(make_case("cross_layer").model)
    with torch.no_grad():
        model.W_dec_LXoDo.zero_()
        TieTargets().after_backward(model)
        model.W_dec_LXoDo -= model.W_dec_LXoDo.grad
    TieTargets().after_step(model)
    assert (torch.linalg.svdvals(model.W_dec_LXoDo.detach())[:, 1] < 1e-10).all() and model.W_dec_LXoDo.any()
    with pytest.raises(InputError, match=r"constraints.tie_targets: the model writes to one position"):
        constraints_for(make_case("sae").model, [TieTargets()])
