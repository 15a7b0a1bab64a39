"""What is known of each position: its text, its document, who says it."""

import json

import pytest
import torch

from crosscode.config.checked import checked
from crosscode.config.data import TokenPolicy
from crosscode.data import TokenSequenceLoader, wrap_documents
from crosscode.data.text.labels import ROLES, Labels, role_number
from crosscode.data.text.mixture import MixedDocuments
from crosscode.seeds import number_of

TEMPLATE = "{% for m in messages %}{{ ' </s> ' + m['role'] + ' ' + m['content'] }}{% endfor %}"
TEXTS = ["w1 w2 w3", "w4 w5", "w6"]
CHATS = [
    [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}],
    [{"role": "critic", "content": "w10"}, {"role": "assistant", "content": "w11 w12"}],
]


@pytest.fixture
def load(build_tokenizer):
    def make(**policy):
        parts = [wrap_documents(TEXTS, name="texts"), wrap_documents(CHATS, name="chats")]
        source = MixedDocuments(parts, [1, 1], stop="all")
        options: dict = {
            "sequence_length": 7,
            "epochs": 1,
            "bos": "none",
            "separator": "none",
            "batch_size": 2,
            "keep_first_position": True,
        }
        options |= policy
        return TokenSequenceLoader(source, build_tokenizer(chat_template=TEMPLATE), **options)

    return make


def positions(batches):
    """(token, role, source, document) of every position that is no padding."""
    found = []
    for batch in batches:
        own = (batch.tokens_HS, batch.labels.role_T, batch.labels.source_T, batch.labels.document_T)
        found += [one for one in zip(*(part.flatten().tolist() for part in own), strict=True) if one[0] != 3]
    return found


@pytest.mark.parametrize("changes", [{}, {"pack": False}, {"shuffle": False, "sequence_length": 3}, {"n_workers": 2}])
def test_each_position_knows_its_text_its_document_and_who_says_it(load, changes):
    loader = load(**changes)
    assert loader.source_names == ["texts", "chats"]
    expected = {}
    for text in TEXTS:
        for word in text.split():
            expected[word] = ("text", 0, number_of(text) >> 1)
    for chat in CHATS:
        for message in chat:
            role = {"critic": "other"}.get(message["role"], message["role"])
            for word in message["content"].split():
                expected[word] = (role, 1, number_of(json.dumps(chat, sort_keys=True)) >> 1)
    seen = set()
    for token, role, source, document in positions(loader):
        word = loader.tokenizer.convert_ids_to_tokens(token)
        if word in expected:
            assert (ROLES[role], source, document) == expected[word]
            seen.add(word)
        else:
            assert (ROLES[role], source) == ("template", 1)
    assert seen == {*expected}


def test_a_position_that_is_gone_on_from_knows_the_same(load):
    whole = list(load())
    loader = load()
    first = next(iter(loader))
    again = load()
    again.load_state_dict(loader.state_dict())
    assert positions([first, *again]) == positions(whole)


def test_what_goes_around_documents_belongs_to_them(load):
    for batch in load(bos="document", separator="eos", sequence_length=40):
        tokens, document_S = batch.tokens_HS[0], batch.labels.document_T[0]
        for number in document_S.unique().tolist():
            (of_document,) = (document_S == number).nonzero(as_tuple=True)
            begin, end = int(of_document[0]), int(of_document[-1])
            own = tokens[begin : end + 1].tolist()
            if number:  # no padding
                assert (own[0], own[-1]) == (1, 2)
                frame = "text" if batch.labels.source_T[0, begin] == 0 else "template"
                assert [ROLES[batch.labels.role_T[0, at]] for at in (begin, end)] == [frame, frame]


def test_a_chat_whose_roles_cannot_be_told_is_read_and_said_to_be_unknown(build_tokenizer):
    tokenizer = build_tokenizer(chat_template="{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}")
    source = wrap_documents([[{"role": "user", "content": 'w1 "w2"'}]])
    (batch,) = TokenSequenceLoader(source, tokenizer, sequence_length=4, epochs=1, bos="none", separator="none")
    assert {ROLES[role] for role in batch.labels.role_T[batch.mask_HS].tolist()} == {"unknown"}


def test_labels_go_into_stores_and_come_back():
    generator = torch.Generator().manual_seed(0)
    labels = Labels(
        torch.randint(9, (50,), generator=generator).to(torch.uint8),
        torch.randint(300, (50,), generator=generator).to(torch.int16),
        torch.randint(2**63 - 1, (50,), generator=generator),
    )
    again = Labels.unpacked(labels.packed_R3())
    for name in ("role_T", "source_T", "document_T"):
        assert torch.equal(getattr(again, name), getattr(labels, name))


def test_numbers_of_roles_stand_in_stores():
    assert ROLES[:9] == ("text", "template", "system", "developer", "user", "assistant", "tool", "other", "unknown")
    assert [ROLES[role_number(name)] for name in ("user", "tool", "text", "unknown", "x")] == [
        "user",
        "tool",
        *["other"] * 3,
    ]


def test_the_first_position_is_kept_where_positions_say_so():
    fields = {"sequence_length": 8, "positions": {"keep_first": True}}
    assert checked(TokenPolicy, fields).keeps_first()
    assert checked(TokenPolicy, fields).recorded()["positions"]["keep_first"]
    assert (
        "keep_first" not in checked(TokenPolicy, {**fields, "positions": {"roles": ["user"]}}).recorded()["positions"]
    )
