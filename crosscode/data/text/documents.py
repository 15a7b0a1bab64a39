"""What a document is, and a source of documents: in a fixed order, to be opened at any position.

A document is a text, a list of token ids, or a chat (a list of messages with "role" and "content").
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from crosscode.errors import InputError
from crosscode.seeds import number_of

Document = str | list[int] | list[dict[str, Any]]


class DocumentStream(ABC, Iterator[Document]):
    """One pass over a source. `state()` is the position after the last document that was handed out, `part` the number of
    the part that it came from, of a mixture."""

    part = 0

    @abstractmethod
    def state(self) -> str: ...

    def next_epoch(self) -> str:
        """Where the pass after this one, which has ended, begins: a state, or "" for the start."""
        return ""


class DocumentSource(ABC):
    """Documents that can be opened many times.

    `name` is for messages. `fingerprint` depends on the content alone, not on where it lies: a hash of documents spread
    over the whole and their number, or of the first documents of a stream.
    """

    name: str
    fingerprint: str
    keeps_order = False
    """whether it ignores `order_seed`"""

    @abstractmethod
    def open(self, *, order_seed: int | None = None, state: str | None = None) -> DocumentStream:
        """A new pass, from the start or from `state`. `order_seed` None keeps the stored order.

        A source that cannot be read at random (a stream) keeps its order in any case.
        """


def document_of(row: Any, column: str | None, name: str) -> Document:
    """The document in a row of dataset `name`: a missing value is an empty one; arrays and tensors become lists.

    Raises InputError for anything that is neither text nor a list; what is in a list shows when it is rendered.
    """
    if column is not None and isinstance(row, Mapping) and column not in row:
        raise InputError(f"column: {column!r} is not in a row of dataset {name!r}; it has {', '.join(map(str, row))}")
    value: Any = row if column is None else row[column]
    if value is None:
        return ""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str | list | tuple):
        return value  # pyright: ignore[reportReturnType]
    if isinstance(value, Mapping):
        raise InputError(
            f"dataset {name!r}: a document is a row of fields ({', '.join(value)}); name the column to read"
        )
    raise InputError(
        f"dataset {name!r}: a document is {str(value)[:60]!r} ({type(value).__name__}); "
        "text, token ids or chat messages are needed"
    )


def document_number(document: Document) -> int:
    """A number in [0, 2^64) that looks random and that the content of a document alone decides."""
    return number_of(document if isinstance(document, str) else json.dumps(document, sort_keys=True, default=str))


def hash_documents(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
