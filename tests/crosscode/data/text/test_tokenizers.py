"""What decides the ids of a text is part of what a store and a position say; what only looks different is not."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from crosscode.data import TokenSequenceLoader, wrap_documents
from crosscode.data.store.format import StoreError
from crosscode.data.store.manifest import check_same_content
from crosscode.data.text.tokenizers import tokenizer_rules
from crosscode.errors import InputError

VOCAB = {piece: i for i, piece in enumerate(["<s>", "</s>", *"abcde", "ab", "cd", "abcd"])}
MERGES = [("a", "b"), ("c", "d"), ("ab", "cd")]


def bpe(change=lambda backend: None, merges=MERGES, **options):
    backend = Tokenizer(models.BPE(vocab=VOCAB, merges=merges, **options))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    change(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def put(**parts):
    return lambda backend: [setattr(backend, name, part) for name, part in parts.items()]


DECIDES = {
    "normaliser": lambda: bpe(put(normalizer=normalizers.Lowercase())),
    "cuts": lambda: bpe(put(pre_tokenizer=pre_tokenizers.WhitespaceSplit())),
    "merges": lambda: bpe(merges=MERGES[:2]),
    "order of merges": lambda: bpe(merges=[MERGES[1], MERGES[0], MERGES[2]]),
    "a rule of the model": lambda: bpe(ignore_merges=True),
    "an added token": lambda: bpe(lambda backend: backend.add_tokens(["abc"])),
    "what an added token takes in": lambda: bpe(lambda backend: backend.add_tokens([AddedToken("ab", lstrip=True)])),
}
LOOKS = {
    "decoder": lambda: bpe(put(decoder=decoders.BPEDecoder())),
    "what stands around a text": lambda: bpe(
        put(post_processor=processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    ),
    "truncation": lambda: bpe(lambda backend: backend.enable_truncation(4)),
    "padding": lambda: bpe(lambda backend: backend.enable_padding(pad_id=1, pad_token="</s>")),
}


def test_every_rule_is_in_the_fingerprint():
    plain = tokenizer_rules(bpe())
    assert plain == tokenizer_rules(bpe())
    for change, make in DECIDES.items():
        assert tokenizer_rules(make()) != plain, change
    for change, make in LOOKS.items():
        assert tokenizer_rules(make()) == plain, change
    saw = bpe()
    assert tokenizer_rules(saw) == plain
    saw.add_tokens(["abc"])
    assert tokenizer_rules(saw) != plain


def test_a_tokenizer_of_python_has_one_too():
    assert tokenizer_rules(ByT5Tokenizer()) == tokenizer_rules(ByT5Tokenizer()) != tokenizer_rules(bpe())
    assert tokenizer_rules(ByT5Tokenizer(extra_ids=3)) != tokenizer_rules(ByT5Tokenizer())
    assert tokenizer_rules(None) is None


def loader_of(tokenizer):
    return TokenSequenceLoader(wrap_documents(["ab cd"]), tokenizer, sequence_length=4)


def test_how_a_tokenizer_of_python_cuts_added_tokens_is_in_its_fingerprint():
    plain, cutting = ByT5Tokenizer(), ByT5Tokenizer()
    plain.add_tokens(["foo bar"])
    cutting.add_tokens([AddedToken("foo bar", lstrip=True)])
    assert plain("x foo bar").input_ids != cutting("x foo bar").input_ids
    assert tokenizer_rules(plain) != tokenizer_rules(cutting)


def test_a_position_of_other_rules_is_refused_and_one_that_does_not_say_is_not():
    state = loader_of(bpe()).state_dict()
    for make in LOOKS.values():
        loader_of(make()).load_state_dict(state)
    for make in DECIDES.values():
        with pytest.raises(InputError, match="tokenizer was"):
            loader_of(make()).load_state_dict(state)
    earlier = json.loads(state["settings"])
    del earlier["tokenizer"]
    loader_of(bpe()).load_state_dict({**state, "settings": json.dumps(earlier)})


def manifest(tokenizer, old=None):
    tokens = json.loads(loader_of(tokenizer).describe())
    if old is not None:
        del tokens["tokenizer"]
    return {"models": [{"name": "m"}], "tokenizer": old or "of its vocabulary", "tokens": tokens}


@pytest.mark.parametrize("to_append", [True, False])
def test_a_store_of_other_rules_is_refused(to_append, tmp_path):
    for make in LOOKS.values():
        check_same_content(tmp_path, manifest(bpe()), manifest(make()), to_append=to_append)
    for make in DECIDES.values():
        with pytest.raises(StoreError, match=r"tokens\.tokenizer is "):
            check_same_content(tmp_path, manifest(bpe()), manifest(make()), to_append=to_append)


def test_an_earlier_store_is_known_by_its_vocabulary(tmp_path):
    earlier = manifest(bpe(), old="of its vocabulary")
    check_same_content(tmp_path, earlier, manifest(DECIDES["merges"]()), to_append=True)
    with pytest.raises(StoreError, match="tokenizer is 'of another' in the store"):
        check_same_content(tmp_path, manifest(bpe(), old="of another"), manifest(bpe()), to_append=False)
