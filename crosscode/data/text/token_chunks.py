"""Documents of one epoch, read and turned into tokens a chunk at a time, by this thread or by several others.

T the tokens of one chunk.

Tokenizing many documents at once is much cheaper than one by one. A chunk knows where it begins in the source, so that
a position is saved as the beginning of a chunk and what was used of it: a few bytes, however long the documents are.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from crosscode.config.data import TokenPolicy
from crosscode.data.text.documents import Document, DocumentStream, document_number
from crosscode.data.text.labels import Labels
from crosscode.data.text.render import ROLE_SHIFT, Rendered

_DOCUMENTS = 64
_CHARACTERS = 1 << 20
_CHUNKS_AHEAD_PER_WORKER = 2


def is_on_side(document: Document, policy: TokenPolicy) -> bool:
    """Whether a document is on the policy's side of the validation split: decided by its content alone."""
    if policy.split == "all":
        return True
    return (document_number(document) < policy.validation_fraction * 2**64) == (policy.split == "validation")


@dataclass(frozen=True)
class Read:
    """Documents, the parts of the mixture that they come from, where they begin, and how many were read up to their end."""

    start: Start
    n_read: int
    documents: list[Document]
    parts: list[int]


@dataclass(frozen=True)
class Tokens:
    """A run of tokens: their ids, flag bytes, the part of the mixture and the document that each comes from, and its characters
    there (see `Rendered`)."""

    ids_T: torch.Tensor
    flags_T: torch.Tensor
    source_T: torch.Tensor
    document_T: torch.Tensor
    chars_T3: torch.Tensor

    @classmethod
    def full(cls, shape: tuple[int, ...], token: int, flags: int) -> Tokens:
        """One token in all places, of no document."""
        ids_T, document_T = torch.full(shape, token), torch.zeros(shape, dtype=torch.long)
        flags_T = torch.full(shape, flags, dtype=torch.uint8)
        chars_T3 = torch.zeros((*shape, 3), dtype=torch.int32)
        return cls(ids_T, flags_T, torch.zeros(shape, dtype=torch.int16), document_T, chars_T3)

    def all(self) -> tuple[torch.Tensor, ...]:
        return self.ids_T, self.flags_T, self.source_T, self.document_T, self.chars_T3

    def __len__(self) -> int:
        return len(self.ids_T)

    def __getitem__(self, places: slice) -> Tokens:
        return Tokens(*(own[places] for own in self.all()))

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(*(torch.cat(pair) for pair in zip(self.all(), other.all(), strict=True)))

    def labels(self) -> Labels:
        return Labels(self.flags_T >> ROLE_SHIFT, self.source_T, self.document_T)


@dataclass(frozen=True)
class Start:
    """Where a chunk begins: the position in the source, and documents read before."""

    source: str
    n_read: int


@dataclass(frozen=True)
class Chunk:
    """`n_read` counts the documents up to the end of the chunk, those that were not selected included. `documents`: by the
    numbers that tokens bear."""

    start: Start
    tokens: Tokens
    n_read: int
    documents: dict[int, Document]


