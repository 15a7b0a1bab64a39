"""An SAE on the difference of two models, in what is done with language models, by hand.

H sequences · S sequence · M models · D width · L latents.
"""

import pytest
import torch

from crosscode.errors import InputError
from crosscode.evaluation.closes import measure_closes
from crosscode.evaluation.intervention import Interventions
from crosscode.evaluation.loss_recovered import measure_loss_recovered
from crosscode.models import ReLUActivation, SAEOrTranscoder
from crosscode.models.architecture import split_for

WIDTH, HOOK = 16, "blocks.1.hook_resid_post"
SPLIT = split_for("diff_sae")


def coordinates(share=1.0):
    """Latents that are the coordinates of the difference, in both signs; `share` of it is reconstructed."""
    eye_LD = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    model = SAEOrTranscoder(WIDTH, WIDTH, 2 * WIDTH, ReLUActivation(2 * WIDTH))
    with torch.no_grad():
        model.W_enc_LXiDi.copy_(eye_LD)
        model.W_dec_LXoDo.copy_(share * eye_LD)
        model.b_enc_L.zero_()
        model.b_dec_XoDo.zero_()
    model.fold_activation_scaling_into_weights_(*SPLIT.scaling(torch.ones(2, 1)))
    return model.eval()


def logits(lm, tokens_HS, acts_HSD=None):
    """With `acts_HSD` in the place of what the second layer gives."""
    layer, handles = lm.model.model.layers[1], []
    if acts_HSD is not None:
        handles.append(layer.register_forward_hook(lambda module, args, out: acts_HSD))
    try:
        with torch.no_grad():
            return lm.model(tokens_HS, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def cross_entropy(logits_HSV, tokens_HS):
    log_prob_HSV = logits_HSV[:, :-1].double().log_softmax(-1)
    return float(-log_prob_HSV.gather(-1, tokens_HS[:, 1:, None]).mean())


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_difference_is_spliced_into_the_second_model_on_top_of_the_first(share, harvester, batch):
    found = measure_loss_recovered(coordinates(share), harvester, [batch], SPLIT, [[f"A/{HOOK}"], [f"B/{HOOK}"]])
    (one,) = found.values()
    acts_HSMD = harvester.harvest(batch.tokens_HS)[:, :, :, 0]
    a_HSD, b_HSD = acts_HSMD.unbind(2)
    b = harvester.models[1]
    assert list(found) == [f"B/{HOOK}"]
    for figure, acts_HSD in (("clean", None), ("zero", a_HSD), ("spliced", a_HSD + share * (b_HSD - a_HSD))):
        expected = cross_entropy(logits(b, batch.tokens_HS, acts_HSD), batch.tokens_HS)
        assert getattr(one, f"ce_{figure}") == pytest.approx(expected, abs=1e-5), figure


def test_latents_of_the_difference_steer_either_model(harvester, batch):
    model = coordinates(0.5)
    for m, lm in enumerate(harvester.models):
        plain_HSD = harvester.harvest(batch.tokens_HS)[:, :, m, 0]
        expected = logits(lm, batch.tokens_HS, plain_HSD + 0.5 * (3 * torch.eye(WIDTH)[2] - 2 * torch.eye(WIDTH)[5]))
        with Interventions(model, SPLIT, harvester).steer({2: 3.0, 5 + WIDTH: 2.0}, [m]), torch.no_grad():
            found = lm.model(batch.tokens_HS, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_ablating_every_latent_turns_the_second_model_into_the_first_and_leaves_that_alone(harvester, batch):
    a_HSD = harvester.harvest(batch.tokens_HS)[:, :, 0, 0]
    a, b = harvester.models
    with Interventions(coordinates(), SPLIT, harvester).ablate(range(2 * WIDTH), [0, 1]), torch.no_grad():
        found = [lm.model(batch.tokens_HS, use_cache=False).logits for lm in (a, b)]
    torch.testing.assert_close(found[0], logits(a, batch.tokens_HS), rtol=0, atol=0)
    torch.testing.assert_close(found[1], logits(b, batch.tokens_HS, a_HSD), rtol=0, atol=1e-4)


def test_all_latents_of_the_difference_close_it(harvester, batch):
    alive_L = torch.ones(2 * WIDTH, dtype=torch.bool)
    found = measure_closes(coordinates(), harvester, [batch], SPLIT, range(2 * WIDTH), alive_L, n_random=0)
    assert found.kl > 0.1 and found.share == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="needs a crosscoder that writes to two"):
        measure_closes(coordinates(), harvester, [batch], SPLIT, [0], alive_L, model_a=1, model_b=0, n_random=0)
