"""What latents close, where it is known, and against hooks written by hand.

S sequence · M models · D width · L latents.
"""

from functools import partial

import pytest
import torch

from crosscode.data import ActivationHarvester, TokenBatch
from crosscode.data.text.labels import Labels
from crosscode.errors import InputError
from crosscode.evaluation.closes import measure_closes
from crosscode.models import ModelHookpointAcausalCrosscoder, ReLUActivation
from crosscode.models.architecture import split_for

WIDTH = 16
SPLIT = split_for("model_hookpoint_acausal")
HOOK = "blocks.1.hook_resid_post"


def coordinates():
    """Latents that are the coordinates of both models, each in both signs: together they hold all that there is."""
    eye_LMPD = torch.eye(2 * WIDTH).reshape(2 * WIDTH, 2, 1, WIDTH)
    model = ModelHookpointAcausalCrosscoder(2, 1, WIDTH, 4 * WIDTH, ReLUActivation(4 * WIDTH))
    with torch.no_grad():
        for weight in (model.W_enc_LXiDi, model.W_dec_LXoDo):
            weight.copy_(torch.cat([eye_LMPD, -eye_LMPD]))
        model.b_enc_L.zero_()
        model.b_dec_XoDo.zero_()
    model.fold_activation_scaling_into_weights_(torch.ones(2, 1), torch.ones(2, 1))
    return model.eval()


ALIVE = torch.ones(4 * WIDTH, dtype=torch.bool)


def test_all_latents_turn_one_model_into_the_other(harvester, batch):
    found = measure_closes(coordinates(), harvester, [batch], SPLIT, range(4 * WIDTH), ALIVE, n_random=0)
    assert found.kl > 0.1 and found.share == pytest.approx(1, abs=1e-5) and found.n_tokens == 4 * 8
    assert found.random_share is None and found.share_ci95 == pytest.approx([1, 1], abs=1e-5)
    back = measure_closes(
        coordinates(), harvester, [batch], SPLIT, range(4 * WIDTH), ALIVE, model_a=1, model_b=0, n_random=0
    )
    assert back.share == pytest.approx(1, abs=1e-5)


def log_probs(lm, tokens_S, delta_SD=None):
    layer, handles = lm.model.model.layers[1], []
    if delta_SD is not None:
        handles.append(layer.register_forward_hook(lambda module, args, out: out + delta_SD))
    try:
        with torch.no_grad():
            return lm.model(tokens_S[None], use_cache=False).logits[0].double().log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


def test_some_latents_close_what_they_close_by_hand(harvester, batch):
    model, latents = coordinates(), [3, WIDTH + 2, WIDTH + 9, 3 * WIDTH + 2]
    batch.mask_HS[:, 0] = False
    found = measure_closes(model, harvester, [batch], SPLIT, latents, ALIVE, n_random=4)
    a, b = harvester.models
    kl, closed, n = 0.0, 0.0, 0
    for tokens_S in batch.tokens_HS:
        with torch.no_grad():
            acts = [lm.model(tokens_S[None], output_hidden_states=True).hidden_states[2][0] for lm in (a, b)]
        x_SI = torch.cat(acts, 1)
        delta_SD = torch.zeros(len(tokens_S), WIDTH)
        for latent in latents:
            sign, coordinate = (1, latent) if latent < 2 * WIDTH else (-1, latent - 2 * WIDTH)
            value_S = (sign * x_SI[:, coordinate]).relu() * sign
            delta_SD[:, coordinate % WIDTH] += value_S if coordinate >= WIDTH else -value_S
        delta_SD[0] = 0
        p, q, r = log_probs(b, tokens_S), log_probs(a, tokens_S), log_probs(a, tokens_S, delta_SD)
        kl += float((p.exp() * (p - q)).sum(-1)[1:-1].sum())
        closed += float((p.exp() * (p - r)).sum(-1)[1:-1].sum())
        n += len(tokens_S) - 2
    assert found.n_tokens == n
    assert found.kl == pytest.approx(kl / n, rel=1e-4)
    assert found.kl_closed == pytest.approx(closed / n, rel=1e-4)
    assert found.share == pytest.approx(1 - closed / kl, abs=1e-4)
    assert found.share_ci95 is not None
    low, high = found.share_ci95
    assert low < found.share < high
    assert len(set(found.random_shares)) == 4
    assert found.random_share == pytest.approx(sum(found.random_shares) / 4)


