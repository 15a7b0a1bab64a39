"""Mistakes of earlier implementations that a formula alone would let pass unnoticed in a log.

Axes: B tokens · L latents.
"""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode


def gradients_of(case, loss):
    case.model.zero_grad()
    loss.total.backward()
    # Of AuxK alone it may be sparse over rows; of a loss with a reconstruction it is dense.
    return {name: param.grad.to_dense() for name, param in case.model.named_parameters() if param.grad is not None}


@pytest.fixture
def dead_half():
    idle_L = torch.zeros(24, dtype=torch.int64)
    idle_L[12:] = 100
    return idle_L


AUXK = {"auxk": {"k_aux": 6, "dead_after_tokens": 100, "weight": 1.0}}


def test_auxk_is_part_of_what_is_differentiated(make_case, objective, context, dead_half):
    case = make_case("acausal_2x1", "topk")
    without = objective({"recon": {}})(context(case, dead_half), 0, 10)
    with_auxk = objective({"recon": {}, **AUXK})(context(case, dead_half), 0, 10)
    assert with_auxk.parts["auxk"] > 0
    torch.testing.assert_close(with_auxk.total - without.total, with_auxk.parts["auxk"])
    dead_rows = gradients_of(case, with_auxk)["W_dec_LXoDo"][12:] - gradients_of(case, without)["W_dec_LXoDo"][12:]
    assert dead_rows.abs().max() > 1e-6


def test_auxk_does_not_move_living_latents_nor_the_decoder_bias(make_case, objective, context, dead_half):
    case = make_case("acausal_2x1", "topk")
    grads = gradients_of(case, objective(AUXK)(context(case, dead_half), 0, 10))
    for name in ("W_enc_LXiDi", "W_dec_LXoDo", "b_enc_L"):
        assert not grads[name][:12].any(), f"{name}: the target is detached, so living latents have no part in it"
        assert grads[name][12:].any(), f"{name}: dead latents do, encoder included"
    assert "b_dec_XoDo" not in grads or not grads["b_dec_XoDo"].any(), "the auxiliary latents decode without bias"


def test_auxk_of_a_perfect_reconstruction_is_zero_and_has_no_nan(make_case, objective, context, dead_half):
    case = make_case("acausal_2x1", "topk")
    perfect = type(case)(case.model, case.input_BXiDi, case.model(case.input_BXiDi).detach())
    loss = objective(AUXK)(context(perfect, dead_half), 0, 10)
    assert loss.total.item() == 0.0
    assert all(bool(grad.isfinite().all()) for grad in gradients_of(case, loss).values())


@pytest.mark.parametrize("architecture", ["sae", "acausal_2x1", "compound"])
def test_pre_act_moves_silent_latents(architecture, make_case, objective, context):
    case = make_case(architecture, "jumprelu")
    with torch.no_grad():
        for part in case.model.parts:
            part.b_enc_L.fill_(-100.0)
    ctx = context(case)
    assert not ctx.result.latents.to_dense().any(), "every latent is silent"
    grads = gradients_of(case, objective({"pre_act": {"weight": 1.0}})(ctx, 0, 10))
    for part, prefix in zip(
        case.model.parts, ["layers.0.", "layers.1.", "layers.2."] if len(case.model.parts) > 1 else [""], strict=True
    ):
        n_L = part.decoder_norms().n_L.detach()
        # d/db of mean_B relu(theta - h) n is -n while theta > h.
        torch.testing.assert_close(grads[prefix + "b_enc_L"], -n_L)


def test_sparsity_penalties_reach_the_decoder_through_its_norm(make_case, objective, context):
    case = make_case("acausal_2x1", "relu")
    grads = gradients_of(case, objective({"l1": {"weight": 1.0}})(context(case), 0, 10))
    W_dec = case.model.W_dec_LXoDo.detach()
    mean_a_L = case.model.encode(case.input_BXiDi).detach().mean(0)
    expected = mean_a_L[:, None, None, None] * W_dec / W_dec.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(grads["W_dec_LXoDo"], expected)


def test_a_zero_decoder_row_has_no_nan_gradient(make_case, objective, context):
    case = make_case("acausal_2x1", "relu")
    with torch.no_grad():
        case.model.W_dec_LXoDo[3] = 0
    grads = gradients_of(case, objective({"recon": {}, "l1": {"weight": 1.0}})(context(case), 0, 10))
    assert all(bool(grad.isfinite().all()) for grad in grads.values())


NEW_TENSORS = {torch.arange, torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor, torch.rand, torch.randn}


class NewTensorsWithoutDevice(TorchFunctionMode):
    """Collects the calls that make a tensor on the default device, whatever device the others are on."""

    def __init__(self):
        super().__init__()
        self.found, self.n_seen = set(), 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in NEW_TENSORS:
            self.n_seen += 1
            if kwargs.get("device") is None:
                self.found.add(func.__name__)
        return func(*args, **kwargs)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("architecture", ["acausal_2x1", "compound"])
def test_group_offsets_and_the_like_are_made_on_the_device_of_the_model(architecture, activation, backend, make_case):
    case = make_case(architecture, activation, backend=backend)
    with NewTensorsWithoutDevice() as new:
        case.model(case.input_BXiDi).sum().backward()
    assert new.found == set()


def test_the_watch_for_new_tensors_sees_one():
    with NewTensorsWithoutDevice() as new:
        _ = torch.arange(3), torch.arange(3, device="cpu")
    assert new.found == {"arange"} and new.n_seen == 2


def test_every_source_layer_of_a_compound_model_has_parameters_of_its_own(make_case):
    activations = make_case("compound", "jumprelu").model.activation_fns
    pointers = {activation.log_threshold_L.data_ptr() for activation in activations}
    assert len(pointers) == len(activations) == 3
