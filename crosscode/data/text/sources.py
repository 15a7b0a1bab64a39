"""Documents of data sets: lists, files, folders, the hub.

A source may be opened many times, each time from the start or from a saved position; a shuffled order is a permutation
that depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from crosscode.data.hub import look_for_hub
from crosscode.data.text.documents import Document, DocumentSource, DocumentStream, document_of, hash_documents
from crosscode.data.text.streams import StreamedDocuments, fresh_stream, one_line_errors
from crosscode.errors import InputError, first_line

_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
_COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
_FINGERPRINT_DOCUMENTS = 256


class IndexedDocuments(DocumentSource):
    """Documents with a length and random access: a map-style dataset, a list."""

    def __init__(self, rows: Sequence[Any] | Any, column: str | None, *, name: str) -> None:
        if len(rows) == 0:
            raise InputError(f"dataset {name!r} is empty")
        self._rows = rows
        self._column = column
        self.name = name
        n = len(rows)
        sample = sorted({i * (n - 1) // max(_FINGERPRINT_DOCUMENTS - 1, 1) for i in range(_FINGERPRINT_DOCUMENTS)})
        self.fingerprint = f"{hash_documents(self.document(i) for i in sample)}:{n}"

    def __len__(self) -> int:
        return len(self._rows)

    def document(self, index: int) -> Document:
        return document_of(self._rows[index], self._column, self.name)

    def open(self, *, order_seed: int | None = None, state: str | None = None) -> DocumentStream:
        order_N = None
        if order_seed is not None:
            order_N = torch.randperm(len(self), generator=torch.Generator().manual_seed(order_seed))
        return _IndexedStream(self, order_N, int(state) if state else 0)


class _IndexedStream(DocumentStream):
    def __init__(self, source: IndexedDocuments, order_N: torch.Tensor | None, position: int) -> None:
        self._source = source
        self._order_N = order_N
        self._position = position

    def __next__(self) -> Document:
        if self._position >= len(self._source):
            raise StopIteration
        index = self._position if self._order_N is None else int(self._order_N[self._position])
        self._position += 1
        return self._source.document(index)

    def state(self) -> str:
        return str(self._position)


def load_documents(
    path_or_name: str,
    *,
    column: str = "text",
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    text_unit: str = "document",
) -> DocumentSource:
    """Documents of a dataset, read with `datasets`.

    `path_or_name`: a folder made by `save_to_disk`, a file or a folder of files (.txt, .jsonl, .json, .parquet,
    .arrow, .csv, also compressed), or a hub name (with `subset`, `revision` and `split`). `column` holds text, token
    ids or chat messages. `streaming` reads without downloading or converting the whole. `text_unit`: what one document
    of a text file is: the whole file ("document"), a "paragraph" or a "line".

    Raises InputError for a missing folder, an unknown split or column, and an empty dataset.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    if text_unit not in ("document", "paragraph", "line"):
        raise InputError(f"text_unit: {text_unit!r} is not one of document, paragraph, line")
    path, unreachable = Path(path_or_name).expanduser(), None
    try:
        if path.exists():
            data = _load_local(path, column=column, split=split, streaming=streaming, text_unit=text_unit)
        elif path_or_name.startswith((".", "/", "~")) or path_or_name.count("/") > 1 or _kind_of(path):
            raise InputError(f"dataset {path_or_name!r}: no such file or folder")
        else:
            unreachable = look_for_hub()
            data = datasets.load_dataset(path_or_name, subset, split=split, revision=revision, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, InputError):
            raise
        # `datasets` says only that it failed, and gives the reason as the cause.
        told = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
        reason = f"{unreachable}, and it is not in the cache" if unreachable else first_line(told)
        raise InputError(f"dataset {path_or_name!r} (split {split!r}) cannot be loaded: {reason}") from error
    return wrap_documents(data, column=column, name=path_or_name)


def wrap_documents(data: Any, *, column: str | None = None, name: str = "in-memory") -> DocumentSource:
    """Documents of a `datasets` Dataset or IterableDataset, a list, a matrix of token ids, or a function that returns a
    fresh iterable.

    `data`: one of these; `name`: what messages call it. `column` names the field of each row; None takes the rows
    themselves as documents.

    Raises:
        InputError: several splits, no such column, or a plain iterator, which could be read once only.
    """
    import datasets

    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise InputError(f"dataset {name!r} holds several splits ({', '.join(map(str, data))}); give one of them")
    if isinstance(data, datasets.Dataset):
        _check_column(column, data.column_names, name)
        return IndexedDocuments(data, column, name=name)
    if isinstance(data, datasets.IterableDataset):
        return _wrap_stream(data, column, name)
    if isinstance(data, Sequence) and not isinstance(data, str):
        for row in data[:1]:
            _check_column(column, list(row) if isinstance(row, Mapping) else None, name)
        return IndexedDocuments(data, column, name=name)
    if getattr(data, "ndim", 0) == 2 and column is None:
        return IndexedDocuments(data, None, name=name)
    if callable(data):
        return StreamedDocuments(data, column, name=name)
    raise InputError(
        f"dataset {name!r}: {type(data).__name__} cannot be read more than once; give a list or a function"
    )


def _wrap_stream(data: Any, column: str | None, name: str) -> DocumentSource:
    columns = data.column_names
    if columns is None:
        first = next(one_line_errors(fresh_stream(data), name), None)
        if first is None:
            raise InputError(f"dataset {name!r} is empty")
        columns = list(first)
    _check_column(column, columns, name)
    return StreamedDocuments(lambda: fresh_stream(data), column, name=name)


def _load_local(path: Path, *, column: str, split: str, streaming: bool, text_unit: str) -> Any:
    import datasets

    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise InputError(f"split: {split!r} is not in {str(path)!r}; it has {', '.join(map(str, data))}")
            data = data[split]
        return data.to_iterable_dataset() if streaming else data
    files = sorted(file for file in path.rglob("*") if _kind_of(file)) if path.is_dir() else [path]
    kinds = {_kind_of(file) for file in files}
    if not files or None in kinds:
        raise InputError(f"dataset {str(path)!r}: no file of a known kind ({', '.join(sorted(_BUILDERS))})")
    if len(kinds) > 1:
        raise InputError(f"dataset {str(path)!r} mixes kinds of files: {', '.join(sorted(map(str, kinds)))}")
    if all(file.stat().st_size == 0 for file in files):
        raise InputError(f"dataset {str(path)!r} is empty")
    kind = str(kinds.pop())
    names = [str(file) for file in files]
    options: dict[str, Any] = {"sample_by": text_unit} if kind == "text" else {}
    if kind == "csv":
        options = _cells_as_written(names[0], column)
    return datasets.load_dataset(kind, data_files={split: names}, split=split, streaming=streaming, **options)


def _cells_as_written(file: str, column: str) -> dict[str, Any]:
    """Options for a CSV by which a cell that reads NA, null or 007 is that text, not a missing value or a number."""
    import pandas

    if column not in pandas.read_csv(file, nrows=0).columns:
        return {}
    return {"usecols": [column], "converters": {column: str}, "keep_default_na": False}


def _kind_of(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSED]
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def _check_column(column: str | None, columns: Iterable[str] | None, name: str) -> None:
    if column is not None and columns is not None and column not in columns:
        raise InputError(f"column: {column!r} is not a column of dataset {name!r}; it has {', '.join(columns)}")
