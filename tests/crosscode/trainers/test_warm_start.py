"""Training from a model that was trained before.

Axes: B tokens · M models · P hookpoints · D width.
"""

import pytest
import torch

from crosscode.errors import InputError
from crosscode.models import (
    ACTIVATIONS,
    AnthropicTransposeInit,
    CompoundCrossLayerTranscoder,
    ModelHookpointAcausalCrosscoder,
    SAEOrTranscoder,
)
from crosscode.models.architecture import split_for
from crosscode.models.checkpoint import read_weights_
from crosscode.trainers.warm_start import warm_start

N_LATENTS, WIDTH = 40, 8
SCALING_OLD, SCALING_NEW = torch.tensor([[0.5], [2.0]]), torch.tensor([[1.5], [0.7]])


def make(activation, n_latents=N_LATENTS, cls=ModelHookpointAcausalCrosscoder):
    options = dict(activation)
    activation_fn = ACTIVATIONS[options.pop("type")](**options, n_latents=n_latents)
    if cls is SAEOrTranscoder:
        return cls(WIDTH, WIDTH, n_latents, activation_fn, backend="torch")
    if cls is CompoundCrossLayerTranscoder:
        return cls(2, WIDTH, WIDTH, n_latents, activation_fn, backend="torch")
    return cls(2, 1, WIDTH, n_latents, activation_fn, backend="torch")


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "threshold" not in name:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return model


def raw_acts(n=64, seed=0, positions=(2, 1)):
    return torch.randn(n, *positions, WIDTH, generator=torch.Generator().manual_seed(seed))


def samples(scaling_MP):
    def stream():
        for seed in range(40):
            acts_BMPD = raw_acts(256, seed) * scaling_MP[..., None]
            yield acts_BMPD, acts_BMPD

    return stream


def start(model, folder, scaling_MP=SCALING_NEW):
    split = split_for("model_hookpoint_acausal")
    warm_start(model, str(folder), *split.scaling(scaling_MP), samples=samples(scaling_MP))
    return model


@pytest.mark.parametrize("activation", [{"type": "topk", "k": 5}, {"type": "relu"}, {"type": "jumprelu"}], ids=str)
def test_a_folded_model_starts_as_the_same_function_in_another_scaling(activation, tmp_path):
    old = randomised(make(activation))
    old.fold_activation_scaling_into_weights_(SCALING_OLD, SCALING_OLD)
    old.save(tmp_path / "final")
    new = start(make(activation), tmp_path / "final")
    assert not new.is_folded
    raw_BMPD = raw_acts()
    ours = new(raw_BMPD * SCALING_NEW[..., None]) / SCALING_NEW[..., None]
    torch.testing.assert_close(ours, old(raw_BMPD), rtol=1e-4, atol=1e-5)
    new.fold_activation_scaling_into_weights_(SCALING_NEW, SCALING_NEW)
    torch.testing.assert_close(new(raw_BMPD), old(raw_BMPD), rtol=1e-4, atol=1e-5)


