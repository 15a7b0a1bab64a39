"""A beginning-of-sequence token is never doubled, whoever brings it."""

import itertools

import pytest

from crosscode.data import TokenSequenceLoader, wrap_documents

BOS, EOS, PAD = 1, 2, 3
OWN = [[BOS, 10 + i, 20 + i, 30 + i][: 2 + i % 3] for i in range(12)]


def sequences(documents, tokenizer, **policy):
    options = {"sequence_length": 5, "batch_size": 3, "epochs": 1, "shuffle": False, "keep_first_position": True}
    for batch in TokenSequenceLoader(wrap_documents(documents), tokenizer, **{**options, **policy}):
        for row, usable in zip(batch.tokens_HS.tolist(), batch.mask_HS.tolist(), strict=True):
            yield [token for token, is_usable in zip(row, usable, strict=True) if is_usable]


def doubled(rows):
    return [row for row in rows if any(a == b == BOS for a, b in itertools.pairwise(row))]


@pytest.mark.parametrize("bos", ["sequence", "document", "none"])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("isolate", [True, False])
def test_ids_that_bring_their_own(bos, pack, isolate, tokenizer):
    rows = list(sequences(OWN, tokenizer, bos=bos, pack=pack, isolate_documents=isolate))
    assert not doubled(rows)
    kept = [token for row in rows for token in row if token not in (BOS, EOS)]
    assert kept == [token for document in OWN for token in document if token != BOS]
    if not pack:
        assert rows == OWN
    elif bos == "sequence":
        assert all(row[0] == BOS for row in rows)


def test_a_long_document_with_its_own_bos_fills_sequences_of_its_own(tokenizer):
    long = [BOS, *range(10, 16), BOS, 40, 41]
    rows = list(sequences([long, [7, 8], [BOS, 9]], tokenizer, pack=False))
    assert rows == [[BOS, 10, 11, 12, 13], [BOS, 14, 15, BOS, 40], [BOS, 41], [BOS, 7, 8], [BOS, 9]]


def test_a_chat_whose_template_begins_with_bos(build_tokenizer):
    template = "{{ bos_token }} {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    chats = [[{"role": "user", "content": f"w{i}"}] for i in range(3)]
    rows = list(sequences(chats, build_tokenizer(chat_template=template), pack=False))
    assert rows == [[BOS, 4, 6 + i] for i in range(3)]


@pytest.mark.parametrize("bos", ["sequence", "document"])
@pytest.mark.parametrize("own", [[], [BOS]])
def test_one_token_for_bos_and_eos(bos, own, build_tokenizer):
    """GPT-2's: what ends a document begins the next."""
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<s>"
    rows = list(sequences([[*own, 10 + i, 20 + i] for i in range(8)], tokenizer, bos=bos))
    assert not doubled(rows)
    tokens = [token for row in rows for token in (row[1:] if bos == "sequence" else row)]
    between = [at for at, token in enumerate(tokens) if token == 10 + 1 or token == 10 + 5]
    assert [token for token in tokens if token != BOS] == [n + i for i in range(8) for n in (10, 20)]
    assert bos == "sequence" or all(tokens[at - 1] == BOS for at in between)


def test_positions_continue_where_sequences_differ_in_length(tokenizer):
    loader = TokenSequenceLoader(
        wrap_documents(OWN), tokenizer, sequence_length=4, batch_size=2, epochs=2, keep_first_position=True
    )
    batches, states = [], []
    for batch in loader:
        batches.append(batch.tokens_HS.tolist())
        states.append(loader.state_dict())
    for n in range(1, len(batches)):
        resumed = loader.fresh()
        resumed.load_state_dict(states[n - 1])
        assert [batch.tokens_HS.tolist() for batch in resumed] == batches[n:]
