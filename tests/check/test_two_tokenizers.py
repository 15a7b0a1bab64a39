"""The embedded base beside a small model of another width and tokenizer: what is planted in both is found as shared.

A concept is a group of words: at each of them, a model that has it has one direction added to the embedding. The
base has no direction for the words of the small model alone.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import crosscode
from crosscode.commands.parts.options import merged
from crosscode.config.reading import load_yaml
from crosscode.demo import demo_model_path
from crosscode.demo.corpus import demo_documents
from crosscode.recipes import recipe_path

WIDTH = 112
CONCEPTS = {
    "shared": [" if", " for", " in", " not", " is", " and"],
    "small-specific": [" import", " class", " with", " from"],
}
CHANGES = {
    "data": {"n_tokens_for_norm_estimate": 8192, "shuffle_buffer_size": 8192, "sequence_length": 128},
    "crosscoder": {"n_latents": 512},
    "train": {"n_tokens": 120_000, "checkpoint_every": None},
    "evaluation": {"n_tokens": 20_000, "every": None, "loss_recovered": "never"},
}


def small_tokenizer(texts):
    """Of other words than the base's, with a normaliser that changes lengths."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKD()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_planted(lm, tokenizer, name, folder, text):
    """With a direction of the size of an activation at each word of the concepts that the model has; the directions."""
    tokens_1S = torch.tensor([tokenizer(text, truncation=True, max_length=128)["input_ids"]])
    with torch.no_grad():
        acts_SD = lm(tokens_1S, output_hidden_states=True).hidden_states[3][0]
        directions = {}
        for concept, words in CONCEPTS.items():
            if concept in ("shared", f"{name}-specific"):
                ids = [token for word in words for token in tokenizer(word, add_special_tokens=False)["input_ids"]]
                assert len(ids) == len(words), (name, concept)  # one token each
                direction_D = torch.randn(acts_SD.shape[1], generator=torch.Generator().manual_seed(len(directions)))
                directions[concept] = direction_D * acts_SD[1:].norm(dim=1).mean() / direction_D.norm()
                lm.get_input_embeddings().weight[ids] += directions[concept]
    lm.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return directions


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    texts = [doc.text for doc in demo_documents("train", ("code",))[::8]]
    base, tokenizer = demo_model_path("base"), small_tokenizer(texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=224, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    pair = {
        "base": (AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)),
        "small": (AutoModelForCausalLM.from_config(config), tokenizer),
    }
    directions = {name: save_planted(*one, name, folder, texts[0]) for name, one in pair.items()}
    values = merged(load_yaml(recipe_path("demo").read_text(), "demo"), CHANGES)
    values["language_models"] = [{"path": str(folder / name), "name": name} for name in pair]
    del values["objective"]["delta"]
    (folder / "config.yaml").write_text(json.dumps(values))
    return crosscode.train(folder / "config.yaml", run_dir=folder / "run", progress=False), directions


def test_what_both_have_is_shared_and_what_one_has_is_its_own(trained):
    run, directions = trained
    table, W_dec_LMPD = run.table(), run.model.W_dec_LXoDo.detach()
    assert run.model.widths == ((192,), (WIDTH,)) and run.experiment.harvester.reads_M == [0, 1]

    def cosine_ML(concept):
        """Of each latent's decoder vector in a model with the concept's direction there."""
        return {
            name: cosine_similarity(W_dec_LMPD[:, m, 0, : len(own[concept])], own[concept][None])
            for m, (name, own) in enumerate(directions.items())
            if concept in own
        }

    of_both = cosine_ML("shared")
    latent = int(sum(of_both.values()).argmax())
    assert min(float(cosine_L[latent]) for cosine_L in of_both.values()) > 0.65
    assert table["tag"][latent] == "shared" and table["relative_norm_small"][latent] == pytest.approx(0.5, abs=0.1)

    of_small = cosine_ML("small-specific")["small"]
    assert table["tag"][int(of_small.argmax())] == "small-specific"
    latents = (of_small > 0.9).nonzero()[:, 0].tolist()
    assert table["tag"][latents].mode()[0] == "small-specific" and table["relative_norm_small"][latents].mean() > 0.65
