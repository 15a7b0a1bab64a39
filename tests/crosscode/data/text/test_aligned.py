"""One text in the tokens of two tokenizers, against a brute-force search over characters."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from crosscode.data import TokenSequenceLoader, wrap_documents
from crosscode.demo import demo_model_path
from crosscode.errors import InputError

TEXTS = [
    "def naïve(x):\n    return x  # 你好 🙂🙂 ok\n",
    "A LONG   line with  CAPS, tabs\tand 12345 numbers <mark> in between; e\u0301 ﬁne\n" * 3,
    "x",
    "🙂" * 9,
    "import os\n\nclass A:\n    pass\n" * 4,
]
CHATS = [
    [{"role": "user", "content": " Say 你好, please "}, {"role": "assistant", "content": "你好 🙂\n"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a b c"},
        {"role": "assistant", "content": "d"},
    ],
]
TEMPLATES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}",
    "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m.content | trim }}</s>{% endfor %}",
)


def lowercase_words():
    """Words of lower case, unknown characters one by one: a normaliser that changes lengths, an added token, its own BOS."""
    pieces = ["import", "class", "line", "with", "long", "return", "##s", "caps", "fi", "ok", "##ne", "e"]
    letters = [chr(i) for i in range(33, 127)] + ["你", "好", "🙂", "ï"]
    vocab = {
        t: i
        for i, t in enumerate(dict.fromkeys(["[UNK]", "<s>", "</s>", *pieces, *letters, *(f"##{c}" for c in letters)]))
    }
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
    fast.add_tokens(["<mark>"])
    return fast


@pytest.fixture(scope="module")
def pair():
    first, other = AutoTokenizer.from_pretrained(demo_model_path("base")), lowercase_words()
    first.chat_template, other.chat_template = TEMPLATES
    return first, other


def ends_by_character(tokenizer, text):
    """Where each token of a text ends, character by character, by `char_to_token` rather than offsets; of tokens that end one
    character the last."""
    encoding = tokenizer(text, add_special_tokens=False)
    owners = [encoding.char_to_token(place) for place in range(len(text))]
    ends = {}
    for place, (owner, after) in enumerate(zip(owners, [*owners[1:], None], strict=True)):
        if owner is not None and owner != after:
            ends[place + 1] = owner
    n_tokens = len(encoding["input_ids"])
    known = sorted((owner, end) for end, owner in ends.items())
    for owner, end in known:  # bytes of one character: char_to_token gives the first of them
        last = owner
        while (
            last + 1 < n_tokens
            and encoding.token_to_chars(last + 1) is not None
            and encoding.token_to_chars(last + 1).end == end
        ):
            last += 1
        ends[end] = last
    return encoding["input_ids"], ends


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("bos", ["sequence", "document", "none"])
def test_whole_documents_are_aligned_as_by_hand(pair, bos, isolate, order):
    """One document a sequence, so that nothing is cut; one of the two has no token for how most of them end."""
    first, other = pair = [pair[i] for i in order]
    texts = [*TEXTS, "caps e\u0301 ok\u0301 "]
    loader = TokenSequenceLoader(
        wrap_documents(texts), first, others=[(other, None)], sequence_length=400, pack=False, bos=bos, epochs=1,
        isolate_documents=isolate, shuffle=False, batch_size=len(texts), keep_first_position=True,
        mask_special_tokens=False, separator="none",
    )  # fmt: skip
    (batch,) = loader
    (aligned,) = batch.others
    for h, text in enumerate(texts):
        (ids, ends), (ids_other, ends_other) = ends_by_character(first, text), ends_by_character(other, text)
        lead, lead_other = (int(bos != "none" and t.bos_token_id is not None) for t in pair)
        assert batch.tokens_HS[h, lead : lead + len(ids)].tolist() == ids
        assert (
            aligned.tokens_HT[h, : lead_other + len(ids_other)].tolist()
            == [other.bos_token_id] * lead_other + ids_other
        )
        wanted = {ends[end] + lead: ends_other[end] + lead_other for end in ends.keys() & ends_other.keys()}
        found = {s: t for s, t in enumerate(aligned.place_HS[h].tolist()) if t >= 0}
        assert found == wanted and (len(wanted) >= 3 or text == "x")
        assert batch.mask_HS[h].nonzero()[:, 0].tolist() == sorted(wanted)


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("bos", ["sequence", "document"])
def test_partners_end_the_same_text_in_packed_sequences(pair, bos, chats):
    first, other = pair
    loader = TokenSequenceLoader(
        wrap_documents(CHATS * 4 if chats else TEXTS * 3), first, others=[(other, 30)], sequence_length=17, bos=bos, epochs=1,
        batch_size=3, seed=3, isolate_documents=True,
    )  # fmt: skip
    n = 0
    for batch in loader:
        (aligned,) = batch.others
        assert aligned.tokens_HT.shape[1] <= 30
        for h, s in batch.mask_HS.nonzero().tolist():
            t = int(aligned.place_HS[h, s])
            assert s > 0 and t > 0 and aligned.segments_HT[h, t] == batch.segments_HS[h, s]
            one = first.decode(batch.tokens_HS[h, s : s + 1])
            two = other.decode(aligned.tokens_HT[h, t : t + 1])
            same = normal(one)[-1:] == normal(two)[-1:]
            assert same or "�" in one or "[UNK]" in two or "##" in two, (one, two)
            n += 1
        left_out = (aligned.place_HS < 0) & batch.mask_HS
        assert not left_out.any()
    assert n > 40


def normal(text):
    import unicodedata

    return unicodedata.normalize("NFKC", text).lower().removeprefix("##").strip()


@pytest.mark.parametrize("bos", ["sequence", "document"])
def test_one_token_that_begins_and_ends_documents_stands_once_between_them(pair, bos):
    """As a loader of the other tokenizer alone has it."""
    first, other = pair[0], lowercase_words()
    other.bos_token = other.eos_token
    texts = ["line with caps", "ok", "class import"]
    options = {"sequence_length": 60, "bos": bos, "epochs": 1, "shuffle": False, "batch_size": 1}
    (batch,) = TokenSequenceLoader(wrap_documents(texts), first, others=[(other, None)], **options)
    (alone,) = TokenSequenceLoader(wrap_documents(texts), other, **options)
    n = batch.others[0].tokens_HT.shape[1]
    assert batch.others[0].tokens_HT[0].tolist() == alone.tokens_HS[0, :n].tolist()


def test_a_separator_that_begins_a_sequence_is_no_part_of_the_next_document(pair):
    first, other = lowercase_words(), pair[0]
    first.bos_token = first.eos_token
    texts = ["line with caps", "import class line"]
    batches = TokenSequenceLoader(
        wrap_documents(texts), first, others=[(other, None)], sequence_length=4, bos="sequence", epochs=1, shuffle=False,
        batch_size=1,
    )  # fmt: skip
    read = [other.decode(batch.others[0].tokens_HT[0], skip_special_tokens=True) for batch in batches]
    assert read == texts


def test_text_without_a_token_of_the_other_has_no_partner(pair):
    spaces, words = pair
    loader = TokenSequenceLoader(
        wrap_documents(["\n" * 30, "ok"]), spaces, others=[(words, None)], sequence_length=8, bos="none", epochs=1, pack=False,
        shuffle=False, batch_size=1, keep_first_position=True, separator="none",
    )  # fmt: skip
    (batch,) = loader
    assert spaces.decode(batch.tokens_HS[0][batch.mask_HS[0]]) == "ok"


def test_a_position_is_saved_and_found_again(pair):
    first, other = pair
    make = lambda: TokenSequenceLoader(  # noqa: E731
        wrap_documents(TEXTS * 5), first, others=[(other, None)], sequence_length=13, epochs=2, batch_size=2, seed=1
    )
    whole = list(make())
    loader = make()
    stream = iter(loader)
    for _ in range(len(whole) // 3):
        next(stream)
    again = make()
    again.load_state_dict(loader.state_dict())
    rest = list(again)
    assert len(rest) == len(whole) - len(whole) // 3
    for one, two in zip(rest, whole[len(whole) // 3 :], strict=True):
        assert torch.equal(one.tokens_HS, two.tokens_HS) and torch.equal(one.mask_HS, two.mask_HS)
        assert torch.equal(one.others[0].tokens_HT, two.others[0].tokens_HT)
        assert torch.equal(one.others[0].place_HS, two.others[0].place_HS)


def test_what_cannot_be_aligned_is_refused(pair):
    first, other = pair
    with pytest.raises(InputError, match="token ids, which language_models of different tokenizers cannot both read"):
        list(
            TokenSequenceLoader(wrap_documents([[5, 6, 7]]), first, others=[(other, None)], sequence_length=8, epochs=1)
        )
