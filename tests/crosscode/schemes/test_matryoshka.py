"""Nested dictionaries: the loss of every prefix, and prefixes as models of their own.

Axes: B tokens · S prefixes · L latents.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from crosscode.errors import InputError
from crosscode.evaluation.heldout import measure_reconstruction
from crosscode.models import (
    BaseCrosscoder,
    CompoundCrossLayerTranscoder,
    ModelHookpointAcausalCrosscoder,
    SAEOrTranscoder,
)
from crosscode.models.architecture import split_for
from crosscode.models.prefixes import sizes_of
from crosscode.objectives import MatryoshkaTerm
from crosscode.trainers.prefix_thresholds import calibrate_prefixes_

ARCHITECTURES = ["sae_pre_bias", "skip_transcoder", "acausal_3x2", "cross_layer_skip", "compound_skip_later_only"]
SIZES = (6, 12, 18)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu", "relu"])
def test_the_loss_is_its_formula(architecture, activation, backend, make_case, objective, context, dictionary, check):
    case = make_case(architecture, activation, backend=backend, prefixes=SIZES)
    formula = dictionary(case, activation)
    loss = objective({"recon": {}, "matryoshka": {"weight": 0.7}})(context(case), 0, 10)
    a_S = formula.latents()
    nested = torch.stack([formula.recon_of_prefix(a_S, size) for size in SIZES]).sum()
    check(case, formula, loss, formula.recon(a_S) + 0.7 * nested)


@pytest.mark.parametrize("architecture", ["sae", "compound"])
def test_every_prefix_has_the_bias(architecture, make_case, objective, context):
    """The trap: without latents each prefix gives the bias, so its error is that of the bias alone."""
    case = make_case(architecture, "relu", prefixes=SIZES)
    with torch.no_grad():
        for part in case.model.parts:
            part.b_enc_L.fill_(-1e6)
    loss = objective({"matryoshka": {}})(context(case), 0, 10)
    of_bias = (case.target_BXoDo - case.model.b_dec_XoDo).flatten(1).square().sum(1).mean()
    torch.testing.assert_close(loss.total, len(SIZES) * of_bias)


def test_sampled_prefixes_are_those_of_a_step(make_case):
    model = make_case("compound", "topk", prefixes=[6]).model
    term, again = (MatryoshkaTerm(sampled=4, seed=3) for _ in range(2))
    drawn = []
    for _ in range(20):
        drawn.append(term.sizes(model))
        assert term.sizes(model) == drawn[-1]
        term.after_step(torch.tensor(0.0), 0, 1)
    assert len(set(drawn)) > 5
    for sizes in drawn:
        assert list(sizes) == sorted(set(sizes)) and all(6 <= size < 24 and size % 3 == 0 for size in sizes)
    again.load_state_dict({"n_steps": 7})
    assert again.sizes(model) == drawn[7]


def test_sizes_are_checked(make_case):
    assert sizes_of([0.25, 12], 24) == (6, 12) and sizes_of([0.3], 24, 3) == (6,)
    for given, message in (
        ([12, 6], r"must ascend, got \[12, 6\]"),
        ([24], r"24 gives 24 latents; must be a whole number from 1 to 23"),
        ([2.5], r"2.5 gives 2.5 latents"),
        ([0.001], r"0.001 gives 0 latents"),
    ):
        with pytest.raises(InputError, match=message):
            sizes_of(given, 24)
    with pytest.raises(InputError, match="a multiple of the 3 source layers"):
        sizes_of([7], 24, 3)
    with pytest.raises(InputError, match=r"prefixes = \[6\]: do not go with tied latents"):
        make_case("acausal_shared", "topk", prefixes=[6])
    with pytest.raises(InputError, match=r"prefixes = \[6\]: do not go with a partition"):
        make_case("acausal_2x1", "topk", prefixes=[6], partition=[{"models": [0], "n_latents": 3}])
    with pytest.raises(InputError, match=r"objective.matryoshka: needs crosscoder.prefixes"):
        MatryoshkaTerm().check_model(make_case("sae", "topk").model)


def nested(model, case, size):
    """What the whole model keeps of a prefix, and decodes."""
    result = model.forward_train(case.input_BXiDi)
    own = size // len(model.parts)
    kept = [latents.slice_latents(0, own).to_dense() for latents in result.latents_of_parts]
    return torch.cat(kept, 1), model.decode_prefixes(result.latents_of_parts, case.input_BXiDi, [size])[:, 0]


def settled(model, case, batches=None):
    """As the end of training leaves it."""
    for fn in model.activation_fns:
        if fn.selects_over_batch:
            fn.settle_threshold_(torch.tensor(0.4))
    calibrate_prefixes_(model, batches or [case.input_BXiDi])
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("activation", ["jumprelu", "jumprelu_linear", "relu"])
def test_a_prefix_is_what_the_whole_keeps_of_it(architecture, activation, make_case, tmp_path):
    case = make_case(architecture, activation, prefixes=SIZES)
    model = settled(case.model, case)
    for size in SIZES:
        a_BL, y_BXoDo = nested(model, case, size)
        prefix = model.prefix(size)
        assert type(prefix) is type(model) and prefix.n_latents == size and not prefix.training
        assert prefix.prefixes == tuple(smaller for smaller in SIZES if smaller < size)
        torch.testing.assert_close(prefix.encode(case.input_BXiDi), a_BL)
        torch.testing.assert_close(prefix(case.input_BXiDi), y_BXoDo)
        prefix.save(tmp_path / str(size))
        again = BaseCrosscoder.load(tmp_path / str(size))
        assert torch.equal(again(case.input_BXiDi), prefix(case.input_BXiDi))
        assert again.prefixes == prefix.prefixes


ALL_LAYERS = {"topk_scope": "all_layers"}


@pytest.mark.parametrize(
    ("architecture", "options"), [("sae", {}), ("acausal_2x1", {}), ("compound", {}), ("compound", ALL_LAYERS)]
)
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "batch_topk_by_norm"])
def test_a_prefix_keeps_as_many_latents_as_training_by_a_threshold_of_its_own(
    architecture, options, activation, make_case, tmp_path
):
    case = make_case(architecture, activation, prefixes=SIZES, n_tokens=64, **options)
    model, batches = (
        case.model.train(),
        [case.input_BXiDi, 4 * case.input_BXiDi],
    )  # of which BatchTopK keeps by other thresholds
    kept = {
        size: sum(int((nested(model, replace(case, input_BXiDi=x), size)[0] > 0).sum()) for x in batches)
        for size in SIZES
    }
    settled(model, case, batches)

    def n_kept(prefix):
        return sum(int((prefix.encode(x) > 0).sum()) for x in batches)

    for size in SIZES:
        prefix = model.prefix(size)
        assert n_kept(prefix) == kept[size]
        assert type(prefix) is type(model) and prefix.n_latents == size and not prefix.training
        prefix.save(tmp_path / str(size))
        again = BaseCrosscoder.load(tmp_path / str(size))
        assert torch.equal(again(case.input_BXiDi), prefix(case.input_BXiDi))
        assert again.prefixes == tuple(smaller for smaller in SIZES if smaller < size)
        for smaller in again.prefixes:  # a prefix of a prefix is the prefix
            assert torch.equal(again.prefix(smaller)(case.input_BXiDi), model.prefix(smaller)(case.input_BXiDi))
    # The trap: with the threshold of another prefix it is another number.
    for part in model.parts:
        part.prefix_thresholds_S.copy_(part.prefix_thresholds_S.roll(1))
    assert any(n_kept(model.prefix(size)) != kept[size] for size in SIZES)


def test_a_prefix_of_batch_topk_that_was_not_named_has_the_threshold_of_the_whole(make_case):
    case = make_case("sae", "batch_topk", prefixes=SIZES)
    model = settled(case.model, case)
    a_BL, y_BD = nested(model, case, 7)
    torch.testing.assert_close(model.prefix(7).encode(case.input_BXiDi), a_BL)
    torch.testing.assert_close(model.prefix(7)(case.input_BXiDi), y_BD)


def test_prefixes_that_cannot_stand_alone_say_so(make_case):
    with pytest.raises(InputError, match="no threshold was calibrated for 6 latents"):
        make_case("sae", "topk", prefixes=[6]).model.prefix(6)
    case = make_case("sae", "topk", prefixes=[6])
    with pytest.raises(InputError, match="no threshold was calibrated for 7 latents"):
        settled(case.model, case).prefix(7)
    with pytest.raises(InputError, match="'groupmax' keeps latents by what the others are"):
        make_case("sae", "groupmax").model.prefix(6)
    assert make_case("sae", "relu").model.prefix(7).n_latents == 7


def test_a_trained_model_has_the_thresholds_of_its_prefixes(make_trainer):
    trainer = make_trainer(
        n_steps=3,
        activation={"type": "topk", "k": 4},
        objective={"recon": {}, "matryoshka": {}},
        model_options={"prefixes": [6, 12]},
    )
    trainer.train()
    final = BaseCrosscoder.load(trainer.run.final)
    assert (final.prefix_thresholds_S > 0).all()
    assert final.prefix(6).is_folded and final.prefix(12).prefixes == (6,)


@pytest.mark.parametrize(("architecture", "kind"), [("sae", "sae"), ("acausal_2x1", "model_hookpoint_acausal")])
def test_held_out_figures_of_a_prefix_are_those_of_the_prefix_alone(architecture, kind, make_case):
    case = make_case(architecture, "jumprelu", prefixes=SIZES, dtype=torch.float32)
    model = case.model.eval()
    split = split_for(kind)
    acts_BMPD = torch.randn(64, 2 if kind != "sae" else 1, 1, 5)
    names = [str(x) for x in range(len(model.segments))]
    scaling_MP = torch.full(acts_BMPD.shape[1:3], 1.5)
    found = measure_reconstruction(model, [acts_BMPD], split, names, scaling_MP)
    assert [prefix.n_latents for prefix in found.prefixes] == list(SIZES)
    for prefix in found.prefixes:
        alone = measure_reconstruction(model.prefix(prefix.n_latents), [acts_BMPD], split, names, scaling_MP)
        assert (prefix.fvu, prefix.l0) == (pytest.approx(alone.fvu, rel=1e-5), pytest.approx(alone.l0))
        assert found.as_metrics()[f"eval/fvu_of_first/{prefix.n_latents}"] == prefix.fvu


LAYERS = [f"blocks.{p}.{hook}" for hook in ("mlp.hook_in", "hook_mlp_out") for p in range(3)]
RESIDUAL = ["blocks.0.hook_resid_post"]
EXPORTED = {
    "sae": (partial(SAEOrTranscoder, 5, 5), "sae", RESIDUAL, "saelens"),
    "transcoder": (partial(SAEOrTranscoder, 5, 5, linear_skip=True), "transcoder", LAYERS[::3], "circuit-tracer"),
    "crosscoder": (partial(ModelHookpointAcausalCrosscoder, 2, 1, 5), None, RESIDUAL, "dictionary-learning"),
    "compound": (partial(CompoundCrossLayerTranscoder, 3, 5, 5), None, LAYERS, "circuit-tracer"),
    "set": (partial(CompoundCrossLayerTranscoder, 3, 5, 5, later_layers=False), None, LAYERS, "circuit-tracer"),
}


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_a_prefix_exports(name, activation, make_case, randomise, tmp_path):
    make, architecture, hookpoints, to = EXPORTED[name]
    case = make_case("sae", activation)
    model = randomise(make(24, case.model.activation_fn, prefixes=SIZES))
    x_BXiDi = torch.randn(16, *model.in_dims, 5)
    settled(model, case, [x_BXiDi])
    scaling = torch.tensor(1.5)
    model.fold_activation_scaling_into_weights_(scaling.expand(model.in_dims), scaling.expand(model.out_dims))
    language_models = [{"path": one, "name": one} for one in ("gpt2", "other")][: 1 + (name == "crosscoder")]
    model.metadata = {
        "language_models": language_models, "hookpoints": hookpoints, "architecture": architecture or model.kind,
    }  # fmt: skip
    prefix = model.prefix(12)
    if (name, activation) == ("crosscoder", "jumprelu"):
        with pytest.raises(InputError, match="its crosscoders have ReLU and BatchTopK, not jumprelu"):
            prefix.export(to, tmp_path / "exported")
        return
    again = BaseCrosscoder.load(prefix.export(to, tmp_path / "exported"))
    assert type(again) is type(prefix) and again.n_latents == 12
    torch.testing.assert_close(again(x_BXiDi), prefix(x_BXiDi))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "acausal_2x1", "cross_layer"])
@pytest.mark.parametrize(
    "activation", ["topk", "batch_topk", "batch_topk_by_norm", "jumprelu", "jumprelu_linear", "relu"]
)
def test_a_prefix_of_what_was_folded_is_what_is_folded_of_a_prefix(architecture, activation, make_case, tmp_path):
    """Scaling, and decoder norms where they fold, in either order, through a file and in a copy."""
    case = make_case(architecture, activation, prefixes=SIZES)
    model, x_BXiDi = settled(case.model, case), case.input_BXiDi
    factors = torch.linspace(0.4, 2.5, 12, dtype=x_BXiDi.dtype)
    scaling = [factors[: dims.numel()].reshape(dims) for dims in map(torch.Size, (model.in_dims, model.out_dims))]
    if model.in_dims == model.out_dims:
        scaling[1] = scaling[0]
    prefix = model.prefix(12)
    expected = prefix(x_BXiDi) / scaling[1][..., None]
    folded_first, folded_later = model.with_folded_scaling_factors(*scaling), prefix
    folded_later.fold_activation_scaling_into_weights_(*scaling)
    folded_first.save(tmp_path / "whole")
    coders = [
        folded_later,
        *(one.prefix(12) for one in (folded_first, BaseCrosscoder.load(tmp_path / "whole"), folded_first.clone())),
    ]
    raw_BXiDi = x_BXiDi / scaling[0][..., None]
    for coder in coders:
        torch.testing.assert_close(coder(raw_BXiDi), expected)
    if activation in ("topk", "batch_topk"):
        return  # what is ranked would be another
    folded_first.fold_decoder_norms_into_encoder_()
    folded_later.fold_decoder_norms_into_encoder_()
    for coder in (folded_later, folded_first.prefix(12), folded_first.prefix(18).prefix(12)):
        torch.testing.assert_close(coder(raw_BXiDi), expected)
