"""Held-out figures against slow computations: every architecture, both modes of BatchTopK.

Axes: B tokens · M models · P hookpoints · Xi/Xo input/output crosscoding dims · X flattened Xo · Di/Do widths · I
flattened input · L latents · N all tokens.
"""

import copy

import pytest
import torch

from crosscode.evaluation.heldout import measure_reconstruction
from crosscode.evaluation.precision import autocast, float32_products
from crosscode.models import (
    ARCHITECTURES,
    AnthropicSTEJumpReLUActivation,
    BatchTopkActivation,
    ModelHookpointAcausalCrosscoder,
)
from crosscode.models.architecture import split_for

NAMES = ["a", "b"]


def random_batch_topk():
    torch.manual_seed(0)
    model = ModelHookpointAcausalCrosscoder(2, 1, 5, 12, BatchTopkActivation(3, 12), backend="torch")
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
        model.activation_fn.threshold.fill_(3.0)
    return model


def test_batch_topk_has_an_l0_in_both_modes_and_every_figure_is_what_a_loop_gives():
    model = random_batch_topk()
    batches = [torch.randn(30, 2, 1, 5), torch.randn(20, 2, 1, 5)]
    scaling_MP = torch.tensor([[0.5], [2.0]])
    result = measure_reconstruction(model.train(), batches, split_for("model_hookpoint_acausal"), NAMES, scaling_MP)

    model.requires_grad_(False)
    errors, variances, counts, l0 = torch.zeros(2).double(), torch.zeros(2).double(), torch.zeros(12), []
    largest_L = torch.zeros(12).double()
    all_acts = torch.cat(batches).double()
    for x in range(2):
        mean = sum(all_acts[:, x, 0]) / len(all_acts)
        for act in all_acts:
            scaled = act * scaling_MP[..., None]
            h_L = torch.einsum("mpd,lmpd->l", scaled, model.W_enc_LXiDi.double()) + model.b_enc_L.double()
            a_L = torch.where(h_L >= 3.0, h_L, 0.0)
            recon = torch.einsum("l,lmpd->mpd", a_L, model.W_dec_LXoDo.double()) + model.b_dec_XoDo.double()
            errors[x] += (recon / scaling_MP[..., None] - act)[x].square().sum()
            variances[x] += (act[x, 0] - mean).square().sum()
            if x == 0:
                counts += a_L > 0
                largest_L = torch.maximum(largest_L, a_L)
                l0.append(int((a_L > 0).sum()))
    assert result.fvu_by_position == pytest.approx(
        dict(zip(NAMES, (errors / variances).tolist(), strict=True)), rel=1e-4
    )
    assert result.fvu == pytest.approx(float(errors.sum() / variances.sum()), rel=1e-4)
    assert result.l0 == pytest.approx(sum(l0) / len(l0))
    assert result.density_L == pytest.approx((counts / 50).tolist())
    assert result.max_activation_L == pytest.approx(largest_L.tolist(), rel=1e-5)
    assert result.dead_fraction == pytest.approx(float((counts == 0).double().mean()))
    assert result.l0_train_mode == pytest.approx(3.0)
    assert result.l0 != pytest.approx(3.0)
    assert model.training
    assert result.as_metrics()["eval/l0_train_mode"] == pytest.approx(3.0)


def slow_part(part, x_I):
    """Latents and output of one token, from the definitions, in float64."""
    h_L = [float(torch.dot(w.flatten(), x_I)) + float(b) for w, b in zip(part.W_enc_LXiDi, part.b_enc_L, strict=True)]
    t_L = part.activation_fn.log_threshold_L.exp().tolist()
    a_L = [h if h > t else 0.0 for h, t in zip(h_L, t_L, strict=True)]
    y = sum(a * W_dec for a, W_dec in zip(a_L, part.W_dec_LXoDo, strict=True))
    if part.W_skip_XiDiXoDo is not None:
        y = y + torch.tensordot(x_I, part.W_skip_XiDiXoDo.reshape(len(x_I), *y.shape), 1)
    return a_L, y


