"""Streams of `datasets`: several at once, exact positions, errors while reading."""

import datasets
import pytest

from crosscode.data import load_documents, wrap_documents
from crosscode.errors import CrosscodeError, InputError

TEXTS = [f"w{i} text" for i in range(120)]


def rows_of(shards):
    for shard in shards:
        for text in TEXTS[shard * 30 : shard * 30 + 30]:
            yield {"text": text}


def stream():
    return datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"shards": [0, 1, 2, 3]})


STREAMS = {
    "generator": stream,
    "table": lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=3),
    "mapped": lambda: stream().map(
        lambda rows: {"text": [text + "!" for text in rows["text"]]}, batched=True, batch_size=7
    ),
    "interleaved": lambda: datasets.interleave_datasets([stream(), stream()], probabilities=[0.3, 0.7], seed=1),
    "joined": lambda: datasets.concatenate_datasets([stream(), stream()]),
    "shuffled": lambda: stream().shuffle(seed=1, buffer_size=25),
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("n_before", [40, 95])
def test_a_position_continues_exactly_though_others_read_in_between(kind, n_before):
    expected = list(wrap_documents(STREAMS[kind](), column="text").open())
    source = wrap_documents(STREAMS[kind](), column="text")
    one, other = source.open(), source.open()
    seen = []
    for i in range(n_before):
        seen.append(next(one))
        if i % 3 == 0:
            next(other)
    state = one.state()
    other_state = other.state()
    continued = list(wrap_documents(STREAMS[kind](), column="text").open(state=state))
    assert seen + continued == expected
    assert seen + list(one) == expected
    assert list(source.open(state=other_state)) == list(other)


def test_bad_content_of_a_stream_is_bad_input(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"text": oops\n')
    with pytest.raises(InputError, match=r"bad.jsonl' cannot be read on after 0 rows: JSON parse error"):
        load_documents(str(tmp_path / "bad.jsonl"), streaming=True)


def test_the_reason_that_a_file_cannot_be_read_is_told(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    with pytest.raises(InputError, match="can't decode byte 0xe9"):
        load_documents(str(tmp_path / "latin.txt"))


def test_a_stream_that_breaks_off_says_where(tmp_path):
    def broken():
        yield from rows_of([0])
        raise ConnectionError("the network is gone")

    source = wrap_documents(datasets.IterableDataset.from_generator(broken), column="text")
    with pytest.raises(CrosscodeError, match="cannot be read on after 30 rows: the network is gone") as caught:
        list(source.open())
    assert not isinstance(caught.value, InputError)
