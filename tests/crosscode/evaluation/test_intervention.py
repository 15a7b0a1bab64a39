"""Steering and ablation of the embedded language models against hooks written by hand.

S sequence · M models · P hookpoints · D width · L latents.
"""

import pytest
import torch

from crosscode.data import ActivationHarvester, load_language_model
from crosscode.demo import demo_model_path
from crosscode.errors import InputError
from crosscode.evaluation.intervention import Interventions
from crosscode.models import ARCHITECTURES, ReLUActivation, TopkActivation
from crosscode.models.architecture import split_for

RESID, IN, OUT = "blocks.{}.hook_resid_post", "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"
LATENTS = 40
IDS = torch.tensor([[1, 250, 17, 900, 33, 481, 77]])


@pytest.fixture(scope="module")
def lms():
    torch.set_num_threads(1)
    return [load_language_model(str(demo_model_path(name)), dtype="float32") for name in ("base", "tuned")]


@pytest.fixture
def interventions(lms):
    def make(kind, hookpoints, n_models=1, activation=None):
        split, harvester = split_for(kind), ActivationHarvester(lms[:n_models], hookpoints)
        dims = ARCHITECTURES[kind].dims_for(*harvester.dims)
        model = ARCHITECTURES[kind](**dims, n_latents=LATENTS, activation_fn=activation or ReLUActivation(LATENTS))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(0.1 * torch.randn(param.shape, generator=generator))
        scaling_MP = torch.rand(harvester.dims[:2], generator=generator) + 0.5
        model.fold_activation_scaling_into_weights_(*split.scaling(scaling_MP))
        return Interventions(model.eval(), split, harvester)

    return make


@torch.no_grad()
def logits_by_hand(lm, changes, ids=IDS):
    """`changes`: by hookpoint what is added, `(S, D)`."""
    handles = []
    for name, delta_SD in changes.items():
        layer = lm.model.model.layers[int(name.split(".")[1])]
        if name.endswith("mlp_out"):
            handles.append(layer.mlp.register_forward_hook(lambda m, a, out, d=delta_SD: out + d))
        else:
            handles.append(layer.register_forward_hook(lambda m, a, out, d=delta_SD: out + d))
    try:
        return lm.model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits_of(lm, ids=IDS):
    return lm.model(ids, use_cache=False).logits


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def where(positions, n_prompt):
    steps_S = torch.arange(IDS.shape[1])
    if positions == "all":
        return steps_S >= 0
    if positions == "prompt":
        return steps_S < n_prompt
    return steps_S >= (n_prompt if positions == "generated" else positions)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", 2, 5])
def test_steering_adds_decoder_vectors_at_the_positions_that_are_meant(positions, interventions, lms):
    it = interventions("model_hookpoint_acausal", [RESID.format(1), RESID.format(2)], 2)
    amounts, n_prompt = {3: 6.0, 11: -2.5}, 4
    for m, lm in enumerate(lms):
        W_LMPD = it.model.W_dec_LXoDo.detach()
        vector_PD = 6.0 * W_LMPD[3, m] - 2.5 * W_LMPD[11, m]
        on_S1 = where(positions, n_prompt).float()[:, None]
        expected = logits_by_hand(lm, {RESID.format(1 + p): on_S1 * vector_PD[p] for p in range(2)})
        assert not torch.allclose(expected, logits_of(lm), atol=1e-2)
        with it.steer(amounts, [m], positions), torch.no_grad():
            first = lm.model(IDS[:, :n_prompt], use_cache=True)
            parts, cache = [first.logits], first.past_key_values
            for s in range(n_prompt, IDS.shape[1]):
                parts.append(lm.model(IDS[:, s : s + 1], past_key_values=cache, use_cache=True).logits)
        assert_close(torch.cat(parts, 1), expected)


def test_only_the_chosen_models_are_steered_and_all_is_as_before_afterwards(interventions, lms):
    it = interventions("model_hookpoint_acausal", [RESID.format(2)], 2)
    before = [logits_of(lm) for lm in lms]
    with it.steer({0: 9.0}, [1]):
        assert torch.equal(logits_of(lms[0]), before[0])
        assert not torch.allclose(logits_of(lms[1]), before[1], atol=1e-2)
    with pytest.raises(RuntimeError), it.steer({0: 9.0}, [0, 1]):
        raise RuntimeError
    for lm, logits in zip(lms, before, strict=True):
        assert torch.equal(logits_of(lm), logits)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_zero_strength_changes_not_a_bit(interventions, lms):
    it = interventions("model_hookpoint_acausal", [RESID.format(2)], 2)
    for m, lm in enumerate(lms):
        plain = logits_of(lm)
        with it.steer({5: 0.0, 6: -0.0}, [m]):
            assert torch.equal(logits_of(lm).view(torch.int32), plain.view(torch.int32))


