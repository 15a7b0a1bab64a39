"""Each activation against its definition.

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import resolve_backend
from crosscode_kernels.sparse import DenseLatents

from crosscode.errors import InputError
from crosscode.models import (
    ACTIVATIONS,
    AnthropicSTEJumpReLUActivation,
    BatchTopkActivation,
    GroupMaxActivation,
    ReLUActivation,
    TopkActivation,
)


def encode(activation, h_BL, n_L=None, backend="torch"):
    """Latents for given pre-activations: an encoder whose input is the pre-activation itself."""
    identity_LL = torch.eye(h_BL.shape[1], dtype=h_BL.dtype)
    ops = resolve_backend(backend, "cpu", h_BL.dtype)
    return activation.encode(ops, h_BL, identity_LL, None, n_L).to_dense()


@pytest.fixture
def h_BL():
    return torch.randn(9, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ReLUActivation(12),
        lambda: TopkActivation(3, 12),
        lambda: BatchTopkActivation(3, 12),
        lambda: GroupMaxActivation(3, 12),
        lambda: AnthropicSTEJumpReLUActivation(12, log_threshold_init=-1.0).double(),
    ],
)
def test_encode_agrees_with_the_definition(make, backend, h_BL):
    activation = make()
    torch.testing.assert_close(encode(activation, h_BL, backend=backend), activation(h_BL), rtol=0, atol=0)


def test_topk_by_hand():
    h_BL = torch.tensor([[3.0, 1.0, 2.0, -1.0], [-3.0, -1.0, 0.5, -2.0], [1.0, 1.0, 1.0, 1.0]])
    kept_BL = torch.tensor([[3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.5, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert torch.equal(encode(TopkActivation(2, 4), h_BL), kept_BL)
    assert torch.equal(TopkActivation(2, 4)(h_BL), kept_BL)


@pytest.mark.parametrize("make", [TopkActivation, BatchTopkActivation, GroupMaxActivation])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_negative_values_are_never_kept_nor_counted_as_fired(make, backend):
    h_BL = -torch.rand(4, 6) - 0.1
    h_BL[0, 0] = 0.5
    ops = resolve_backend(backend, "cpu", torch.float32)
    latents = make(3, 6).encode(ops, h_BL, torch.eye(6), None)
    assert torch.equal(latents.to_dense(), h_BL.clamp(min=0))
    assert latents.l0_B().tolist() == [1, 0, 0, 0]
    assert latents.firing_counts_L().tolist() == [1, 0, 0, 0, 0, 0]


def test_batch_topk_rows_may_hold_none_or_many():
    h_BL = torch.tensor([[5.0, 4.0, 3.0], [0.1, 0.2, 0.3], [-1.0, -1.0, 2.0]])
    kept_BL = torch.tensor([[5.0, 4.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(encode(BatchTopkActivation(1, 3), h_BL), kept_BL)


def test_batch_topk_by_norm_ranks_scaled_values_and_keeps_unscaled_ones():
    h_BL, n_L = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), torch.tensor([10.0, 0.1, 1.0])
    activation = BatchTopkActivation(1, 3, rank_by="decoder_norm_weighted")
    kept_BL = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(encode(activation, h_BL, n_L), kept_BL)
    activation.after_step(DenseLatents(kept_BL), n_L)
    assert activation.threshold.item() == 10.0, "the threshold is on the scaled value"
    activation.eval()
    assert torch.equal(encode(activation, h_BL, n_L), kept_BL)


def test_batch_topk_threshold_is_a_running_mean_of_the_smallest_kept_value():
    activation = BatchTopkActivation(1, 3, threshold_ema_decay=0.9, threshold_start_step=1)
    for smallest in (9.0, 2.0, 1.0):
        activation.after_step(DenseLatents(torch.tensor([[smallest, 0.0, 7.0 + smallest]])))
    # The first step lies before the start step; the second has the weight 0.9 by now, the third 1.
    mean = pytest.approx((0.9 * 2.0 + 1.0) / (0.9 + 1.0))
    assert activation.threshold.item() == mean
    activation.after_step(DenseLatents(torch.zeros(1, 3)))
    assert activation.threshold.item() == mean, "a batch that keeps nothing says nothing"


def test_batch_topk_without_a_threshold_refuses_eval_mode():
    activation = BatchTopkActivation(1, 3).eval()
    with pytest.raises(InputError, match="no inference threshold yet"):
        encode(activation, torch.ones(2, 3))


def test_batch_topk_in_eval_mode_keeps_about_k(make_case):
    case = make_case("sae", {"type": "batch_topk", "k": 3, "threshold_ema_decay": 0.9}, n_tokens=512)
    for chunk in case.input_BXiDi.split(32):
        case.model.after_step(case.model.forward_train(chunk).latents)
    l0 = case.model.eval().encode_latents(case.input_BXiDi).l0_B().double().mean().item()
    assert 2.5 < l0 < 3.6


def test_groupmax_keeps_the_first_maximum_of_each_group():
    h_BL = torch.tensor([[1.0, 2.0, 3.0, 3.0], [-1.0, -2.0, 0.0, 4.0]])
    kept_BL = torch.tensor([[0.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 4.0]])
    assert torch.equal(GroupMaxActivation(2, 4)(h_BL), kept_BL)
    assert torch.equal(encode(GroupMaxActivation(2, 4), h_BL), kept_BL)


def test_k_is_annealed_in_train_mode_only():
    activation = TopkActivation(4, 32, k_start=20, k_anneal_fraction=0.5)
    ks = []
    for step in (0, 25, 50, 99):
        activation.before_step(step, 100)
        ks.append(activation.current_k)
    assert ks == [20, 12, 4, 4]
    activation.before_step(0, 100)
    assert activation.eval().current_k == 4


def test_k_multiplied_holds_within_the_block_only(make_case):
    case = make_case("compound", "topk")
    with case.model.k_multiplied(2):
        assert [activation.current_k for activation in case.model.activation_fns] == [8, 8, 8]
    assert [activation.current_k for activation in case.model.activation_fns] == [4, 4, 4]
    with pytest.raises(RuntimeError), case.model.k_multiplied(99):
        assert case.model.activation_fns[0].current_k == 8, "never more than there are latents"
        raise RuntimeError
    assert case.model.activation_fns[0].current_k == 4


@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("ste", ["anthropic", "gdm"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_jumprelu_gradients_are_the_written_pseudo_derivatives(ste, backend, input_gradient):
    generator = torch.Generator().manual_seed(0)
    h_BL = torch.randn(50, 7, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()
    activation = AnthropicSTEJumpReLUActivation(
        7, bandwidth=1.5, log_threshold_init=-0.3, ste=ste, input_gradient=input_gradient
    )
    activation = activation.double()
    with torch.no_grad():
        activation.log_threshold_L.add_(torch.randn(7, generator=generator, dtype=torch.float64))
    upstream_BL = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    encode(activation, h_BL, backend=backend).backward(upstream_BL)

    theta_L = activation.log_threshold_L.detach().exp()
    h = h_BL.detach()
    window_BL = ((h - theta_L).abs() < 1.5 / 2).double()
    d_log_threshold_L = (upstream_BL * -(theta_L / 1.5) * window_BL).sum(0)
    if ste == "gdm":
        d_log_threshold_L = d_log_threshold_L * theta_L
    slope_BL = (h > theta_L) + input_gradient * theta_L / 1.5 * window_BL
    torch.testing.assert_close(h_BL.grad, upstream_BL * slope_BL, rtol=0, atol=1e-12)
    torch.testing.assert_close(activation.log_threshold_L.grad, d_log_threshold_L, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupMaxActivation(5, 12), "k = 5: GroupMax needs a k that divides n_latents = 12"),
        (lambda: TopkActivation(13, 12), "activation.k = 13: must be between 1 and n_latents = 12"),
        (lambda: TopkActivation(0, 12), "activation.k = 0"),
        (lambda: BatchTopkActivation(13, 12), "activation.k = 13"),
        (lambda: TopkActivation(4, 12, k_start=2), "k_start = 2: must not be below k = 4"),
        (
            lambda: AnthropicSTEJumpReLUActivation(12, bandwidth=0.0),
            "activation.bandwidth = 0.0: input should be greater than 0",
        ),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        make()


def test_every_registered_activation_builds_again_from_its_config():
    for name in ACTIVATIONS:
        needs_k = "k" in ACTIVATIONS[name].Config.model_fields
        activation = ACTIVATIONS[name](n_latents=12, **({"k": 3} if needs_k else {}))
        again = activation.for_n_latents(6)
        assert again.config == activation.config and again.n_latents == 6
