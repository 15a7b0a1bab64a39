"""Mean differences of activations, by hand.

H sequences · S sequence · D width.
"""

import copy

import pytest
import torch

from crosscode.commands.cli import main
from crosscode.data import ActivationHarvester, TokenBatch, load_language_model, wrap_language_model
from crosscode.data.harvest.unembedding import unembed
from crosscode.data.text.labels import Labels
from crosscode.errors import InputError
from crosscode.evaluation.difference_lens import mean_differences

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def lms(tiny_lms):
    torch.set_num_threads(1)
    a = load_language_model(tiny_lms[0])
    changed = copy.deepcopy(a.model)
    for param in changed.parameters():
        param.copy_(param + 0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    return a, wrap_language_model(changed, a.tokenizer, "B")


def batch():
    """The last sequence ends in padding; a token inside the second is masked; position 0 always is."""
    tokens_HS = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    mask_HS = torch.ones_like(tokens_HS, dtype=torch.bool)
    mask_HS[:, 0] = mask_HS[1, 2] = mask_HS[2, 2:] = False
    return TokenBatch(tokens_HS, mask_HS, None, 0)


def by_hand(lms, tokens_HS, layer):
    """`x_A` and `x_B - x_A` in float64, from what `transformers` gives."""
    with torch.no_grad():
        a, b = (lm.model(tokens_HS, output_hidden_states=True).hidden_states[layer + 1].double() for lm in lms)
    return a, b - a


def test_means_at_the_first_positions_and_over_the_text(lms):
    found = mean_differences(ActivationHarvester(lms, HOOKS), [batch()], n_first=3)
    assert [(one.hookpoint, one.position, one.n_tokens) for one in found] == [
        (hook, position, n) for hook in HOOKS for position, n in ((0, 3), (1, 3), (2, 2), (None, 7 + 6 + 1))
    ]
    tokens_HS, mask_HS = batch().tokens_HS, batch().mask_HS
    for layer in range(2):
        a_HSD, difference_HSD = by_hand(lms, tokens_HS, layer)
        wanted = {0: difference_HSD[:, 0], 1: difference_HSD[:, 1], 2: difference_HSD[:2, 2]}
        norms = {0: a_HSD[:, 0], 1: a_HSD[:, 1], 2: a_HSD[:2, 2], None: a_HSD[mask_HS]}
        wanted |= {None: difference_HSD[mask_HS]}
        for one in found[4 * layer : 4 * layer + 4]:
            rows_ND = wanted[one.position]
            torch.testing.assert_close(one.mean_D.double(), rows_ND.mean(0), rtol=0, atol=1e-5)
            assert one.norm_of_difference == pytest.approx(float(rows_ND.norm(dim=1).mean()), rel=1e-5)
            assert one.norm_of_a == pytest.approx(float(norms[one.position].norm(dim=1).mean()), rel=1e-5)


def test_logits_are_those_of_the_models_own_norm_and_unembedding(lms):
    harvester = ActivationHarvester(lms, HOOKS[:1])
    one = mean_differences(harvester, [batch()], n_first=1)[0]
    for lm in lms:
        norm = lm.model.model.norm
        mean_D = one.mean_D.double()
        normed_D = mean_D / (mean_D.square().mean() + norm.variance_epsilon).sqrt() * norm.weight.double()
        expected_V = lm.model.lm_head.weight.double() @ normed_D
        torch.testing.assert_close(unembed(lm, one.mean_D[None])[0].double(), expected_V, rtol=0, atol=1e-5)


def test_isolated_documents_each_have_first_positions(lms):
    tokens_HS = batch().tokens_HS[:1]
    segments_HS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    mask_HS = torch.ones_like(tokens_HS, dtype=torch.bool)
    found = mean_differences(
        ActivationHarvester(lms, HOOKS[:1]), [TokenBatch(tokens_HS, mask_HS, segments_HS, 0)], n_first=4
    )
    assert [one.n_tokens for one in found] == [2, 2, 2, 1, 8]
    both = [by_hand(lms, part, 0)[1][0, 0] for part in (tokens_HS[:, :3], tokens_HS[:, 3:])]
    torch.testing.assert_close(found[0].mean_D.double(), torch.stack(both).mean(0), rtol=0, atol=1e-5)


def test_each_group_of_tokens_has_a_mean_of_its_own(lms):
    whole, even_HS = batch(), torch.arange(24).reshape(3, 8) % 2 == 0
    labels = Labels(even_HS.to(torch.uint8), torch.zeros(3, 8).short(), torch.zeros(3, 8).long())
    labelled = TokenBatch(whole.tokens_HS, whole.mask_HS, None, 0, labels)
    groupings = {"source": ["one"], "role": ["odd", "even"]}
    found = mean_differences(ActivationHarvester(lms, HOOKS[:1]), [labelled], n_first=1, groupings=groupings)
    assert [set(one.groups) for one in found] == [set(), {"role"}]
    _, difference_HSD = by_hand(lms, whole.tokens_HS, 0)
    for name, of_HS in (("odd", ~even_HS), ("even", even_HS)):
        rows_ND = difference_HSD[whole.mask_HS & of_HS]
        own = found[1].groups["role"][name]
        assert own.n_tokens == len(rows_ND)
        torch.testing.assert_close(own.mean_D.double(), rows_ND.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("a", "b"), [(0, 2), (1, 1), (-1, 0)])
def test_models_that_are_not_two_are_refused(a, b, lms):
    with pytest.raises(InputError, match=f"models = {a}, {b}: must be two of the 2 language models"):
        mean_differences(ActivationHarvester(lms, HOOKS), [batch()], model_a=a, model_b=b)


def test_the_command_shows_tokens_or_that_there_is_no_difference(tiny_config, tmp_path, capsys, monkeypatch):
    import yaml

    def shown(models):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config | {"language_models": models}), encoding="utf-8")
        code = main(["lens", str(tmp_path / "c.yaml"), "--n-tokens", "100", "--first", "2", "--n", "3"])
        return code, capsys.readouterr()

    models = tiny_config["language_models"]
    code, out = shown(models[:2])
    lines = out.out.splitlines()
    assert code == 0 and len(lines) == 5 and [line.split()[0] for line in lines[2:]] == ["0", "1", "all"]
    assert all(line.count("'") == 6 for line in lines[2:])
    code, out = shown([models[0], models[0] | {"name": "again"}])
    assert code == 0 and out.out.splitlines()[1:] == ["no difference: the activations are equal"]
    code, out = shown(models[:1])
    assert code == 2 and "language_models: a difference needs at least two, got 1" in out.err
    monkeypatch.setattr("crosscode.build.foresight._memory", lambda device: 20_000)
    code, out = shown(models[:2])
    assert code == 2 and "weights in float32 take" in out.err and "loading" not in out.err
