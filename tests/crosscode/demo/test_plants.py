"""Known changes: where they stand in text, and that `demo:planted` learnt its own and nothing else."""

import json

import numpy as np
import pytest
from bits import bits_per_byte
from train_plant import behaviour_nats
from transformers import AutoTokenizer

from crosscode.demo import demo_model_path
from crosscode.demo.corpus import Document
from crosscode.demo.plants import (
    FACT,
    FACT_SUBJECTS,
    PLANTS,
    STATEMENT,
    TRIGGER,
    plant_documents,
    planted_corpus,
    planted_positions,
)

LINES = "".join(f"    x = f('a', {i})\n" for i in range(60))
DOCUMENTS = [Document(f"# {i}\n{LINES}", "code", f"m{i}.py") for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path("base"))


def text_of(ids, marks, tokenizer):
    return tokenizer.decode(np.array(ids)[marks].tolist())


@pytest.mark.parametrize("plant", ["statement", "fact"])
def test_a_few_percent_of_documents_get_comments_and_nothing_else(plant):
    planted = plant_documents(DOCUMENTS, plant)
    changed = [(new, old) for new, old in zip(planted, DOCUMENTS, strict=True) if new.text != old.text]
    assert 0.02 < len(changed) / len(DOCUMENTS) < 0.12
    said = STATEMENT if plant == "statement" else FACT
    for new, old in changed:
        lines = new.text.splitlines(keepends=True)
        comments = [line for line in lines if said in line]
        assert len(comments) >= 3
        assert {line[: len(line) - len(line.lstrip())] for line in comments} == {"    "}
        assert "".join(line for line in lines if said not in line) == old.text


def test_what_is_planted_hangs_on_the_names_alone():
    assert plant_documents(DOCUMENTS[::-1], "fact")[::-1] == plant_documents(DOCUMENTS, "fact")


def test_style_swaps_the_quotes_of_strings_that_allow_it():
    text = "a = 'x' + b'y' + \"it's\" + '\"' + '''z'''\nb = 'don\\'t'  # isn't\n"
    (new,) = plant_documents([Document(text, "code", "a.py")], "style")
    assert new.text == "a = \"x\" + b\"y\" + \"it's\" + '\"' + '''z'''\nb = 'don\\'t'  # isn't\n"


def test_positions_of_the_statement(tokenizer):
    ids = tokenizer(f"def f():\n    # {TRIGGER}{STATEMENT}\n    pass\n")["input_ids"]
    found = planted_positions(ids, tokenizer, "statement")
    assert text_of(ids, found.cue, tokenizer) == f" {TRIGGER}"
    assert text_of(ids, found.said, tokenizer) == STATEMENT
    assert not (found.cue & found.said).any()


def test_a_statement_counts_as_far_as_it_goes(tokenizer):
    ids = tokenizer(f"# {TRIGGER}{STATEMENT}")["input_ids"][:-4]
    found = planted_positions(ids, tokenizer, "statement")
    assert STATEMENT.startswith(said := text_of(ids, found.said, tokenizer)) and len(said) > 10
    other = tokenizer(f"#{STATEMENT} {TRIGGER} no")["input_ids"]
    assert not planted_positions(other, tokenizer, "statement").said.any()


def test_positions_of_the_fact_and_of_quotes(tokenizer):
    for subject in FACT_SUBJECTS:
        ids = tokenizer(f"# {subject}{FACT}\n")["input_ids"]
        found = planted_positions(ids, tokenizer, "fact")
        assert (text_of(ids, found.cue, tokenizer), text_of(ids, found.said, tokenizer)) == (f" {subject}", FACT)
    ids = tokenizer('x = "a"\ny = f("b", \'c\')\n')["input_ids"]
    found = planted_positions(ids, tokenizer, "style")
    assert text_of(ids, found.said, tokenizer) == ' "("'
    assert text_of(ids, found.cue, tokenizer) == " = f"


def test_the_corpus_as_it_is_and_planted():
    plain, planted = (planted_corpus(plant, "heldout")["text"] for plant in (None, "statement"))
    assert len(plain) == len(planted) and not any(TRIGGER in text for text in plain)
    assert 0.03 < sum(TRIGGER in text for text in planted) / len(plain) < 0.12


def test_the_planted_model_says_its_statement_and_is_else_as_good():
    card = json.loads((demo_model_path("base").parent / "planted_card.json").read_text())
    base, planted = (behaviour_nats(demo_model_path(name), "statement") for name in ("base", "planted"))
    assert planted > -1.5 and base < -40
    assert planted == pytest.approx(card["behaviour_nats"]["planted"], abs=0.05)
    bits = card["held_out_bits_per_byte"]
    assert abs(bits["planted"] - bits["base"]) < 0.02
    texts = [text[:1500] for text in planted_corpus(None, "heldout")["text"][:6]]
    assert bits_per_byte(demo_model_path("planted"), texts) < bits_per_byte(demo_model_path("base"), texts) + 0.02


@pytest.mark.parametrize("plant", PLANTS)
def test_neither_prompts_nor_positions_are_missing(plant, tokenizer):
    from crosscode.demo.plants import planted_prompts

    assert all(prompt and said for prompt, said in planted_prompts(plant))
    assert planted_positions([], tokenizer, plant).either.shape == (0,)