def test_latents_of_compound_models_act_where_they_write(interventions, lms):
    hookpoints = [IN.format(1), IN.format(2), OUT.format(1), OUT.format(2)]
    it = interventions("compound_cross_layer_transcoder", hookpoints)
    first, second = it.model.parts
    for latent, vectors in ((7, first.W_dec_LXoDo[7]), (25, second.W_dec_LXoDo[5])):
        layers = (1, 2)[-len(vectors) :]
        expected = logits_by_hand(
            lms[0], {OUT.format(i): 4.0 * v.detach().expand(7, -1) for i, v in zip(layers, vectors, strict=True)}
        )
        with it.steer({latent: 4.0}, [0]):
            assert_close(logits_of(lms[0]), expected)


def latents_by_hand(it, lms, hookpoints):
    """`a_SL`, from outputs of blocks that hooks written by hand saw."""
    acts = []
    for lm in lms:
        with torch.no_grad():
            states = lm.model(IDS, use_cache=False, output_hidden_states=True).hidden_states
        acts.append(torch.stack([states[int(name.split(".")[1]) + 1][0] for name in hookpoints], 1))
    acts_SMPD = torch.stack(acts, 1).double()
    h_SL = torch.einsum("smpd,lmpd->sl", acts_SMPD, it.model.W_enc_LXiDi.double()) + it.model.b_enc_L.double()
    if isinstance(it.model.activation_fn, TopkActivation):
        kept = h_SL.relu().topk(it.model.activation_fn.k).indices
        h_SL = torch.zeros_like(h_SL).scatter(1, kept, h_SL.relu().gather(1, kept))
    return h_SL.relu().float().detach()


@pytest.mark.parametrize("activation", [ReLUActivation(LATENTS), TopkActivation(8, LATENTS)], ids=["relu", "topk"])
@pytest.mark.parametrize("layers", [(2,), (1, 2)])
def test_ablation_takes_out_what_latents_write_and_keeps_the_error(activation, layers, interventions, lms):
    hookpoints = [RESID.format(layer) for layer in layers]
    it = interventions("model_hookpoint_acausal", hookpoints, 2, activation)
    a_SL = latents_by_hand(it, lms, hookpoints)
    latents = a_SL[3].topk(2).indices.tolist()
    for m, lm in enumerate(lms):
        written = torch.einsum("sn,npd->spd", a_SL[:, latents], it.model.W_dec_LXoDo.detach()[latents, m])
        expected = logits_by_hand(lm, {name: -written[:, p] for p, name in enumerate(hookpoints)})
        assert not torch.allclose(expected, logits_of(lm), atol=1e-2)
        with it.ablate(latents, [m]):
            assert_close(logits_of(lm), expected)
            with torch.no_grad():
                first = lm.model(IDS[:, :4], use_cache=True)
                rest = lm.model(IDS[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
            assert_close(torch.cat([first.logits, rest], 1), expected)


def test_what_is_read_under_ablation_is_what_is_left(interventions, lms):
    name = RESID.format(2)
    it = interventions("model_hookpoint_acausal", [name], 2)
    a_SL, before_SMD = latents_by_hand(it, lms, [name]), it.harvester.harvest(IDS)[0, :, :, 0]
    written_SMD = torch.einsum("sn,nmd->smd", a_SL[:, [3, 5]], it.model.W_dec_LXoDo.detach()[[3, 5], :, 0])
    with it.ablate([3, 5], [0, 1]):
        assert_close(it.harvester.harvest(IDS)[0, :, :, 0], before_SMD - written_SMD)


def test_generation_under_steering_is_generation_by_hand(interventions, lms):
    it = interventions("sae", [RESID.format(2)])
    vector_D = 8.0 * it.model.W_dec_LXoDo[9].detach()
    ids = IDS
    for _ in range(5):
        ids = torch.cat([ids, logits_by_hand(lms[0], {RESID.format(2): vector_D}, ids)[:, -1:].argmax(-1)], 1)
    with it.steer({9: 8.0}, [0]):
        made = lms[0].model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    assert made.tolist() == ids[:, : made.shape[1]].tolist() and made.shape[1] > IDS.shape[1]


def test_random_directions_have_the_norms_of_the_decoder_vectors(interventions):
    it = interventions("model_hookpoint_acausal", [RESID.format(1), RESID.format(2)], 2)
    real, random = it.vectors_NXD([3, 4]), it.random_vectors_NXD([3, 4], seed=1)
    torch.testing.assert_close(random.norm(dim=-1), real.norm(dim=-1))
    assert float(torch.cosine_similarity(random, real, dim=-1).abs().max()) < 0.5


def test_what_cannot_be_done_is_refused(interventions, lms):
    it = interventions("sae", [RESID.format(2)])
    with pytest.raises(InputError, match="given padded tokens; it must be given token ids"), it.ablate([1], [0]):
        lms[0].model(IDS, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]]))
    with pytest.raises(InputError, match="given embeddings"), it.ablate([1], [0]):
        lms[0].model(inputs_embeds=torch.zeros(1, 2, lms[0].d_model))
    with pytest.raises(InputError, match=r"latent = 40: must be between 0 and 39"), it.steer({40: 1.0}, [0]):
        pass
    with pytest.raises(InputError, match=r"ln1.hook_normalized.*is not a module's input or output"):
        interventions("sae", ["blocks.1.ln1.hook_normalized"])
