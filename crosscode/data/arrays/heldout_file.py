"""Rows that a run on arrays holds out, kept in the run: one safetensors file, with a digest of its other bytes as the last
tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from crosscode.data.schemas import HeldoutHeader
from crosscode.errors import InputError
from crosscode.files import write_parts
from crosscode.stored import parse_json

_DIGEST_BYTES = 32
_AT_ONCE = 1 << 20
Sections = dict[str, tuple[str, tuple[int, ...], int]]
"""Dtype tag, shape and bytes of a number, by name."""


def write_heldout(path: Path, sections: Sections, parts: Iterable[Any], **metadata: int) -> None:
    """The sections' bytes follow one another in `parts`, which are made as they are needed."""
    digest = hashlib.sha256()

    def all_parts() -> Iterator[Any]:
        yield _header_bytes({**sections, "sha256": ("U8", (_DIGEST_BYTES,), 1)}, metadata)
        for part in parts:
            digest.update(memoryview(part).cast("B"))
            yield part
        yield digest.digest()

    write_parts(path, all_parts())


def read_header(path: Path) -> dict[str, Any]:
    """Entries by name, after every byte was checked. Earlier versions left no digest.

    Raises:
        InputError: damaged.
    """
    stat = path.stat()
    return _read_header(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _read_header(path: Path, size: int, mtime: int) -> dict[str, Any]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise InputError(f"{str(path)!r}: damaged (its header is longer than the file)")
        entries = parse_json(file.read(length), HeldoutHeader, str(path))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        if size != 8 + length + max(ends, default=0):
            raise InputError(f"{str(path)!r}: damaged ({size} bytes, {8 + length + max(ends, default=0)} were written)")
        if "sha256" in entries:
            digest, left = hashlib.sha256(), max(ends) - _DIGEST_BYTES
            while left > 0:
                piece = file.read(min(left, _AT_ONCE))
                digest.update(piece)
                left -= len(piece)
            if digest.digest() != file.read():
                raise InputError(f"{str(path)!r}: damaged (another checksum than when it was written)")
    return entries


def _header_bytes(sections: Sections, metadata: dict[str, int]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {name: str(value) for name, value in metadata.items()}}
    at = 0
    for name, (tag, shape, itemsize) in sections.items():
        end = at + int(np.prod(shape)) * itemsize
        entries[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