def slow_token(model, kind, x_XiDi):
    if kind != "compound_cross_layer_transcoder":
        a_L, y_XoDo = slow_part(model, x_XiDi.flatten())
        return a_L, y_XoDo + model.b_dec_XoDo
    a_L, y_XoDo = [], model.b_dec_XoDo.clone()
    for source, part in enumerate(model.parts):
        a, y = slow_part(part, x_XiDi[source])
        a_L += a
        y_XoDo[source:] += y
    return a_L, y_XoDo


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "in-training"])
@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        ("model_hookpoint_acausal", (2, 2, 4)),
        ("sae", (1, 1, 4)),
        ("transcoder", (1, 2, 4)),
        ("cross_layer_transcoder", (1, 3, 4)),
        ("compound_cross_layer_transcoder", (1, 4, 4)),
    ],
)
def test_every_architecture_is_evaluated_like_a_loop_over_tokens(kind, dims, folded):
    generator = torch.Generator().manual_seed(1)
    split = split_for(kind)
    activation = AnthropicSTEJumpReLUActivation(12)
    skip = {"linear_skip": True} if "transcoder" in kind else {}
    dims_of_model = ARCHITECTURES[kind].dims_for(*dims)
    model = ARCHITECTURES[kind](**dims_of_model, n_latents=12, activation_fn=activation, backend="torch", **skip)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    acts_BMPD = torch.randn(23, *dims, generator=generator)
    scaling_MP = 0.5 + torch.rand(dims[:2], generator=generator)
    exact = copy.deepcopy(model).double().requires_grad_(False)
    names = split.output_names([[f"m{m}p{p}" for p in range(dims[1])] for m in range(dims[0])])
    if folded:
        model.fold_activation_scaling_into_weights_(*split.scaling(scaling_MP))
    # 7: parts of a batch as well
    result = measure_reconstruction(model, acts_BMPD.split(9), split, names, None if folded else scaling_MP, max_rows=7)

    errors, counts, l0 = [], [0] * 12, []
    inputs, _ = split.activations(acts_BMPD.double() * scaling_MP.double()[..., None])
    targets = split.activations(acts_BMPD.double())[1]
    out_scaling = split.scaling(scaling_MP.double())[1][..., None]
    for x_XiDi, target_XoDo in zip(inputs, targets, strict=True):
        a_L, y_XoDo = slow_token(exact, kind, x_XiDi)
        errors.append((y_XoDo / out_scaling - target_XoDo).reshape(-1, dims[2]).square().sum(1))
        l0.append(sum(a > 0 for a in a_L))
        counts = [count + (a > 0) for count, a in zip(counts, a_L, strict=True)]
    error_X = torch.stack(errors).sum(0)
    variance_X = (targets - targets.mean(0)).reshape(23, -1, dims[2]).square().sum((0, 2))
    assert list(result.fvu_by_position.values()) == pytest.approx((error_X / variance_X).tolist(), rel=1e-4)
    assert list(result.fvu_by_position) == names
    assert result.fvu == pytest.approx(float(error_X.sum() / variance_X.sum()), rel=1e-4)
    assert (result.n_tokens, result.l0) == (23, pytest.approx(sum(l0) / 23))
    assert result.density_L == pytest.approx([count / 23 for count in counts])
    assert result.dead_fraction == pytest.approx(sum(count == 0 for count in counts) / 12)
    l0_N = torch.tensor(l0).double()
    assert (result.l0_p5, result.l0_p95) == (float(l0_N.quantile(0.05)), float(l0_N.quantile(0.95)))


def test_figures_do_not_depend_on_the_precision_of_training():
    model = random_batch_topk()
    acts_BMPD, scaling_MP, split = torch.randn(30, 2, 1, 5), torch.ones(2, 1), split_for("model_hookpoint_acausal")
    seen = []

    def batches():
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()))
        yield acts_BMPD

    expected = measure_reconstruction(model, batches(), split, NAMES, scaling_MP)
    with float32_products(tf32=True), autocast("bfloat16", model.device):
        found = measure_reconstruction(model, batches(), split, NAMES, scaling_MP)
        assert torch.is_autocast_enabled("cpu") and torch.get_float32_matmul_precision() == "high"
    assert found == expected
    assert seen == [(False, "highest")] * 2
