"""What a reader sees of a token."""

import copy

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscode.analysis.tokens import TokenDisplay

SIGNS = str.maketrans({"\n": "↵", "\t": "→", "\r": "␍"})


class Pieces:
    """A tokenizer that is only a list of pieces."""

    def __init__(self, pieces, special=(0,)):
        self.pieces, self.all_special_ids = pieces, list(special)

    def convert_ids_to_tokens(self, i):
        return self.pieces[i] if i < len(self.pieces) else None

    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces)}


def shown(tokenizer, ids):
    return [token.text for token in TokenDisplay(tokenizer)(ids, [0.0] * len(ids))]


def test_byte_level_pieces_read_as_text(byte_tokenizer):
    text = "def f(x):\n    return x\tnaïve 日本 🙂"
    ids = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(shown(byte_tokenizer, ids)) == text.translate(SIGNS)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(categories=("L", "N", "P", "S"), include_characters=" \n\t"), min_size=1))
def test_no_text_is_lost_and_no_character_is_cut(byte_tokenizer, text):
    ids = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(shown(byte_tokenizer, ids)) == text.translate(SIGNS)


def test_a_character_spread_over_tokens_is_shown_once_with_its_largest_strength(byte_tokenizer):
    ids = byte_tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    assert len(ids) > 4
    strengths = [0.0] * len(ids)
    strengths[2], strengths[3] = 0.5, 2.0
    tokens = TokenDisplay(byte_tokenizer)(ids, strengths, peak=3)
    assert [token.text for token in tokens] == ["a", "🙂", "b"]
    assert [token.strength for token in tokens] == [0, 2.0, 0]
    assert [token.is_peak for token in tokens] == [False, True, False]


def test_a_window_that_starts_or_ends_inside_a_character_shows_its_bytes(byte_tokenizer):
    ids = byte_tokenizer("é🙂", add_special_tokens=False)["input_ids"]
    tail = shown(byte_tokenizer, ids[1:])
    assert tail[0] == "\\xa9" and tail[-1] == "🙂"
    assert shown(byte_tokenizer, ids[:-1])[-1] == "\\xf0\\x9f\\x99"


def test_special_and_unknown_tokens(byte_tokenizer):
    tokens = TokenDisplay(byte_tokenizer)([0, 5, 99_999], [0, 0, 0])
    assert tokens[0].text == "<s>" and tokens[0].is_special
    assert not tokens[1].is_special
    assert tokens[2].text == "[99999]"


def test_a_special_token_ends_an_unfinished_character(byte_tokenizer):
    first = byte_tokenizer("é", add_special_tokens=False)["input_ids"][0]
    assert shown(byte_tokenizer, [first, 0]) == ["\\xc3", "<s>"]


def test_sentencepiece_pieces():
    tokenizer = Pieces(["<s>", "▁Hello", "▁wor", "ld", "<0xE2>", "<0x82>", "<0xAC>", "▁"])
    assert shown(tokenizer, [0, 1, 2, 3, 4, 5, 6, 7]) == ["<s>", " Hello", " wor", "ld", "€", " "]


@pytest.mark.parametrize("pieces, text", [(["[CLS]", "play", "##ing", "x"], " playing x")])
def test_word_pieces_are_spaced(pieces, text):
    assert "".join(shown(Pieces(pieces), [1, 2, 3])) == text


def test_control_characters_are_visible():
    assert shown(Pieces(["<s>", "▁", "a\x00b\u200bc"]), [2]) == ["a\\u0000b\\u200bc"]


def test_added_tokens_are_the_text_that_they_were_added_as(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens(["naïve", "¿qué?", "Ġ  ▁"])
    text = "the naïve café ¿qué? Ġ  ▁ x"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(shown(tokenizer, ids)) == text


def test_a_tokenizer_of_bytes_reads_as_text():
    tokenizer = transformers.ByT5Tokenizer()
    text = "café fox 你好 🙂"
    assert "".join(shown(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])) == text


@pytest.mark.parametrize("pieces", ["abc ", "ACDEFGHIKLMNPQRSTVWY", "é你 x", ["AC", "GT", *"ACGT"]])
def test_a_tokenizer_of_characters_puts_no_spaces_between_them(pieces):
    vocab = {piece: i for i, piece in enumerate(["<s>", "[UNK]", *pieces])}
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocab, unk_token="[UNK]")
        if isinstance(pieces, str)
        else tokenizers.models.BPE(vocab, [("A", "C"), ("G", "T")])
    )
    if isinstance(pieces, str):
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", behavior="isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="[UNK]")
    text = "".join(reversed([*pieces])) * 2
    assert "".join(shown(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])) == text


def test_whole_words_are_set_apart():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "fox": 1, "a": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert shown(words, [2, 1]) == [" a", " fox"]
    assert shown(Pieces(["<s>", "fox</w>", "es</w>", "jump"]), [1, 3, 2]) == ["fox ", "jump", "es "]


def test_without_a_tokenizer_ids_are_shown():
    assert shown(None, [3, 0]) == ["[3]", "[0]"]
