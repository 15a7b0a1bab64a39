"""Foreign weights are exactly 0, whatever trains them.

Axes: M models · L latents.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from constrained import constrained_step

from crosscode.build.experiment import build_constraints
from crosscode.build.schema import check_config, read_yaml
from crosscode.errors import InputError
from crosscode.models import (
    AnthropicTransposeInit,
    BaseCrosscoder,
    IdenticalLatentsInit,
    ModelHookpointAcausalCrosscoder,
)
from crosscode.trainers.constraints import HoldPartition, UnitNormDecoder, constraints_for

AUXK = {"recon": {}, "auxk": {"k_aux": 4, "dead_after_tokens": 40}}
BLOCKS = [{"models": [0], "n_latents": 6}, {"models": [1], "share": 0.25}]
SETTINGS = {
    "adam": {},
    "in parts": {"grad_accumulation": 2},
    "bfloat16": {"precision": "bfloat16"},
    "unit norm": {"constraints": [UnitNormDecoder()]},
    "sign_sgd": {"optimizer": {"type": "sign_sgd_schedule_free", "lr": 0.01}, "evaluate_every": 2},
    "row-sparse": {
        "optimizer": {"type": "adam", "lr": 0.01, "betas": [0.0, 0.99], "row_sparse": True}, "backend": "torch:rows",
    },
    "reference": {"backend": "reference"},
    "batch_topk": {"activation": {"type": "batch_topk", "k": 4, "rank_by": "decoder_norm_weighted"}},
    "groupmax": {"activation": {"type": "groupmax", "k": 4}},
    "relu": {"activation": {"type": "relu"}, "objective": {"recon": {}, "l1": {"weight": 0.1}}},
    "jumprelu": {
        "activation": {"type": "jumprelu", "log_threshold_init": -1.0},
        "objective": {"recon": {}, "tanh": {"weight": 0.1}, "pre_act": {}},
    },
}  # fmt: skip


def foreign(weights_LM, n_latents, first=0):
    """Of the blocks above, written out: what must be 0."""
    second = first + 6 + n_latents // 4
    return torch.cat([weights_LM[first : first + 6, 1].flatten(), weights_LM[first + 6 : second, 0].flatten()])


@pytest.mark.parametrize("case", SETTINGS)
def test_foreign_weights_gradients_and_moments_stay_zero_in_training(case, make_trainer, planted, tmp_path):
    trainer = make_trainer(
        "run", data=planted(dims=(2, 1, 6)), model_options={"partition": BLOCKS}, **{"objective": AUXK} | SETTINGS[case]
    )
    model, L = trainer.model, trainer.model.n_latents
    seen = []
    step = trainer.optimizer.step

    def watched(*args, **kwargs):
        for weight in (model.W_enc_LXiDi, model.W_dec_LXoDo):
            grad = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
            assert not foreign(grad, L).any() and bool(grad.any())
        result = step(*args, **kwargs)
        for weight in (model.W_enc_LXiDi, model.W_dec_LXoDo):
            kept = [
                one for one in trainer.optimizer.state[weight].values() if getattr(one, "shape", ()) == weight.shape
            ]
            assert all(not foreign(one, L).any() for one in kept)
            seen.extend(kept)
        return result

    trainer.optimizer.step = watched
    before = model.W_dec_LXoDo.detach().clone()
    trainer.train()
    assert seen and bool((model.W_dec_LXoDo != before).any())
    for one in (model, BaseCrosscoder.load(trainer.run.final), BaseCrosscoder.load(trainer.run.checkpoint(10))):
        assert not foreign(one.W_enc_LXiDi, L).any() and not foreign(one.W_dec_LXoDo, L).any()
        assert one.partition == model.partition
    own = model.partition.models_LM()[:, :, None, None].expand_as(before)
    assert bool((model.W_dec_LXoDo != 0)[own].any(-1).all())


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    ],
)
def test_any_optimizer_of_torch(optimizer, make_case):
    case = make_case("acausal_partition", "relu")
    model, optimizer = case.model, optimizer(case.model.parameters())
    constraints = constraints_for(model)
    for _ in range(3):
        (model(case.input_BXiDi) - case.target_BXoDo).square().sum().backward()
        constrained_step(model, optimizer, constraints)
    rows_01, rows_10 = slice(4, 10), slice(10, 15)
    for weight in (model.W_enc_LXiDi, model.W_dec_LXoDo):
        assert not weight[rows_01, 1].any() and not weight[rows_10, 0].any()
        assert bool((weight[rows_01, 0] != 0).all()) and bool((weight[rows_10, 1] != 0).all())
    assert torch.equal(model.W_dec_LXoDo[:4, 0], model.W_dec_LXoDo[:4, 1]), "tied latents come first, and stay tied"


def test_an_optimizer_that_moves_what_has_no_gradient_is_set_right(make_case):
    model = make_case("acausal_partition").model
    with torch.no_grad():
        model.W_enc_LXiDi.add_(1)
        model.W_dec_LXoDo.add_(1)
    HoldPartition().after_step(model)
    model.partition.check_clear({"W_enc_LXiDi": model.W_enc_LXiDi, "W_dec_LXoDo": model.W_dec_LXoDo})


def test_a_run_does_not_start_from_foreign_weights(make_case):
    model = make_case("acausal_partition").model
    HoldPartition().start(model)
    with torch.no_grad():
        model.W_enc_LXiDi[12, 0] = 1e-30
    with pytest.raises(InputError, match=r"W_enc_LXiDi: the partition .* latents 10 to 14 do not belong to model 0"):
        HoldPartition().start(model)


def test_a_partition_implies_the_constraint(make_case):
    kinds = [type(one).__name__ for one in constraints_for(make_case("acausal_partition").model, [UnitNormDecoder()])]
    assert kinds == ["TieSharedDecoders", "HoldPartition", "UnitNormDecoder"]
    with pytest.raises(InputError, match="the model has no partition"):
        constraints_for(make_case("acausal_2x1").model, [HoldPartition()])


def test_row_sparse_adam_takes_a_partition_but_no_tied_latents(make_case):
    values = read_yaml("dedicated_feature_crosscoder")
    values["train"]["optimizer"] |= {"betas": [0.0, 0.999], "row_sparse": True}
    config = check_config(values)
    rows = {"backend": "torch:rows"}
    assert len(build_constraints(config, make_case("acausal_3x2_partition", **rows).model)) == 1
    with pytest.raises(InputError, match="TieSharedDecoders needs the whole gradient"):
        build_constraints(config, make_case("acausal_partition", **rows).model)


def test_initialisations_leave_foreign_weights_at_zero(make_case):
    for strategy in (AnthropicTransposeInit(), IdenticalLatentsInit(first=AnthropicTransposeInit())):
        model = make_case("acausal_partition", dtype=torch.float32).model.init_weights(strategy)
        HoldPartition().start(model)
        assert torch.equal(model.W_enc_LXiDi, model.W_dec_LXoDo)
        norms_LM = model.norms_LMP()[:, :, 0]
        torch.testing.assert_close(norms_LM, 0.1 * model.partition.models_LM().float())


def test_calibration_sees_the_encoder_without_foreign_weights(make_case):
    from crosscode.models import JanUpdateInit

    model = make_case("acausal_partition", "jumprelu", dtype=torch.float32).model
    x = torch.randn(2000, 2, 1, 5, generator=torch.Generator().manual_seed(0))
    model.init_weights(JanUpdateInit(initial_approx_firing_pct=0.1), samples=lambda: iter([(x, x)]))
    fired_L = (model.encode(x) > 0).float().mean(0)
    torch.testing.assert_close(fired_L, torch.full((24,), 0.1), rtol=0, atol=2e-3)


def test_a_saved_model_whose_foreign_weights_are_not_zero_is_refused(make_case, tmp_path):
    model = make_case("acausal_partition", dtype=torch.float32).model
    with torch.no_grad():
        model.W_dec_LXoDo[5, 1] = 1
    model.save(tmp_path / "m")
    with pytest.raises(InputError, match=r"/m: W_dec_LXoDo: the partition .* do not belong to model 1"):
        BaseCrosscoder.load(tmp_path / "m")


def test_folding_and_narrow_dtypes_keep_the_zeros(make_case):
    model: ModelHookpointAcausalCrosscoder = make_case("acausal_partition", "relu", dtype=torch.float32).model
    scaling = torch.tensor([[0.3], [7.0]])
    folded = model.with_folded_scaling_factors(scaling, scaling)
    folded.fold_decoder_norms_into_encoder_()
    for one in (folded, folded.bfloat16()):
        HoldPartition().start(one)
