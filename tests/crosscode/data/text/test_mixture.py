"""A mixture of sources keeps its weights, its documents and its position."""

from collections import Counter

import pytest

from crosscode.data import MixedDocuments, TokenSequenceLoader, wrap_documents
from crosscode.errors import InputError


def sources_of(*sizes):
    return [wrap_documents([f"w{i} w{j % 30}" for j in range(n)], name=f"s{i}") for i, n in enumerate(sizes)]


def labels(stream):
    return [document.split()[0] for document in stream]


def test_weights_hold_and_no_document_repeats():
    mixture = MixedDocuments(sources_of(4000, 4000), [3, 1])
    counts = Counter(labels(mixture.open()))
    assert counts["w0"] == 4000
    assert abs(counts["w1"] / counts["w0"] - 1 / 3) < 0.05


def test_stop_all_reads_every_source_and_says_which_begins_again(caplog):
    with caplog.at_level("INFO", "crosscode"):
        documents = list(MixedDocuments(sources_of(10, 30), [1, 1], stop="all").open())
    assert [record.getMessage().split()[1] for record in caplog.records] == ["s0"]
    assert {document for document in documents if document.startswith("w1 ")} == {f"w1 w{j}" for j in range(30)}
    assert Counter(labels(documents))["w0"] > 10


@pytest.mark.parametrize("stop", ["first", "all"])
@pytest.mark.parametrize("order_seed", [None, 7])
def test_position_continues_exactly(stop, order_seed):
    mixture = MixedDocuments(sources_of(20, 50, 30), [1, 2, 1], stop=stop)
    expected = list(mixture.open(order_seed=order_seed))
    for n in (0, 1, 17, len(expected)):
        stream = mixture.open(order_seed=order_seed)
        assert [next(stream) for _ in range(n)] == expected[:n]
        assert list(mixture.open(order_seed=order_seed, state=stream.state())) == expected[n:]


def test_it_is_a_source_like_any_other(tokenizer):
    loader = TokenSequenceLoader(
        MixedDocuments(sources_of(20, 20), [1, 1]), tokenizer, sequence_length=8, batch_size=2, epochs=2, seed=1
    )
    batches = list(loader)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    resumed = loader.fresh()
    resumed.load_state_dict(loader.state_dict())
    assert [batch.tokens_HS.tolist() for batch in resumed] == [batch.tokens_HS.tolist() for batch in batches[5:]]


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_what_is_read_in_order_goes_on_in_the_next_epoch(tokenizer, shuffle, n_workers):
    """A short text ends each epoch; a long stream comes to its end in spite of it, and then from its beginning."""
    long = wrap_documents(lambda: iter([[100 + i] * 3 for i in range(60)]), name="long")
    short = wrap_documents([[6], [7], [8], [9]])
    loader = TokenSequenceLoader(
        MixedDocuments([long, short], [3, 1]), tokenizer, sequence_length=2, batch_size=1, epochs=9, seed=1,
        bos="none", separator="none", keep_first_position=True, shuffle=shuffle, n_workers=n_workers,
    )  # fmt: skip
    iterator, rows, states = iter(loader), [], []
    for batch in iterator:
        rows.append((batch.epoch, batch.tokens_HS[batch.mask_HS].tolist()))
        states.append(loader.state_dict())
    tokens = [token for _, row in rows for token in row]
    order = [token for token in tokens if token >= 100][::3]
    assert len(order) > 70
    assert order == [100 + i % 60 for i in range(len(order))]
    assert Counter(token for token in tokens if token < 100) == dict.fromkeys((6, 7, 8, 9), 9)
    for n in (10, len(rows) // 2):
        resumed = loader.fresh()
        resumed.load_state_dict(states[n - 1])
        assert [(batch.epoch, batch.tokens_HS[batch.mask_HS].tolist()) for batch in resumed] == rows[n:]


@pytest.mark.parametrize(
    ("weights", "stop", "message"),
    [([1], "first", "weights"), ([1, 0], "first", "weights"), ([1, 1], "last", "stop 'last' is not one of")],
)
def test_bad_mixtures_are_refused(weights, stop, message):
    with pytest.raises(InputError, match=message):
        MixedDocuments(sources_of(3, 3), weights, stop=stop)


def test_an_empty_source_is_refused():
    empty = wrap_documents(lambda: iter(()), name="nothing")
    with pytest.raises(InputError, match="dataset 'nothing' is empty"):
        list(MixedDocuments([empty, *sources_of(5)], [1, 1], stop="all").open())
