"""A text that cannot be trained on is refused before anything is written, in a line that names it."""

import json

import pytest

from crosscode.build.data import check_documents, check_usable
from crosscode.config.checked import checked
from crosscode.config.data import HarvestConfig
from crosscode.data import wrap_documents
from crosscode.errors import InputError

DIFFERENT = [[i % 50, i // 50] * 4 for i in range(300)]


def config_of(**data):
    source = {"type": "local", "path": "t.jsonl"}
    fields = {"language_models": [{"path": "m"}], "hookpoints": ["h"], "data": {"source": source, **data}}
    return checked(HarvestConfig, json.loads(json.dumps(fields)))


HELDOUT = {"heldout": {"type": "local", "path": "h.jsonl"}}


@pytest.mark.parametrize(
    ("documents", "data", "message"),
    [
        (["w1 w2"] * 300, HELDOUT, "data.source: the 300 documents that it begins with are all the same"),
        (["w1 w2"] * 300, {}, "data.source: the 300 documents that it begins with are all the same"),
        (["w1"], {}, r"validation_fraction = 0.02: no document of the 1 .* is left for evaluation; raise it"),
        (["w1"], {"validation_fraction": 0.999}, r"= 0.999: no document of the 1 .* is left for training; lower it"),
    ],
)
def test_identical_and_too_few_documents(documents, data, message):
    with pytest.raises(InputError, match=message):
        check_documents(config_of(**data), wrap_documents(documents))


@pytest.mark.parametrize("data", [{}, HELDOUT])
def test_documents_that_differ_are_taken(data):
    check_documents(config_of(**data), wrap_documents(DIFFERENT))
    check_documents(config_of(**HELDOUT), wrap_documents(DIFFERENT[:1]))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["w1 w2"], "data.source: dataset: it holds text, but the language model has no tokenizer; give token ids"),
        ([[{"role": "user", "content": "w1"}]], "data.source: dataset: it holds chats, but .* no chat template"),
        ([[5] * 10], r"data.source: 'in-memory' has 9 usable tokens, less than one batch; .* \(now 64\) to at most 9"),
    ],
)
def test_a_text_that_makes_no_batch(documents, message):
    with pytest.raises(InputError, match=message):
        check_usable(config_of(**HELDOUT), wrap_documents(documents), None, field="data.source", least=64)
    check_usable(config_of(**HELDOUT), wrap_documents(DIFFERENT), None, field="data.source", least=64)
