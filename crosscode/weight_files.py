"""The weights of a saved model on disk: one safetensors file, or several by size beside an index, in Hugging Face's layout.

A tensor is never cut: one that is larger than the limit has a file of its own.

Axes: R rows.
"""

from __future__ import annotations

import hashlib
import math
import re
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from crosscode.errors import InputError, first_line
from crosscode.files import write_json
from crosscode.stored import Stored, read_json

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
"""Names of all that `write_weights` writes."""
MAX_SHARD_SIZE = "5GB"
_BYTES_AT_ONCE = 64 << 20
_SIZE = TypeAdapter(ByteSize)


class WeightIndex(Stored):
    """`model.safetensors.index.json`"""

    weight_map: dict[str, str]


class SpreadTensor(ABC):
    """A tensor of which this process holds some rows, and others the rest."""

    @property
    @abstractmethod
    def own_rows(self) -> tuple[int, Any]:
        """The first of the rows that are here, and these."""

    @abstractmethod
    def save(self, tensors: Mapping[str, Any], file: Path) -> None:
        """As `save_tensors`, together with the others; `tensors` holds this one."""


def save_tensors(tensors: Mapping[str, Any], file: Path) -> None:
    """Tensors of any device, as safetensors. What the disk refuses is an OSError, as everywhere; its mode is what the umask
    leaves."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for tensor in tensors.values():
        if isinstance(tensor, SpreadTensor):
            tensor.save(tensors, file)
            return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    for name, tensor in tensors.items():
        if uses[tensor.untyped_storage().data_ptr()] > 1:  # safetensors refuses tensors that share memory
            tensors[name] = tensor.clone()
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    try:
        save_file(tensors, file)  # some versions rename a file that nobody else may read
        file.chmod(mode)
    except SafetensorError as error:
        raise OSError(first_line(error)) from error


def n_bytes_of(size: int | str) -> int:
    """Of a size such as "5GB", "500 MiB" or a number of bytes.

    Raises:
        ValueError: it is none, or less than a byte.
    """
    try:
        n_bytes = int(_SIZE.validate_python(size))
    except ValidationError:
        n_bytes = 0
    if n_bytes < 1:
        raise ValueError(f"{size!r} is no size of a file; write '5GB', '500MB' or a number of bytes")
    return n_bytes


def write_weights(tensors: Mapping[str, Any], folder: Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Write tensors of any device into an existing folder, one file after the other.

    Raises:
        InputError: `max_shard_size` is no size.
        OSError: the disk refuses.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        limit = n_bytes_of(max_shard_size)
    except ValueError as error:
        raise InputError(f"max_shard_size = {error}") from error
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    for file, names in split.filename_to_tensors.items():
        save_tensors({name: tensors[name] for name in names}, folder / file)
    if split.is_sharded:
        write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def has_weights(folder: Path) -> bool:
    """Whether there is one file with weights, or an index of several, whole or not."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def weight_files(folder: Path) -> list[str]:
    """Names of the files that weights are in, the index first where there are several.

    Raises:
        InputError: the index is damaged, or names what is no file of ours.
    """
    return [WEIGHTS_FILE] if not _is_split(folder) else [INDEX_FILE, *sorted(set(_weight_map(folder).values()))]


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor.

    Raises:
        InputError: a file is missing or damaged; the index names tensors that its files lack.
    """
    if not _is_split(folder):
        return dict.fromkeys(tensor_names(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    where = _weight_map(folder)
    found = {name: folder / file for file in sorted(set(where.values())) for name in tensor_names(folder / file)}
    for name in sorted(where.keys() | found.keys()):
        if found.get(name) != folder / where.get(name, ""):
            raise InputError(f"{folder / INDEX_FILE}: tensor {name} is not where it says")
    return found


def shape_and_dtype(file: Path, name: str) -> tuple[tuple[int, ...], Any]:
    """Of a tensor, which is not read."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        shape = tuple(tensors.get_slice(name).get_shape())
        return shape, (tensors.get_slice(name)[:0] if shape else tensors.get_tensor(name)).dtype


def read_tensor_(tensor: Any, file: Path, name: str) -> None:
    """Fill a tensor from a file, rows after rows, so that no second copy of it is in memory; of a spread one what is here."""
    start, own = tensor.own_rows if isinstance(tensor, SpreadTensor) else (0, tensor)
    if not own.dim():
        own.copy_(next(iter(row_pieces(file, name)))[1])
        return
    for first, rows in row_pieces(file, name, start, start + len(own)):
        own[first - start : first - start + len(rows)].copy_(rows)


def row_pieces(file: Path, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any]]:
    """A tensor, or its rows from `start` to `stop`, in pieces `(first row, rows_R...)`, of which one at a time is in memory. One
    without rows is one piece.
    The pages of a file count as memory for as long as it is open, so that each piece opens it."""
    from safetensors import safe_open

    shape, dtype = shape_and_dtype(file, name)
    if not shape:
        with safe_open(file, "pt") as tensors:
            yield 0, tensors.get_tensor(name)
        return
    step = max(1, _BYTES_AT_ONCE // max(1, math.prod(shape[1:]) * dtype.itemsize))
    last = shape[0] if stop is None else stop
    for first in range(start, last, step):
        with safe_open(file, "pt") as tensors:
            yield first, tensors.get_slice(name)[first : min(first + step, last)]


def weights_digest(checksums: Mapping[str, Mapping[str, Any]]) -> str | None:
    """That of the weights, of the files in `checksums.json`: of the one file, or of all of them in their order."""
    if WEIGHTS_FILE in checksums:
        return checksums[WEIGHTS_FILE]["sha256"]
    shards = sorted(name for name in checksums if re.fullmatch(WEIGHTS, name) and name != INDEX_FILE)
    if not shards:
        return None
    return hashlib.sha256("\n".join(checksums[name]["sha256"] for name in shards).encode()).hexdigest()


def _is_split(folder: Path) -> bool:
    return not (folder / WEIGHTS_FILE).exists() and (folder / INDEX_FILE).is_file()


def _weight_map(folder: Path) -> dict[str, str]:
    where = read_json(folder / INDEX_FILE, WeightIndex)["weight_map"]
    for file in where.values():
        if not re.fullmatch(WEIGHTS, file) or file in (INDEX_FILE, WEIGHTS_FILE):
            raise InputError(f"{folder / INDEX_FILE}: {file!r} is no name of a file with weights")
    return where


def tensor_names(file: Path) -> list[str]:
    """Of a safetensors file, in its order; raises `InputError` where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except FileNotFoundError as error:
        raise InputError(f"{file}: missing; a saved model has its weights beside config.json") from error
    except SafetensorError as error:
        raise InputError(f"{file}: damaged ({first_line(error)})") from error
