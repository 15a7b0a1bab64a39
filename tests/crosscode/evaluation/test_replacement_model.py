"""The replacement model against a forward pass written out by hand.

S sequence · D width · V vocabulary.
"""

import pytest
import torch

from crosscode.data import ActivationHarvester, TokenBatch
from crosscode.data.text.labels import Labels
from crosscode.evaluation.replacement_model import WAYS, measure_replacement_model
from crosscode.models import (
    AnthropicSTEJumpReLUActivation,
    CompoundCrossLayerTranscoder,
    CrossLayerTranscoder,
    ReLUActivation,
    SAEOrTranscoder,
    TopkActivation,
)
from crosscode.models.architecture import split_for

WIDTH, N = 16, 24
IN, OUT, RESID = "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out", "blocks.{}.hook_resid_post"
COMPOUND = [IN.format(0), IN.format(1), IN.format(2), OUT.format(0), OUT.format(1), OUT.format(2)]


def filled(model, kind, harvester):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_((0.05 if "threshold" in name else 0.3) * torch.randn(param.shape, generator=generator))
    split = split_for(kind)
    scaling_MP = torch.rand(harvester.dims[:2], generator=generator) + 0.5
    model.fold_activation_scaling_into_weights_(*split.scaling(scaling_MP))
    return model.eval()


def batches_of():
    generator = torch.Generator().manual_seed(2)
    tokens_HS = torch.randint(3, 60, (4, 9), generator=generator)
    mask_HS = torch.ones_like(tokens_HS, dtype=torch.bool)
    mask_HS[:, 0] = False
    mask_HS[1, 5] = False
    return [TokenBatch(tokens_HS, mask_HS, None, 0)]


COMPOUNDS = {
    "own layer": {},
    "later layers only": {"own_layer": False},
    "skip": {"linear_skip": True},
    "set": {"later_layers": False},
    "no bias": {"use_decoder_bias": False},
}


def compound(lm, activation=None, **options):
    harvester = ActivationHarvester([lm], COMPOUND)
    model = CompoundCrossLayerTranscoder(3, WIDTH, WIDTH, N, activation or ReLUActivation(N), **options)
    return harvester, filled(model, "compound_cross_layer_transcoder", harvester)


def outputs_by_hand(model, inputs):
    """Output of each layer, in float64, from the inputs of the layers up to it (`(S, D)` each)."""
    first = 0 if model.own_layer else 1
    b_dec = torch.zeros(3, WIDTH) if model.b_dec_XoDo is None else model.b_dec_XoDo
    n = len(inputs)
    y_D = b_dec[n - 1].double()
    for source in range(n - first) if model.later_layers else [n - 1]:
        part, x_SD = model.parts[source], inputs[source].double()
        h_SL = x_SD @ part.W_enc_LXiDi.double().T + part.b_enc_L.double()
        if isinstance(part.activation_fn, AnthropicSTEJumpReLUActivation):
            a_SL = h_SL * (h_SL > part.activation_fn.log_threshold_L.double().exp())
        else:
            a_SL = h_SL.relu()
        written = torch.einsum("sl,lpd->spd", a_SL, part.W_dec_LXoDo.double())
        if part.W_skip_XiDiXoDo is not None:
            written = written + torch.einsum("sd,dpe->spe", x_SD, part.W_skip_XiDiXoDo.double())
        y_D = y_D + written[:, n - 1 - (source + first)]
    return y_D.float().expand(inputs[0].shape[0], -1)


@torch.no_grad()
def logits_by_hand(lm, model, tokens_S, mask_S, errors=None):
    """Each MLP's output at usable positions computed from the inputs of the MLPs that this very run has had."""
    inputs, handles = [], []

    def mlp(module, args, output, layer):
        inputs.append(args[0][0])
        new_SD = outputs_by_hand(model, inputs)
        if errors is not None:
            new_SD = new_SD + errors[layer]
        return torch.where(mask_S[:, None], new_SD, output[0])[None]

    for i, block in enumerate(lm.model.model.layers):
        handles.append(block.mlp.register_forward_hook(lambda m, a, o, i=i: mlp(m, a, o, i)))
    try:
        return lm.model(tokens_S[None], use_cache=False).logits[0].double()
    finally:
        for handle in handles:
            handle.remove()


def figures_by_hand(clean, found, batch):
    ce, kl, same, n = 0.0, 0.0, 0, 0
    for tokens_S, mask_S, clean_SV, found_SV in zip(batch.tokens_HS, batch.mask_HS, clean, found, strict=True):
        for s in range(len(tokens_S) - 1):
            if mask_S[s] and mask_S[s + 1]:
                p_V, q_V = clean_SV[s].softmax(-1), found_SV[s].softmax(-1)
                ce -= float(q_V[tokens_S[s + 1]].log())
                kl += float((p_V * (p_V / q_V).log()).sum())
                same += int(p_V.argmax() == q_V.argmax())
                n += 1
    return ce / n, kl / n, same / n


