"""Models of different tokenizer in one crosscoder, end to end."""

import html
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, ByT5Tokenizer

import crosscode
from crosscode.build.data import build_token_loader
from crosscode.build.experiment import open_experiment
from crosscode.build.schema import check_config
from crosscode.commands.harvest import harvest_config, run_harvest
from crosscode.data import ActivationHarvester, load_language_model, wrap_language_model
from crosscode.data.store.joined import JoinedStores
from crosscode.errors import InputError
from crosscode.evaluation.difference_lens import mean_differences

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import ranks

N_WORDS = 60


@pytest.fixture
def values(tiny_config, tiny_lms, letters_lm):
    return {**tiny_config, "language_models": [{"path": tiny_lms[0]}, {"path": letters_lm}]}


@pytest.mark.parametrize("kind", ["other tokenizer", "other end and template"])
def test_what_is_harvested_apart_is_of_the_text_that_all_read(kind, values, tiny_lms, tmp_path):
    """A chat model beside its base: the base's tokenizer decides what separates documents, whichever of them is harvested."""
    if kind == "other end and template":
        folder = shutil.copytree(tiny_lms[1], tmp_path / "chat")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token, tokenizer.chat_template = "w7", "{{ messages }}"
        tokenizer.save_pretrained(folder)
        values["language_models"][1] = {"path": str(folder)}
    stores = []
    for models in (None, [0], [1]):
        data = {**values["data"], "cache": {"path": str(tmp_path / f"store{models}")}}
        stores.append(run_harvest(harvest_config({**values, "data": data}), 200, models, progress=False))
    joined, index_B = JoinedStores([store.path for store in stores[1:]]), torch.arange(stores[0].n_rows)
    assert joined.manifest == stores[0].manifest
    assert torch.equal(joined.read_rows(index_B), stores[0].read_rows(index_B))
    assert joined.read_rows(index_B).any(-1).all()