def test_a_compound_model_starts_as_the_same_function(tmp_path):
    old = randomised(make({"type": "relu"}, cls=CompoundCrossLayerTranscoder))
    ones = torch.ones(2)
    old.fold_activation_scaling_into_weights_(ones * 0.5, ones * 3)
    old.save(tmp_path / "final")
    new = make({"type": "relu"}, cls=CompoundCrossLayerTranscoder)
    warm_start(new, str(tmp_path / "final"), ones * 2, ones * 4, samples=lambda: iter(()))
    assert not any(part.is_folded for part in (new, *new.parts))
    raw_BPD = raw_acts(positions=(2,))
    torch.testing.assert_close(new(raw_BPD * 2) / 4, old(raw_BPD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["run", "checkpoint"])
def test_a_run_and_a_checkpoint_start_where_they_stopped(where, make_trainer, planted):
    trainer = make_trainer(activation={"type": "batch_topk", "k": 3}, n_steps=4, checkpoint_every=2)
    # What `build_run` writes into every checkpoint.
    trainer.metadata |= {"architecture": "model_hookpoint_acausal"}
    trainer.train()
    source = trainer.run.path if where == "run" else trainer.run.checkpoint(4)
    again = make_trainer("again", activation={"type": "batch_topk", "k": 3})
    scaling_MP = planted().scaling_MP
    split = split_for("model_hookpoint_acausal")
    warm_start(again.model, str(source), *split.scaling(scaling_MP), samples=lambda: iter(()))
    saved = again.model.clone()
    read_weights_(saved, trainer.run.checkpoint(4))
    for ours, theirs in zip(again.model.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert again.model.activation_fn.threshold == saved.activation_fn.threshold


@pytest.mark.parametrize("k", [2, 6])
def test_a_topk_becomes_a_jumprelu_that_lets_through_k_latents_on_average(k, tmp_path):
    old = randomised(make({"type": "topk", "k": k}))
    old.fold_activation_scaling_into_weights_(SCALING_OLD, SCALING_OLD)
    old.save(tmp_path / "final")
    new = start(make({"type": "jumprelu"}), tmp_path / "final")
    l0_B = new.encode_latents(raw_acts(4000, seed=77) * SCALING_NEW[..., None]).l0_B()
    assert float(l0_B.double().mean()) == pytest.approx(k, rel=0.05)


@pytest.mark.parametrize("k", [3, 30])
@pytest.mark.parametrize("scope", ["layer", "all_layers"])
def test_a_compound_topk_becomes_a_jumprelu_that_keeps_its_k_where_it_kept_it(scope, k, tmp_path):
    if scope == "layer" and k > N_LATENTS // 2:
        pytest.skip("a layer has no more latents")
    topk = ACTIVATIONS["topk"](k=k, n_latents=N_LATENTS)
    old = randomised(CompoundCrossLayerTranscoder(2, WIDTH, WIDTH, N_LATENTS, topk, topk_scope=scope, backend="torch"))
    with torch.no_grad():  # one layer is much louder: most of the k largest of all are its own
        old.layers[1].W_enc_LXiDi.mul_(3)
        for part in old.parts:
            part.b_enc_L.add_(2)
    old.fold_activation_scaling_into_weights_(torch.ones(2), torch.ones(2))
    old.save(tmp_path / "final")
    new = make({"type": "jumprelu"}, cls=CompoundCrossLayerTranscoder)

    def positions(n, seed):
        return raw_acts(n, seed, positions=(2,))

    stream = lambda: ((positions(256, seed), None) for seed in range(40))  # noqa: E731
    warm_start(new, str(tmp_path / "final"), torch.ones(2), torch.ones(2), samples=stream)
    acts_BPD = torch.cat([positions(256, seed) for seed in range(32)])
    l0_S = (new.encode(acts_BPD) > 0).reshape(len(acts_BPD), 2, -1).sum(2).double().mean(0)
    if scope == "layer":
        assert l0_S.tolist() == pytest.approx([k, k], rel=0.02)
    else:
        assert float(l0_S.sum()) == pytest.approx(k, rel=0.02) and abs(l0_S[1] - l0_S[0]) > 0.5


@pytest.mark.parametrize(("before", "after"), [("log", "linear"), ("linear", "log")])
def test_jumprelu_keeps_its_thresholds_whatever_is_their_parameter(before, after, tmp_path):
    old = randomised(make({"type": "jumprelu", "thresholds": before}))
    old.activation_fn.set_thresholds_(torch.linspace(0.1, 3, N_LATENTS))
    old.fold_activation_scaling_into_weights_(SCALING_OLD, SCALING_OLD)
    old.eval().save(tmp_path / "final")
    new = start(make({"type": "jumprelu", "thresholds": after}), tmp_path / "final")
    torch.testing.assert_close(new.activation_fn.cutoffs_L(), torch.linspace(0.1, 3, N_LATENTS))


@pytest.mark.parametrize("rank_by", ["activation", "decoder_norm_weighted"])
def test_a_batch_topk_becomes_a_jumprelu_with_its_threshold(rank_by, tmp_path):
    old = randomised(make({"type": "batch_topk", "k": 4, "rank_by": rank_by}))
    old.activation_fn.threshold.fill_(1.3)
    old.fold_activation_scaling_into_weights_(SCALING_OLD, SCALING_OLD)
    old.eval().save(tmp_path / "final")
    new = start(make({"type": "jumprelu"}), tmp_path / "final")
    raw_BMPD = raw_acts(500)
    ours, theirs = new.encode(raw_BMPD * SCALING_NEW[..., None]), old.encode(raw_BMPD)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"type": "relu"}, {"type": "jumprelu"}, "'relu' cannot become 'jumprelu'"),
        ({"type": "topk", "k": 3}, {"type": "topk", "k": 3}, "n_latents|W_enc"),
    ],
)
def test_what_does_not_fit_is_named(before, after, message, tmp_path):
    old = randomised(make(before, n_latents=N_LATENTS if before != after else 20))
    old.fold_activation_scaling_into_weights_(SCALING_OLD, SCALING_OLD)
    old.save(tmp_path / "final")
    with pytest.raises(InputError, match=message) as caught:
        start(make(after), tmp_path / "final")
    assert "finetune_from" in str(caught.value)


def test_another_architecture_and_a_missing_model_are_named(tmp_path):
    old = make({"type": "relu"}, cls=SAEOrTranscoder)
    old.init_weights(AnthropicTransposeInit())
    old.fold_activation_scaling_into_weights_(torch.tensor(1.0), torch.tensor(1.0))
    old.save(tmp_path / "final")
    with pytest.raises(InputError, match="does not fit this config"):
        start(make({"type": "relu"}), tmp_path / "final")
    with pytest.raises(InputError, match=r"finetune_from = .*nowhere"):
        start(make({"type": "relu"}), "/nowhere")


def test_an_unfolded_model_without_its_scaling_is_refused(tmp_path):
    randomised(make({"type": "relu"})).save(tmp_path / "plain")
    with pytest.raises(InputError, match="without folded scaling"):
        start(make({"type": "relu"}), tmp_path / "plain")