def test_latents_that_both_models_share_alike_close_nothing(harvester, batch):
    model = coordinates()
    with torch.no_grad():
        model.W_dec_LXoDo[5] = torch.randn(1, 1, WIDTH).expand(2, 1, WIDTH)
    found = measure_closes(model, harvester, [batch], SPLIT, [5], ALIVE)
    assert found.share == pytest.approx(0, abs=1e-12) and found.random_share == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_compared_is_refused(harvester, batch):
    with pytest.raises(InputError, match="closes: no latents to add"):
        measure_closes(coordinates(), harvester, [batch], SPLIT, [], ALIVE)
    with pytest.raises(InputError, match="closes: 2 latents, but only 1 others fire"):
        measure_closes(coordinates(), harvester, [batch], SPLIT, [0, 1], torch.arange(4 * WIDTH) < 3)
    with pytest.raises(InputError, match="needs a crosscoder that writes to two language models"):
        measure_closes(coordinates(), harvester, [batch], SPLIT, [0], ALIVE, model_b=0)
    twice = ActivationHarvester([harvester.models[0]] * 2, [HOOK])
    with pytest.raises(InputError, match="predict the same, so there is nothing to close"):
        measure_closes(coordinates(), twice, [batch], SPLIT, [0], ALIVE)


def test_predictions_that_do_not_count_are_left_out(harvester, batch):
    """Of the four sequences two have something that counts; the others are left out of what says so."""
    keep_H, chosen_S = torch.tensor([1, 3]), torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 0], dtype=torch.bool)
    counted = TokenBatch(batch.tokens_HS[keep_H], chosen_S.expand(2, -1), None, 0)
    found = measure_closes(coordinates(), harvester, [batch], SPLIT, [3], ALIVE, n_random=0, counted=[counted])
    a, b = harvester.models
    kl = 0.0
    for tokens_S in batch.tokens_HS[keep_H]:
        p, q = log_probs(b, tokens_S), log_probs(a, tokens_S)
        kl += float((p.exp() * (p - q)).sum(-1)[chosen_S.nonzero()[:, 0] - 1].sum())
    assert found.n_tokens == 6 and found.kl == pytest.approx(kl / 6, rel=1e-4)


def test_each_group_of_predicted_tokens_has_figures_of_its_own(harvester, batch):
    role_HS = torch.arange(batch.tokens_HS.numel()).reshape(batch.tokens_HS.shape) % 3
    labels = Labels(role_HS.to(torch.uint8), torch.zeros_like(role_HS).short(), torch.zeros_like(role_HS))
    labelled, names = TokenBatch(batch.tokens_HS, batch.mask_HS, None, 0, labels), ["a", "b", "c"]
    measured = partial(measure_closes, coordinates(), harvester, latents=[3, WIDTH + 2], alive_L=ALIVE, n_random=2)
    found = measured(batches=[labelled], split=SPLIT, groupings={"source": ["one"], "role": names})
    assert set(found.groups) == {"role"}
    for number, name in enumerate(names):
        counted = TokenBatch(batch.tokens_HS, role_HS == number, None, 0)
        alone = measured(batches=[batch], split=SPLIT, counted=[counted])
        own = found.groups["role"][name]
        assert own.n_tokens == alone.n_tokens and own.kl == pytest.approx(alone.kl, rel=1e-6)
        assert own.share == pytest.approx(alone.share, abs=1e-6)
        assert own.random_shares == pytest.approx(alone.random_shares, abs=1e-6)