def test_activations_are_those_of_each_model_on_its_own_tokens(values):
    experiment = open_experiment(check_config(values))
    harvester = experiment.harvester
    assert harvester.reads_M == [0, 1] and harvester.dims == (2, 1, 24)
    batch = next(iter(build_token_loader(experiment, heldout=False)))
    acts_HSMPD = harvester.harvest(batch.tokens_HS, batch.segments_HS, batch.others)
    (other,) = batch.others
    layer = int(values["hookpoints"][0].split(".")[1]) + 1
    of_each = []
    for lm, tokens in zip(harvester.models, (batch.tokens_HS, other.tokens_HT), strict=True):
        with torch.no_grad():
            of_each.append(lm.model(tokens, output_hidden_states=True).hidden_states[layer])
    assert int(batch.mask_HS.sum()) > 20
    for h, s in batch.mask_HS.nonzero().tolist():
        t = int(other.place_HS[h, s])
        word = experiment.tokenizer.convert_ids_to_tokens(int(batch.tokens_HS[h, s]))
        spelt = harvester.models[1].tokenizer.convert_ids_to_tokens(
            other.tokens_HT[h, t - len(word) + 1 : t + 1].tolist()
        )
        assert "".join(spelt) == word
        torch.testing.assert_close(acts_HSMPD[h, s, 0, 0, :16], of_each[0][h, s], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(acts_HSMPD[h, s, 1, 0], of_each[1][h, t], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="have different tokenizers"):
        harvester.harvest(batch.tokens_HS)


def ce_on_own_tokens(run):
    """Of what the second model says behind each partner."""
    losses, lm, left = [], run.language_models[1], run.config.evaluation.loss_recovered_n_tokens
    for batch in build_token_loader(run.experiment, heldout=True):
        (other,) = batch.others
        with torch.no_grad():
            log_prob_HTV = lm.model(other.tokens_HT).logits.log_softmax(-1)
        for h, s in batch.mask_HS.nonzero().tolist():
            t = int(other.place_HS[h, s])
            if t + 1 < other.tokens_HT.shape[1] and bool(other.usable_HT[h, t + 1]):
                losses.append(-log_prob_HTV[h, t, other.tokens_HT[h, t + 1]])
        left -= int(batch.mask_HS.sum())
        if left <= 0:
            break
    return float(torch.stack(losses).mean())


def check_examples_in_both_tokens(data):
    """At the peak of each example the other model reads the last letter of the first one's word."""
    texts, records = (
        json.loads((data / f"{name}.js").read_text().partition(",")[2].rpartition(")")[0])
        for name in ("texts", "records-0")
    )
    (other,) = texts["others"]
    assert len(set(texts["names"])) == 2
    n_seen = 0
    for record in records:
        for sequence, position, *_ in (one for some in record["examples"] for one in some):
            word = texts["pieces"][texts["texts"][sequence][position]]
            letter = other["pieces"][other["texts"][sequence][other["places"][sequence][position]]]
            assert len(letter.strip()) == 1 and word.endswith(letter.strip())
            n_seen += 1
    assert n_seen > 20


def check_cards_in_both_tokens(page):
    """A card shows each example in both tokenizers' tokens, outlined where the latent is largest, with equal shades."""
    found = re.findall(r'<div class="lines">(.*?)</div>', page, re.DOTALL)
    for lines in found:
        word, letter = (html.unescape(one) for one in re.findall(r'class="hit peak"[^>]*>(.*?)<', lines))
        assert len(letter.strip()) == 1 and word.endswith(letter.strip())
        shades = [re.findall(r"--s:([0-9.]+)", code) for code in re.findall("<code>(.*?)</code>", lines, re.DOTALL)]
        assert len(shades) == 2 and shades[0] == shades[1]
    assert len(found) > 10 and len(found) == page.count('title="activation at the outlined token"')


def test_a_run_on_models_of_two_tokenizers(values, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    run = crosscode.train(path, progress=False)
    figures = run.evaluate()
    left, n_apart, n_all = run.config.evaluation.n_tokens, 0, 0
    for batch in build_token_loader(run.experiment, heldout=True):
        n_apart, n_all = n_apart + batch.n_apart, n_all + batch.n_apart + int(batch.mask_HS.sum())
        left -= int(batch.mask_HS.sum())
        if left <= 0:
            break
    stored = json.loads((run.path / "summary.json").read_text())["without_partner"]
    assert figures.without_partner == stored == n_apart / n_all
    recovered = figures.loss_recovered
    assert len(recovered) == 2
    assert recovered[run.model.position_names[1]].ce_clean == pytest.approx(ce_on_own_tokens(run), rel=1e-5)
    page = run.report().read_text()
    assert "different tokenizers" in page
    check_cards_in_both_tokens(page)
    check_examples_in_both_tokens(run.path / "report" / "data")
    latents = run.latents("w1 w22 w3 w4")
    assert latents.tokens[-4:] == [" w1", " w22", " w3", " w4"]
    assert bool(latents.values_SL.to_dense()[-4:].any(1).all())
    texts = {name: logits.top(1)[0][0] for name, logits in run.logits(0).items()}
    assert len(texts) == 2 and len(list(texts.values())[1].strip()) <= 6
    steered = run.compare_steered("w1 w2", {0: 1.0}, n_tokens=2)
    assert len(steered) == 2
    with pytest.raises(InputError, match="different tokenizers"):
        run.closes([0])
    with pytest.raises(InputError, match="closes: models of different tokenizers predict no common tokens"):
        run.closes([0])
    ablates_by_characters(run)


def test_what_asks_for_common_tokens_is_refused_before_models_are_loaded(values, tmp_path, monkeypatch, capsys):
    from crosscode.build import data
    from crosscode.commands.cli import main

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    crosscode.train(path, progress=False)
    python = shutil.copytree(values["language_models"][1]["path"], tmp_path / "python")
    ByT5Tokenizer().save_pretrained(python)
    other = tmp_path / "other.yaml"
    models = [values["language_models"][0], {"path": str(python)}]
    other.write_text(yaml.safe_dump({**values, "language_models": models, "run_dir": str(tmp_path / "none")}))
    monkeypatch.setattr(data, "load_models", lambda *given: 1 / 0)
    steer = ["steer", values["run_dir"], "--latent", "0", "--prompt", "w1", "--models"]
    for command, said in (
        (
            ["evaluate", values["run_dir"], "--closes"],
            "closes: models of different tokenizers predict no common tokens",
        ),
        ([*steer, "nobody"], "models: 'nobody' is not one of this run's"),
        (["train", str(other)], "a ByT5Tokenizer does not tell of its tokens"),
        (["lens", str(other)], "a ByT5Tokenizer does not tell of its tokens"),
    ):
        capsys.readouterr()
        assert main(command) == 2
        assert said in capsys.readouterr().err


def ablates_by_characters(run):
    """`x - a_l W_dec[l]` at each model's own tokens, where one of both ends at the same character."""
    text, (base, letters) = "w1 w22 w3 w22", run.language_models
    values_SL = run.latents(text).values_SL.to_dense()
    latent = int(values_SL[-1].argmax())
    layer = int(run.config.hookpoints[0].split(".")[1])
    ends = [
        0,
        *(at for at in range(1, len(text)) if text[at] == " "),
        len(text),
    ]  # of the first one's tokens, BOS first
    for m, lm in enumerate((base, letters)):
        tokenizer = run.experiment.harvester.tokenizer_of(m)
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        a_T = torch.zeros(len(ids))
        a_T[ends if m else slice(None)] = values_SL[:, latent]
        contribution_TD = a_T[:, None] * run.model.W_dec_LXoDo[latent, m, 0, : lm.d_model].detach()
        block = lm.model.model.layers[layer]
        handle = block.register_forward_hook(lambda _module, _args, out, c=contribution_TD: out - c)
        expected_HTV = lm.model(torch.tensor([ids])).logits
        handle.remove()
        with run.ablate([latent], models=m):
            torch.testing.assert_close(lm.model(torch.tensor([ids])).logits, expected_HTV, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(expected_HTV, lm.model(torch.tensor([[ids[0], *ids[:0:-1]]])).logits)
    with pytest.raises(InputError, match="no special tokens in common"), run.ablate([latent]):
        base.model(torch.tensor([[1, 5, 2, 6]]))
    assert len(run.compare_steered("w1 w2", ablate=[latent], n_tokens=2)) == 2


def test_lengths_and_ids_of_tokens_are_those_of_the_first(values, tiny_lms, letters_lm, tmp_path):
    """A model of another tokenizer reads as many tokens of its own as it takes; what is beyond has no partner."""
    short = tmp_path / "short"
    shutil.copytree(letters_lm, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 12}))
    n_own = config["vocab_size"]
    values["data"] = {**values["data"], "mask_token_ids": [n_own - 1]}
    for first, second, message in (
        (tiny_lms[0], str(short), None),
        (
            str(short),
            tiny_lms[0],
            r"data.sequence_length = \d+: language_models.0 \(short\) takes at most 12 positions",
        ),
    ):
        config = check_config({**values, "language_models": [{"path": first}, {"path": second}]})
        if message is None:
            batch = next(iter(build_token_loader(open_experiment(config), heldout=False)))
            assert batch.others[0].tokens_HT.shape[1] == 12 < values["data"]["sequence_length"]
        else:
            with pytest.raises(InputError, match=message):
                open_experiment(config)


def test_the_difference_lens_looks_where_positions_align(values, letters_lm, save_tiny_lm, tmp_path):
    narrow = str(save_tiny_lm(str(tmp_path / "narrow"), seed=3))
    tokenizer = load_language_model(letters_lm).tokenizer
    other = wrap_language_model(load_language_model(narrow).model, tokenizer, "B")
    first = load_language_model(values["language_models"][0]["path"])
    harvester = ActivationHarvester([first, other], values["hookpoints"])
    experiment = open_experiment(check_config(values))
    batch = next(iter(build_token_loader(experiment, heldout=False)))
    found = mean_differences(harvester, [batch], n_first=2)
    acts_HSMD = harvester.harvest(*batch.inputs)[:, :, :, 0].double()
    assert [(one.position, one.n_tokens) for one in found] == [(1, len(acts_HSMD)), (None, int(batch.mask_HS.sum()))]
    difference_HSD = acts_HSMD[:, :, 1] - acts_HSMD[:, :, 0]
    for one, rows_ND in zip(found, (difference_HSD[:, 1], difference_HSD[batch.mask_HS]), strict=True):
        torch.testing.assert_close(one.mean_D.double(), rows_ND.mean(0), rtol=0, atol=1e-5)


COMMAND = [sys.executable, "-c", "import sys; from crosscode.commands.cli import main; sys.exit(main(sys.argv[1:]))"]


@pytest.mark.soak
@pytest.mark.parametrize("options", [[], ["--parallel.apart", "true"]])
def test_two_processes_train_what_one_does_on_two_widths_and_tokenizers(options, values, tmp_path):
    values["data"] = {**values["data"], "isolate_documents": True}
    values["crosscoder"] = {**values["crosscoder"], "prefixes": [8], "activation": {"type": "batch_topk", "k": 4}}
    values["objective"] = {"recon": {}, "matryoshka": {}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    weights, figures = [], []
    for n_ranks, more in ((1, []), (2, options)):
        run = tmp_path / str(n_ranks)
        words = [*COMMAND, "train", str(tmp_path / "c.yaml"), "--run_dir", str(run), *more]
        ranks.finish(ranks.spawn(n_ranks, words=words))
        weights.append(load_file(run / "final" / "model.safetensors"))
        found = json.loads((run / "evaluation.json").read_text())
        figures.append(
            [found["without_partner"], found["l0"], *found["fvu_by_position"].values(), found["prefixes"][0]["fvu"]]
        )
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, rtol=1e-4, atol=1e-5)
    assert not weights[1]["W_dec_LXoDo"][:, 0, :, 16:].any()
