"""Chunks of documents: the same batches for any number of workers, and a position that takes a few bytes."""

import gc
import threading

import pytest
import torch

from crosscode.data import MixedDocuments, TokenSequenceLoader, wrap_documents
from crosscode.data.text import token_chunks
from crosscode.errors import InputError


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(token_chunks, "_DOCUMENTS", 3)


def loader_of(source, tokenizer, **changes):
    options = {"sequence_length": 8, "batch_size": 3, "epochs": 2, "seed": 5}
    return TokenSequenceLoader(source, tokenizer, **{**options, **changes})


def same(one, two):
    assert len(one) == len(two)
    for mine, theirs in zip(one, two, strict=True):
        assert torch.equal(mine.tokens_HS, theirs.tokens_HS)
        assert torch.equal(mine.mask_HS, theirs.mask_HS)
        assert mine.epoch == theirs.epoch


@pytest.fixture(params=["list", "stream", "mixture"])
def source(request, documents):
    if request.param == "list":
        return wrap_documents(documents)
    if request.param == "stream":
        return wrap_documents(lambda: iter(documents))
    parts = [wrap_documents(documents[:15], name="a"), wrap_documents(lambda: iter(documents[15:]), name="b")]
    return MixedDocuments(parts, [1, 2], stop="all")


@pytest.mark.parametrize("n_workers", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"split": "train", "validation_fraction": 0.3}, {"pack": False}])
def test_workers_change_no_batch(source, tokenizer, n_workers, changes):
    plain = list(loader_of(source, tokenizer, **changes))
    same(list(loader_of(source, tokenizer, n_workers=n_workers, **changes)), plain)


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("shape", [{"sequence_length": 5, "batch_size": 1}, {"sequence_length": 16, "batch_size": 9}])
def test_every_position_continues_exactly(source, tokenizer, n_workers, shape):
    whole = list(loader_of(source, tokenizer, **shape))
    loader = loader_of(source, tokenizer, n_workers=n_workers, **shape)
    states = [loader.state_dict()]
    for _ in loader:
        states.append(loader.state_dict())
    for n_done in range(0, len(whole) + 1, 3):
        again = loader_of(source, tokenizer, **shape)
        again.load_state_dict(states[n_done])
        assert again.state_dict() == states[n_done]
        same(list(again), whole[n_done:])


def test_a_position_takes_a_few_bytes_however_long_the_documents_are(tokenizer):
    loader = loader_of(wrap_documents(["w0 " * 20_000] * 4), tokenizer)
    next(iter(loader))
    state = loader.state_dict()
    assert not any(isinstance(value, torch.Tensor) for value in state.values())
    assert sum(len(str(value)) for value in state.values()) < 2000


def test_a_bad_document_is_reported_whoever_reads_it(tokenizer):
    documents = [[7, 8, 9]] * 20 + [["seven"]]
    for n_workers in (0, 2):
        with pytest.raises(InputError, match="text, token ids or chat messages are needed"):
            list(loader_of(wrap_documents(documents), tokenizer, n_workers=n_workers, shuffle=False))


def test_a_source_that_fails_ends_the_workers(tokenizer, documents):
    def rows():
        yield from documents
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        list(loader_of(wrap_documents(rows), tokenizer, n_workers=2))


def test_threads_end_with_the_iterator(tokenizer, documents):
    before = set(threading.enumerate())
    loader = loader_of(wrap_documents(documents), tokenizer, n_workers=2, epochs=None)
    next(iter(loader))
    workers = set(threading.enumerate()) - before
    assert len(workers) == 2
    del loader
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_end_where_one_of_them_collects_the_iterator(tokenizer, documents):
    class Collecting:
        """A tokenizer in whose calls garbage is collected, once there is some."""

        def __init__(self):
            self.dropped = threading.Event()
            self.collected = threading.Event()

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *args, **options):
            if threading.current_thread() is not threading.main_thread() and self.dropped.wait(timeout=0.5):
                gc.collect()
                self.collected.set()
            return tokenizer(*args, **options)

    collecting, before = Collecting(), set(threading.enumerate())
    loader = loader_of(wrap_documents(documents), collecting, n_workers=2, epochs=None)
    iterator = iter(loader)
    next(iterator)
    workers = set(threading.enumerate()) - before
    gc.disable()
    try:
        iterator.cycle = iterator
        del loader, iterator
        collecting.dropped.set()
        assert collecting.collected.wait(timeout=30)
        for worker in workers:
            worker.join(timeout=30)
            assert not worker.is_alive()
    finally:
        gc.enable()