@pytest.mark.parametrize("activation", [ReLUActivation, AnthropicSTEJumpReLUActivation])
@pytest.mark.parametrize("options", COMPOUNDS.values(), ids=COMPOUNDS)
def test_layers_read_what_the_replaced_layers_before_have_made(options, activation, lm):
    harvester, model = compound(lm, activation(N), **options)
    (batch,) = batches_of()
    found = measure_replacement_model(model, harvester, [batch], split_for("compound_cross_layer_transcoder"))
    with torch.no_grad():
        clean = [lm.model(tokens_S[None]).logits[0].double() for tokens_S in batch.tokens_HS]
    by_hand = [logits_by_hand(lm, model, *pair) for pair in zip(batch.tokens_HS, batch.mask_HS, strict=True)]
    ce, kl, same = figures_by_hand(clean, by_hand, batch)
    assert found.n_tokens == int((batch.mask_HS[:, :-1] & batch.mask_HS[:, 1:]).sum())
    assert found.ce["from_own_outputs"] == pytest.approx(ce, rel=1e-4)
    assert found.kl["from_own_outputs"] == pytest.approx(kl, rel=1e-4)
    assert found.top1_agreement["from_own_outputs"] == pytest.approx(same)
    assert found.kl["from_own_outputs"] > 1e-3
    assert found.kl["from_clean_inputs"] != pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("activation", [ReLUActivation(N), TopkActivation(3, N)], ids=["relu", "topk"])
@pytest.mark.parametrize("options", COMPOUNDS.values(), ids=COMPOUNDS)
def test_with_error_terms_it_is_the_language_model_to_rounding(options, activation, lm):
    harvester, model = compound(lm, activation, **options)
    found = measure_replacement_model(model, harvester, batches_of(), split_for("compound_cross_layer_transcoder"))
    assert found.kl["with_error_terms"] == pytest.approx(0, abs=1e-6)
    assert found.ce["with_error_terms"] == pytest.approx(found.ce_clean, rel=1e-6)
    assert found.top1_agreement["with_error_terms"] == 1
    assert found.top1_agreement["from_own_outputs"] < 1


@pytest.mark.parametrize("path", ["modules", "bridge"])
def test_one_source_with_several_outputs_has_the_same_figures_either_way(path, lm):
    first = IN.format(0) if path == "modules" else "blocks.0.ln2.hook_normalized"
    harvester = ActivationHarvester([lm], [first, OUT.format(0), OUT.format(1)])
    assert harvester.paths == [path]
    model = filled(CrossLayerTranscoder(2, WIDTH, WIDTH, N, ReLUActivation(N)), "cross_layer_transcoder", harvester)
    found = measure_replacement_model(model, harvester, batches_of(), split_for("cross_layer_transcoder"))
    assert found.kl["from_own_outputs"] == pytest.approx(found.kl["from_clean_inputs"], rel=1e-5)
    assert found.kl["with_error_terms"] == pytest.approx(0, abs=1e-6) and set(found.ce) == {*WAYS}


def test_what_has_no_replacement_model_has_none(lm, caplog):
    harvester = ActivationHarvester([lm], [IN.format(1), OUT.format(1)])
    transcoder = filled(SAEOrTranscoder(WIDTH, WIDTH, N, ReLUActivation(N)), "transcoder", harvester)
    assert measure_replacement_model(transcoder, harvester, batches_of(), split_for("transcoder")) is None
    harvester, model = compound(lm, TopkActivation(3, N), topk_scope="all_layers")
    split = split_for("compound_cross_layer_transcoder")
    with caplog.at_level("INFO"):
        assert measure_replacement_model(model, harvester, batches_of(), split) is None
    assert "selects over layers that come later" in caplog.text


def test_an_output_before_its_input_has_none_and_nothing_stays_behind(lm, caplog):
    harvester = ActivationHarvester([lm], [IN.format(1), OUT.format(0), OUT.format(1)])
    model = filled(CrossLayerTranscoder(2, WIDTH, WIDTH, N, ReLUActivation(N)), "cross_layer_transcoder", harvester)
    assert measure_replacement_model(model, harvester, batches_of(), split_for("cross_layer_transcoder")) is None
    assert "not measured, as 'blocks.0.hook_mlp_out' comes before an input that it is computed from" in caplog.text
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_groups_of_predicted_tokens_make_up_the_whole(lm):
    harvester, model = compound(lm)
    whole = batches_of()[0]
    role_HS = torch.arange(36).reshape(4, 9) % 2
    labels = Labels(role_HS.to(torch.uint8), torch.zeros(4, 9).short(), torch.zeros(4, 9).long())
    batch = TokenBatch(whole.tokens_HS, whole.mask_HS, None, 0, labels)
    split = split_for("compound_cross_layer_transcoder")
    groupings = {"source": ["one"], "role": ["even", "odd"]}
    found = measure_replacement_model(model, harvester, [batch], split, groupings=groupings)
    own = found.groups["role"]
    both_HS = whole.mask_HS[:, :-1] & whole.mask_HS[:, 1:]
    assert [own[name].n_tokens for name in ("even", "odd")] == [
        int((both_HS & (role_HS[:, 1:] == number)).sum()) for number in (0, 1)
    ]
    for way in WAYS:
        total = sum(one.n_tokens * one.kl[way] for one in own.values())
        assert total == pytest.approx(found.n_tokens * found.kl[way], rel=1e-9)
    with torch.no_grad():
        log_prob_HSV = harvester.models[0].model(whole.tokens_HS).logits[:, :-1].double().log_softmax(-1)
    ce_HS = -log_prob_HSV.gather(-1, whole.tokens_HS[:, 1:, None])[..., 0]
    assert own["odd"].ce_clean == pytest.approx(float(ce_HS[both_HS & (role_HS[:, 1:] == 1)].mean()), rel=1e-5)
