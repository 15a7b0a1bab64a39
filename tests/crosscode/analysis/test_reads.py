"""What latents read from each model: the parts of the pre-activation, against sums in float64."""

import pytest
import torch

from crosscode.analysis.latents_pass import study_latents
from crosscode.analysis.reads import readers
from crosscode.models import ModelHookpointAcausalCrosscoder, TopkActivation
from crosscode.models.architecture import split_for

NAMES = [f"{model}/{hookpoint}" for model in ("base", "tuned") for hookpoint in ("h.0", "h.1")]


@pytest.mark.parametrize("use_pre_bias", [False, True])
def test_examples_have_what_each_model_gives_and_with_the_bias_it_is_the_activation(make_heldout, use_pre_bias):
    model = ModelHookpointAcausalCrosscoder(
        2, 2, 8, 24, TopkActivation(4, 24), use_pre_bias=use_pre_bias, backend="torch"
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    scaling_MP = torch.tensor([[0.5, 2.0], [3.0, 1.0]])
    model.fold_activation_scaling_into_weights_(scaling_MP, scaling_MP)
    batches = make_heldout(n_hookpoints=2, sizes=(9, 5))
    study = study_latents(model.eval(), batches, split_for("model_hookpoint_acausal"), NAMES)
    assert study.readers == ["base", "tuned"]
    acts_TSMPD = torch.cat([batch.acts_HSMPD for batch in batches]).double()
    if use_pre_bias:
        acts_TSMPD -= model.b_dec_XoDo.double()
    read_TSLM = torch.einsum("tsmpd,lmpd->tslm", acts_TSMPD, model.W_enc_LXiDi.double())
    n_seen = 0
    for latent in range(24):
        for examples in study.examples(latent).values():
            for one in examples:
                first = one.position - one.peak
                for at, (strength, read) in enumerate(zip(one.strengths, one.read, strict=True)):
                    expected = read_TSLM[one.sequence, first + at, latent].tolist() if strength else [0, 0]
                    assert read == pytest.approx(expected, rel=1e-4, abs=1e-4)
                    if strength:
                        assert sum(read) + float(model.b_enc_L[latent]) == pytest.approx(strength, rel=1e-4, abs=1e-4)
                        n_seen += 1
    assert n_seen > 100


def test_there_are_readers_where_several_are_read(make_model):
    assert readers(make_model(n_models=3), ["a/h", "b/h", "c/h"]) == {"a": [0], "b": [1], "c": [2]}
    assert readers(make_model(n_models=1, n_hookpoints=2), ["a/h.0", "a/h.1"]) == {"h.0": [0], "h.1": [1]}
    assert readers(make_model(n_models=1), ["a/h"]) == {}
