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


def test_stop_all_reads_every_source():
    documents = list(MixedDocuments(sources_of(10, 30), [1, 1], stop="all").open())
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