class ChunkReader:
    """The chunks of one epoch from `start` on, in order; `render` makes tokens of the documents that are selected."""

    def __init__(
        self,
        stream: DocumentStream,
        start: Start,
        policy: TokenPolicy,
        render: Callable[[Sequence[Document]], list[Rendered]],
    ) -> None:
        self._stream = stream
        self._next_start = start
        self._policy = policy
        self._render = render
        self._ended = False

    @property
    def next_epoch(self) -> Start:
        """Where the next epoch begins, once this one has ended."""
        return Start(self._stream.next_epoch(), 0)

    def __iter__(self) -> Iterator[Chunk]:
        while (read := self.read()) is not None:
            yield self.render(read)

    def read(self) -> Read | None:
        """The next documents; None at the end of the source."""
        if self._ended:
            return None
        start, n_read, n_characters = self._next_start, self._next_start.n_read, 0
        documents, parts = list[Document](), list[int]()
        index, count = self._policy.worker
        while len(documents) < _DOCUMENTS and n_characters < _CHARACTERS:
            document = next(self._stream, None)
            if document is None:
                self._ended = True
                break
            if n_read % count == index and is_on_side(document, self._policy):
                documents.append(document)
                parts.append(self._stream.part)
                n_characters += _length(document)
            n_read += 1
        self._next_start = Start(self._stream.state(), n_read)
        return Read(start, n_read, documents, parts)

    def render(self, read: Read) -> Chunk:
        rendered = self._render(read.documents)
        numbers = [document_number(document) >> 1 for document in read.documents]
        lengths = torch.tensor([len(tokens_T) for tokens_T, *_ in rendered], dtype=torch.long)
        tokens = Tokens(
            torch.cat([torch.empty(0, dtype=torch.long), *(tokens_T for tokens_T, *_ in rendered)]),
            torch.cat([torch.empty(0, dtype=torch.uint8), *(flags_T for _, flags_T, _ in rendered)]),
            torch.tensor(read.parts, dtype=torch.int16).repeat_interleave(lengths),
            torch.tensor(numbers, dtype=torch.long).repeat_interleave(lengths),
            torch.cat([torch.empty((0, 3), dtype=torch.int32), *(chars_T3 for *_, chars_T3 in rendered)]),
        )
        return Chunk(read.start, tokens, read.n_read, dict(zip(numbers, read.documents, strict=True)))


def _length(document: Document) -> int:
    """Characters of a text or of a chat; token ids count as four, about what they stand for."""
    if isinstance(document, str):
        return len(document)
    if len(document) and isinstance(document[0], dict):
        return len(json.dumps(document))
    return 4 * len(document)


class WorkerChunks(Iterator[Chunk]):
    """The same chunks in the same order, read one after another and rendered by `n_workers` threads at a time.

    Tokenizers release Python's lock while they work. At most two chunks a worker wait.
    """

    def __init__(self, reader: ChunkReader, n_workers: int) -> None:
        shared = _Shared(reader, n_workers * _CHUNKS_AHEAD_PER_WORKER)
        threads = [threading.Thread(target=_work, args=(shared,), daemon=True) for _ in range(n_workers)]
        self._shared = shared
        self._finalize = weakref.finalize(self, _stop, shared, threads)
        for thread in threads:
            thread.start()

    def __next__(self) -> Chunk:
        with self._shared.changed:
            while not self._shared.chunks and not self._shared.ended:
                self._shared.changed.wait()
            if not self._shared.chunks:
                raise StopIteration
            future = self._shared.chunks.popleft()
            self._shared.changed.notify_all()
        return future.result()


class _Shared:
    """What the reader and its workers hold together; `chunks` is in the order of the source."""

    def __init__(self, reader: ChunkReader, limit: int) -> None:
        self.reader = reader
        self.limit = limit
        self.reading = threading.Lock()
        self.changed = threading.Condition()
        self.chunks: deque[Future[Chunk]] = deque()
        self.ended = self.stopped = False

    def take(self) -> tuple[Future[Chunk], Read] | None:
        """Read the next documents and put up a place for their chunk."""
        with self.reading:
            with self.changed:
                while len(self.chunks) >= self.limit and not self.stopped:
                    self.changed.wait()
                if self.stopped or self.ended:
                    return None
            future: Future[Chunk] = Future()
            try:
                read = self.reader.read()
            except BaseException as error:
                future.set_exception(error)
                self._put(future, ended=True)
                return None
            if read is None:
                self._put(None, ended=True)
                return None
            self._put(future, ended=False)
            return future, read

    def _put(self, future: Future[Chunk] | None, *, ended: bool) -> None:
        with self.changed:
            if future is not None:
                self.chunks.append(future)
            self.ended = ended
            self.changed.notify_all()


def _work(shared: _Shared) -> None:
    while (taken := shared.take()) is not None:
        future, read = taken
        try:
            future.set_result(shared.reader.render(read))
        except BaseException as error:
            future.set_exception(error)


def _stop(shared: _Shared, threads: Sequence[threading.Thread]) -> None:
    """Ends the threads and waits for them: one that is still in native code at interpreter exit would crash."""
    with shared.changed:
        shared.stopped = True
        shared.changed.notify_all()
    # Garbage may be collected in a worker, which can wait neither for itself nor for one that waits for its lock.
    if threading.current_thread() not in threads:
        for thread in threads:
            thread.join()
