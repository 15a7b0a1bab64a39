"""Documents that can only be read one after another: a stream of `datasets`, or what a function returns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from crosscode.data.text.documents import Document, DocumentSource, DocumentStream, document_of, hash_documents
from crosscode.errors import CrosscodeError, InputError, first_line

_FINGERPRINT_DOCUMENTS = 8


class StreamedDocuments(DocumentSource):
    """A `datasets` stream, or any function that opens a fresh iterable: read in order, one after another."""

    keeps_order = True

    def __init__(self, open_rows: Callable[[], Any], column: str | None, *, name: str) -> None:
        self._open_rows = open_rows
        self._column = column
        self.name = name
        beginning = itertools.islice(self.open(), _FINGERPRINT_DOCUMENTS)
        self.fingerprint = f"{hash_documents(beginning)}:stream"

    def open(self, *, order_seed: int | None = None, state: str | None = None) -> DocumentStream:
        return _RowStream(self._open_rows(), self._column, state, self.name)


class _RowStream(DocumentStream):
    """Saves the position as the dataset's own state where that is exact, else as the number of rows to skip."""

    def __init__(self, rows: Any, column: str | None, state: str | None, name: str) -> None:
        self._rows = rows
        self._column = column
        self._name = name
        self._has_state = hasattr(rows, "load_state_dict") and not _has_shuffle_buffer(rows)
        self._count = 0
        if state and self._has_state:
            rows.load_state_dict(json.loads(state))
        self._iterator = one_line_errors(rows, name) if hasattr(rows, "load_state_dict") else iter(rows)
        if state and not self._has_state:
            self._count = int(state)
            for _ in range(self._count):
                next(self._iterator, None)

    def __next__(self) -> Document:
        row = next(self._iterator)
        self._count += 1
        return document_of(row, self._column, self._name)

    def state(self) -> str:
        return json.dumps(self._rows.state_dict()) if self._has_state else str(self._count)


def fresh_stream(data: Any) -> Any:
    """A `datasets` stream of its own over the same rows.

    An IterableDataset and the steps that it is made of keep their position in themselves, so that each pass needs
    copies of them: training and evaluation may read one data set in turns.
    """
    fresh = object.__new__(type(data))  # copy.copy would share the dictionary of attributes
    fresh.__dict__.update(vars(data))
    fresh._state_dict = None
    fresh._starting_state_dict = None
    fresh._ex_iterable = _copy_steps(data._ex_iterable)
    return fresh


def _copy_steps(step: Any) -> Any:
    """A step and all that it reads from; the functions and the data are shared."""
    twin = object.__new__(type(step))
    twin.__dict__.update(vars(step))
    twin._state_dict = None
    for name, value in vars(step).items():
        if _is_step(value):
            setattr(twin, name, _copy_steps(value))
        elif isinstance(value, list) and value and all(_is_step(item) for item in value):
            setattr(twin, name, [_copy_steps(item) for item in value])
    return twin


def _is_step(value: Any) -> bool:
    return hasattr(value, "_init_state_dict")


def _has_shuffle_buffer(rows: Any) -> bool:
    """Whether `datasets` would lose rows on resuming: its state leaves out what lies in a shuffle buffer."""
    waiting = [getattr(rows, "_ex_iterable", None)]
    while waiting:
        step = waiting.pop()
        if type(step).__name__ == "BufferShuffledExamplesIterable":
            return True
        for value in vars(step).values() if _is_step(step) else ():
            waiting += value if isinstance(value, list) else [value]
    return False


def one_line_errors(rows: Any, name: str) -> Iterator[Any]:
    """What `datasets` raises while it reads, in one line: bad content is bad input, the rest (the network) is not."""
    n_rows = 0
    try:
        for row in rows:
            yield row
            n_rows += 1
    except Exception as error:
        if isinstance(error, CrosscodeError):
            raise
        kind = InputError if isinstance(error, ValueError) else CrosscodeError
        raise kind(f"dataset {name!r} cannot be read on after {n_rows} rows: {first_line(error)}") from error
